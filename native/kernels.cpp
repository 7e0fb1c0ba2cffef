// Measure and apply: plain loops over tiles of float (double for float64 parameters), compiled once per instruction
// set as ADAFACTOR_NS. No function here or in what it includes has external linkage but `kernels`, and no sum
// depends on the width of a register: hence the same bits everywhere.

#include "kernels.h"
#include "storage.h"
#include "sums.h"

namespace ADAFACTOR_NS {
namespace {

using adafactor::Unit;
using adafactor::Workspace;

const size_t kColumns = 512;            // columns that eight rows visit while they are in the first-level cache
const size_t kBlockBytes = 192 * 1024;  // of gradient between its first and its second look: second-level cache
const size_t kMostRows = 64;            // of a block
const size_t kAhead = 2;                // rows between the one at hand and the one asked for, where columns come first
const size_t kStreams = 8;              // rows that are read side by side: memory answers several streams sooner than one
const size_t kPiece = 128;              // of each in turn

inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

template <class T>
inline T* at(void* buffer, size_t index) {
  return static_cast<T*>(buffer) + index;
}

inline size_t bytes_of(int64_t dtype) {
  return dtype == ADAFACTOR_FLOAT64 ? 8 : dtype == ADAFACTOR_FLOAT32 ? 4 : 2;
}

inline bool finite(double x) { return x - x == 0; }

inline bool columns_first(const adafactor_tensor& t) { return t.flags & ADAFACTOR_COLUMNS_FIRST; }

// Whether measure takes the sum of x^2.
inline bool reads_x(const adafactor_tensor& t) {
  return (t.flags & ADAFACTOR_SCALE_PARAMETER) && !(t.flags & (ADAFACTOR_Q_KNOWN | ADAFACTOR_ROWS_SUMMED));
}

// Numbers in each of S and W of one block.
inline size_t sums_of_a_block(const adafactor_tensor& t) {
  return size_t(columns_first(t) ? t.rows : t.inner * t.columns);
}

// A tile of a factored parameter is a piece of one long run, or several short runs: how many of them.
inline size_t runs_of_a_tile(size_t m, size_t left) { return m < kTile ? least(kTile / m, left) : 1; }

// Sum of x^2 over runs [first, last) of m elements, in the tiles of `apply`: its sums of the new x and the sums found
// here in the next update have the same bits, so it does not matter which of them a run uses.
template <class T>
double sum_squares(const adafactor_tensor& t, size_t first, size_t last, size_t m) {
  T tile[kTile];
  double total = 0;
  for (size_t r = first; r < last;) {
    const size_t runs = runs_of_a_tile(m, last - r);
    for (size_t j = 0; j < m; j += kTile) {
      const size_t n = runs * least(kTile, m - j);
      total += double(sum<Square>(load(t.param_dtype, t.param, r * m + j, tile, n), n));
    }
    r += runs;
  }
  return total;
}

// The same over [begin, end) of a parameter that is not factored.
template <class T>
double sum_squares(const adafactor_tensor& t, size_t begin, size_t end) {
  T tile[kTile];
  double total = 0;
  for (size_t j = begin; j < end; j += kTile) {
    const size_t n = least(kTile, end - j);
    total += double(sum<Square>(load(t.param_dtype, t.param, j, tile, n), n));
  }
  return total;
}

// ---- measure --------------------------------------------------------------------------------------------------

// sums[r] = sum_j g[r][j]^2 over runs [first, last).
template <class T>
void sum_rows(const adafactor_tensor& t, T* sums, size_t first, size_t last) {
  const size_t m = size_t(t.columns);
  T tile[kTile];
  for (; t.grad_dtype == Own<T>::dtype && m >= 4 * kPiece && last - first >= kStreams; first += kStreams) {
    const T* g = static_cast<const T*>(t.grad) + first * m;
    Lanes<T> lanes[kStreams];
    for (size_t j = 0; j < m; j += kPiece) {
      const size_t n = least(kPiece, m - j), next = j + kPiece < m ? j + kPiece : kStreams * m;
      for (size_t q = 0; q < kStreams; ++q) {
        prefetch(t.grad_dtype, g, q * m + next - n, n);
        lanes[q].template add<Square>(g + q * m + j, n);
      }
    }
    for (size_t q = 0; q < kStreams; ++q) sums[first + q] = lanes[q].total();
  }
  if (m <= kTile) {
    for (size_t r = first; r < last;) {
      const size_t rows = least(kTile / m, last - r);
      const T* g = load(t.grad_dtype, t.grad, r * m, tile, rows * m);
      for (size_t q = 0; q < rows; ++q) sums[r + q] = sum<Square>(g + q * m, m);
      r += rows;
    }
    return;
  }
  for (size_t r = first; r < last; ++r) {
    Lanes<T> lanes;
    for (size_t j = 0; j < m; j += kTile) {
      const size_t n = least(kTile, m - j);
      lanes.template add<Square>(load(t.grad_dtype, t.grad, r * m + j, tile, n), n);
    }
    sums[r] = lanes.total();
  }
}

// Adds R rows to S and W (eqs. 4 and 5). One after the other, so R does not change a bit.
template <int R, class T>
inline void add_rows(const T* g, size_t stride, const T* inverse_roots, T* ADAFACTOR_RESTRICT S,
                     T* ADAFACTOR_RESTRICT W, size_t n) {
  T scale[R];
  for (int q = 0; q < R; ++q) scale[q] = inverse_roots[q];
  for (size_t j = 0; j < n; ++j) {
    T s = S[j], w = W[j];
    for (int q = 0; q < R; ++q) {
      const T v = g[size_t(q) * stride + j];
      const T u = v * scale[q];
      s += v * v;
      w += u * u;
    }
    S[j] = s;
    W[j] = w;
  }
}

// Pieces of rows as T, `stride` apart.
template <class T>
struct Rows {
  const T* g;
  size_t stride;
};

// `count` pieces of rows of the gradient, n <= kTile elements each (any number where no copy is made), `stride`
// apart and starting at element `first`: in place if the storage is T, else copies in `tile`, which has room for them.
template <class T>
Rows<T> load_rows(const adafactor_tensor& t, size_t first, size_t stride, size_t count, size_t n, T* tile) {
  if (t.grad_dtype == Own<T>::dtype) return {static_cast<const T*>(t.grad) + first, stride};
  if (stride == n) {
    for (size_t done = 0; done < count * n; done += kTile)
      widen(t.grad_dtype, t.grad, first + done, tile + done, least(count * n - done, kTile));
  } else {
    for (size_t q = 0; q < count; ++q) widen(t.grad_dtype, t.grad, first + q * stride, tile + q * n, n);
  }
  return {tile, n};
}

// Adds R rows, `stride` apart and starting at element `first` of the gradient, to the m columns of S and W.
template <int R, class T>
void add_columns(const adafactor_tensor& t, size_t first, size_t stride, const T* inverse_roots, T* S, T* W) {
  T tile[R * kColumns];
  const size_t m = size_t(t.columns), width = t.grad_dtype == Own<T>::dtype ? m : kColumns;
  for (size_t j = 0; j < m; j += width) {
    const size_t n = least(width, m - j);
    const Rows<T> rows = load_rows(t, first + j, stride, R, n, tile);
    add_rows<R>(rows.g, rows.stride, inverse_roots, S + j, W + j, n);
  }
}

// row^(-1/2) for the weights of eq. 5. A sum of squares that overflowed must not hide behind a weight of 0.
template <class T>
inline T weight(T row) {
  const T poison = row - row;
  return poison == 0 ? inverse_root(row) : poison;
}

// Finishes n rows of `length` elements each, whose sums of g^2 are in `finished` (eq. 2).
template <class T>
void finish_rows(const adafactor_tensor& t, const T* ADAFACTOR_RESTRICT row, T* ADAFACTOR_RESTRICT finished, size_t n,
                 T length) {
  const T ema_weight = T(t.ema_weight), past = T(1 - t.ema_weight), eps1 = T(t.eps1);
  for (size_t r = 0; r < n; ++r) finished[r] = past * row[r] + ema_weight * (finished[r] / length + eps1);
}

template <class T>
void measure_block(const adafactor_tensor& t, T* finished, T* S, T* W, size_t b, size_t begin, size_t end) {
  const size_t n = size_t(t.rows), m = size_t(t.columns), inner = size_t(t.inner), stride = inner * m;
  const bool summed = t.flags & ADAFACTOR_ROWS_SUMMED, sum_only = t.flags & ADAFACTOR_ROW_SUMS;
  const T length = T(t.global_columns);
  memset(S, 0, stride * sizeof(T));
  memset(W, 0, stride * sizeof(T));

  size_t rows = kBlockBytes / (stride * bytes_of(t.grad_dtype));
  rows = rows >= kMostRows ? kMostRows : rows >= 8 ? rows / 8 * 8 : rows >= 4 ? 4 : 1;
  for (size_t i = begin; i < end; i += rows) {
    const size_t i_end = least(i + rows, end);
    const size_t first = (b * n + i) * inner, last = (b * n + i_end) * inner;
    if (!summed) sum_rows(t, finished, first, last);
    if (!sum_only) finish_rows(t, at<const T>(t.row, first), finished + first, last - first, length);
    for (size_t k_inner = 0; k_inner < inner; ++k_inner) {
      T of_rows[kMostRows] = {};
      for (size_t k = 0; k < i_end - i && !sum_only; ++k) of_rows[k] = weight(finished[first + k * inner + k_inner]);
      for (size_t k = i; k < i_end;) {
        const size_t count = i_end - k >= 8 ? 8 : i_end - k >= 4 ? 4 : 1;
        const size_t run = (b * n + k) * inner + k_inner;
        const T* weights = of_rows + (k - i);
        T *s = S + k_inner * m, *w = W + k_inner * m;
        if (count == 8) add_columns<8>(t, run * m, stride, weights, s, w);
        else if (count == 4) add_columns<4>(t, run * m, stride, weights, s, w);
        else add_columns<1>(t, run * m, stride, weights, s, w);
        k += count;
      }
    }
  }
}

// Calls visit(g, i) for every row i, with its n elements from column j on; n <= kTile.
template <class T, class Visit>
inline void visit_rows(const adafactor_tensor& t, size_t b, size_t j, size_t n, const Visit& visit) {
  const size_t m = size_t(t.columns), end = size_t(t.rows), first = b * end * m + j;
  const size_t most = n == m ? kTile / m : 1;  // whole rows lie side by side: a tile of several
  T tile[kTile];
  for (size_t i = 0; i < end; i += most) {
    const size_t rows = least(most, end - i), count = rows * n;
    prefetch(t.grad_dtype, t.grad, first + (i + kAhead * rows) * m - count, count);
    const Rows<T> piece = load_rows(t, first + i * m, m, rows, n, tile);
    for (size_t q = 0; q < rows; ++q) visit(piece.g + q * piece.stride, i + q);
  }
}

// The columns [begin, end) of a matrix, finished, and what they add to S and W of its rows. A panel of columns is read
// twice: for their sums, and when they are finished for the rows'. Panels that stay in cache between would be so narrow
// that memory likes two reads of wide ones better.
template <class T>
void measure_columns(const adafactor_tensor& t, T* finished, T* S, T* W, size_t b, size_t begin, size_t end) {
  const size_t rows = size_t(t.rows), m = size_t(t.columns);
  const T ema_weight = T(t.ema_weight), past = T(1 - t.ema_weight), eps1 = T(t.eps1);
  memset(S, 0, rows * sizeof(T));
  memset(W, 0, rows * sizeof(T));
  T weights[kTile], u[kTile];
  for (size_t j = begin; j < end; j += kTile) {
    const size_t n = least(kTile, end - j);
    const T* column = at<T>(t.column, b * m + j);
    T* ADAFACTOR_RESTRICT sums = finished + b * m + j;
    memset(sums, 0, n * sizeof(T));
    visit_rows<T>(t, b, j, n, [=](const T* g, size_t) {
      for (size_t k = 0; k < n; ++k) sums[k] += g[k] * g[k];
    });
    for (size_t k = 0; k < n; ++k) sums[k] = past * column[k] + ema_weight * (sums[k] / T(rows) + eps1);  // eq. 3
    for (size_t k = 0; k < n; ++k) weights[k] = weight(sums[k]);
    visit_rows<T>(t, b, j, n, [&, n](const T* g, size_t i) {
      for (size_t k = 0; k < n; ++k) u[k] = g[k] * weights[k];
      S[i] += sum<Square>(g, n);
      W[i] += sum<Square>(u, n);
    });
  }
}

// g^2 and u^2 = g^2/v of a tile (eq. 11); u is left in `u`, the finished second moment in `v`.
template <class T>
inline void normalise(const adafactor_tensor& t, const T* g, const T* second_moment, T* v, T* ADAFACTOR_RESTRICT u,
                      size_t n) {
  const T ema_weight = T(t.ema_weight), past = T(1 - t.ema_weight), eps1 = T(t.eps1);
  for (size_t j = 0; j < n; ++j) {
    const T finished = past * second_moment[j] + ema_weight * (g[j] * g[j] + eps1);
    const T normalised = g[j] / root(finished);
    v[j] = finished;
    u[j] = finished == 0 ? T(0) : normalised;
  }
}

template <class T>
void measure_factored(const adafactor_tensor& t, const Workspace& w, const Unit& unit) {
  const bool whole = w.parts == 1;
  for (size_t b = size_t(unit.b); b < size_t(unit.b_end); ++b) {
    const size_t place = (whole ? b : b * size_t(w.parts) + size_t(unit.part)) * sums_of_a_block(t);
    T *S = at<T>(whole ? w.S : w.partial_S, place), *W = at<T>(whole ? w.W : w.partial_W, place);
    if (!columns_first(t))
      measure_block(t, at<T>(w.finished, 0), S, W, b, size_t(unit.begin), size_t(unit.end));
    else if (unit.column < unit.column_end)
      measure_columns(t, at<T>(w.finished, 0), S, W, b, size_t(unit.column), size_t(unit.column_end));
  }
}

template <class T>
void measure_whole(const adafactor_tensor& t, const Workspace& w, const Unit& unit, size_t begin, size_t end) {
  T tile[kTile], v[kTile], u[kTile];
  double g2 = 0, u2 = 0;
  for (size_t j = begin; j < end; j += kTile) {
    const size_t n = least(kTile, end - j);
    const T* g = load(t.grad_dtype, t.grad, j, tile, n);
    normalise(t, g, at<T>(t.row, j), v, u, n);
    g2 += sum<Square>(g, n);
    u2 += sum<Square>(u, n);
  }
  w.g2[unit.index] = g2;
  w.u2[unit.index] = u2;
}

template <class T>
void measure(const adafactor_tensor& t, const Workspace& w, const Unit& unit) {
  if (t.flags & ADAFACTOR_FACTORED) {
    measure_factored<T>(t, w, unit);
    const size_t first = size_t((unit.b * t.rows + unit.begin) * t.inner);
    const size_t last = size_t(((unit.b_end - 1) * t.rows + unit.end) * t.inner);
    if (reads_x(t)) w.Q[unit.index] = sum_squares<T>(t, first, last, size_t(t.columns));  // eq. 6
  } else {
    const size_t begin = size_t(unit.b * t.columns + unit.begin), end = size_t(unit.b * t.columns + unit.end);
    measure_whole<T>(t, w, unit, begin, end);
    if (reads_x(t)) w.Q[unit.index] = sum_squares<T>(t, begin, end);
  }
}

// ---- add up the units, finish, commit ---------------------------------------------------------------------------------------

template <class T>
void add_parts(T* sums, const T* parts, size_t blocks, size_t count, size_t n) {
  for (size_t b = 0; b < blocks; ++b, sums += n) {
    memcpy(sums, parts, n * sizeof(T));
    parts += n;
    for (size_t p = 1; p < count; ++p, parts += n)
      for (size_t j = 0; j < n; ++j) sums[j] += parts[j];
  }
}

template <class T>
void combine(const adafactor_tensor& t, const Workspace& w) {
  const bool factored = t.flags & ADAFACTOR_FACTORED;
  const bool measured = reads_x(t);
  if (factored && w.parts > 1) {
    const size_t n = sums_of_a_block(t), count = size_t(w.parts);
    add_parts(at<T>(w.S, 0), at<T>(w.partial_S, 0), size_t(t.outer), count, n);
    add_parts(at<T>(w.W, 0), at<T>(w.partial_W, 0), size_t(t.outer), count, n);
  }
  for (int64_t s = 0; s < t.slices; ++s) {
    double Q = 0, g2 = 0, u2 = 0;
    for (int64_t k = s * w.units_per_slice; k < (s + 1) * w.units_per_slice; ++k) {
      if (measured) Q += w.Q[k];
      if (!factored) g2 += w.g2[k], u2 += w.u2[k];
    }
    if (measured) t.Q[s] = Q;
    if (!factored) *at<T>(w.S, size_t(s)) = T(g2), *at<T>(w.W, size_t(s)) = T(u2);
  }
}

// Of one matrix: the sum of its finished columns, and that of W / column.
struct MatrixSums {
  double columns, weighted;
};

// Finishes the m columns of a matrix (eq. 3), each of which adds up `rows` elements on all shards, and leaves them in W.
template <class T>
MatrixSums finish_columns(const adafactor_tensor& t, const T* column, const T* S, T* ADAFACTOR_RESTRICT W, size_t m,
                          T rows) {
  const T ema_weight = T(t.ema_weight), past = T(1 - t.ema_weight), eps1 = T(t.eps1);
  T c[kTile], ratios[kTile];
  MatrixSums sums = {0, 0};
  for (size_t j = 0; j < m; j += kTile) {
    const size_t n = least(kTile, m - j);
    for (size_t k = 0; k < n; ++k) c[k] = past * column[j + k] + ema_weight * (S[j + k] / rows + eps1);
    for (size_t k = 0; k < n; ++k) {
      const T ratio = W[j + k] / c[k];
      ratios[k] = c[k] == 0 ? T(0) : ratio;
    }
    sums.columns += sum<Identity>(c, n);
    sums.weighted += sum<Identity>(ratios, n);
    memcpy(W + j, c, n * sizeof(T));
  }
  return sums;
}

template <class T>
double total(const T* x, size_t count) {
  double s = 0;
  for (size_t j = 0; j < count; j += kTile) s += sum<Identity>(x + j, least(kTile, count - j));
  return s;
}

// max(eps2, RMS(x)), eq. 9; NaN stays NaN.
double parameter_scale(const adafactor_tensor& t, double Q) {
  double scale = root(Q / double(t.global_size));
  if (t.flags & ADAFACTOR_SCALE_AFTER_DECAY) scale *= t.decay_factor < 0 ? -t.decay_factor : t.decay_factor;
  return scale <= t.eps2 ? t.eps2 : scale;
}

template <class T>
bool finish(const adafactor_tensor& t, const Workspace& w) {
  const bool factored = t.flags & ADAFACTOR_FACTORED, totals = t.flags & ADAFACTOR_TOTALS;
  const size_t sums = factored ? size_t(t.outer) * sums_of_a_block(t) : size_t(t.slices);
  T *S = at<T>(w.S, 0), *W = at<T>(w.W, 0);
  if ((t.flags & ADAFACTOR_SKIP_NONFINITE) && !(t.flags & ADAFACTOR_MATRIX_SUMS)) {
    // A gradient that is not finite shows in its sums: no pass over it just to look.
    bool whole = finite(total(S, sums)) && finite(total(W, sums));
    for (int64_t s = 0; totals && s < t.slices; ++s) whole = whole && finite(t.u2[s]);
    for (int64_t s = 0; !whole && t.diagnostics && s < t.slices; ++s) t.diagnostics[4 * s + 3] += 1;
    if (!whole) return false;
  }

  const T* statistic = at<const T>(columns_first(t) ? t.row : t.column, 0);
  const size_t m = size_t(columns_first(t) ? t.rows : t.columns);
  const double global_m = double(columns_first(t) ? t.global_rows : t.global_columns);
  const T divisor = T(columns_first(t) ? t.global_columns : t.global_rows);
  const size_t matrices = factored ? size_t(t.outer / t.slices) * size_t(t.inner) : 0;
  for (int64_t s = 0; s < t.slices; ++s) {
    double u2 = 0;
    for (size_t k = size_t(s) * matrices; k < size_t(s + 1) * matrices; ++k) {
      double mu = 0;  // equals the mean of the rows
      if (totals) {
        mu = t.mu[k];
      } else {
        const MatrixSums found = finish_columns(t, statistic + k * m, S + k * m, W + k * m, m, divisor);
        if (t.matrix_sums) t.matrix_sums[2 * k] = found.columns, t.matrix_sums[2 * k + 1] = found.weighted;
        mu = found.columns / global_m;
        u2 += mu * found.weighted;  // eq. 7
      }
      if (t.flags & ADAFACTOR_MATRIX_SUMS) continue;
      const T root_mu = T(root(mu));
      for (size_t j = k * m; j < (k + 1) * m; ++j) S[j] = root_mu * inverse_root(W[j]);
    }
    if (t.flags & ADAFACTOR_MATRIX_SUMS) continue;
    if (totals) u2 = t.u2[s];
    else if (!factored) u2 = double(W[s]);
    const double N = double(t.global_size);
    const double rms_u = root(u2 / N), excess = rms_u / t.clip;
    const double clip = !finite(t.clip) || excess <= 1 ? 1 : excess;  // eq. 10; NaN stays NaN
    const double scale = (t.flags & ADAFACTOR_SCALE_PARAMETER) ? parameter_scale(t, t.Q[s]) : 1;
    w.step_size[2 * s] = t.rho * scale;
    w.step_size[2 * s + 1] = 1 / clip;
    if (double* d = t.diagnostics ? t.diagnostics + 4 * s : nullptr) d[0] = rms_u, d[1] = clip, d[2] = scale;
  }
  return true;
}

// The statistics that finish has left in W and measure in `finished`; apply commits the rows as it goes.
template <class T>
void commit(const adafactor_tensor& t, const Workspace& w) {
  if (!(t.flags & ADAFACTOR_FACTORED)) return;
  memcpy(columns_first(t) ? t.row : t.column, w.W, size_t(t.outer) * sums_of_a_block(t) * sizeof(T));
  if (!columns_first(t)) return;
  T* finished = at<T>(w.finished, 0);  // apply wants them ready to multiply by: row by row, they would be made n times
  for (size_t j = 0; j < size_t(t.outer * t.columns); ++j) {
    *at<T>(t.column, j) = finished[j];
    finished[j] = inverse_root(finished[j]);
  }
}

// ---- apply ----------------------------------------------------------------------------------------------------

// The scalars of one slice. Without momentum `normalised` holds alpha, with momentum (1 - beta1), beside the clip.
template <class T>
struct Step {
  T normalised, decay_factor, beta1, alpha;
  Step(const adafactor_tensor& t, const Workspace& w, int64_t slice) {
    const double sign = (t.flags & ADAFACTOR_MAXIMIZE) ? -1 : 1;
    const double step_size = w.step_size[2 * slice], inverse_clip = w.step_size[2 * slice + 1];
    normalised = T(sign * inverse_clip * (t.momentum ? 1 - t.beta1 : step_size));
    decay_factor = T(t.decay_factor);
    beta1 = T(t.beta1);
    alpha = T(step_size);
  }
};

// x -= a * g * c (eq. 13), where a holds everything but the columns. `moved` may be x, or g.
template <class T>
inline void descend(const T* g, const T* c, T a, T decay_factor, const T* x, T* moved, size_t n) {
  ADAFACTOR_INDEPENDENT
  for (size_t j = 0; j < n; ++j) moved[j] = decay_factor * x[j] - g[j] * a * c[j];
}

// The same for the multiples of 4 * kLanes in n, adding the new x^2 to `s` as `Lanes` would; returns how many they are.
template <class T>
inline size_t descend_lanes(const T* g, const T* c, T a, T decay_factor, const T* x, T* moved, size_t n,
                            T (&s)[4][kLanes]) {
  size_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
    for (size_t k = 0; k < 4 * kLanes * sizeof(T); k += 64) {
      ask(reinterpret_cast<const char*>(g + j + kTile) + k);
      ask(reinterpret_cast<const char*>(x + j + kTile) + k);
    }
    for (size_t q = 0; q < 4; ++q) {
      ADAFACTOR_INDEPENDENT
      for (size_t k = 0; k < kLanes; ++k) {
        const size_t i = j + q * kLanes + k;
        const T value = decay_factor * x[i] - g[i] * a * c[i];
        moved[i] = value;
        s[q][k] += value * value;
      }
    }
  }
  return j;
}

// The same, and the sum of the new x^2 as `sum<Square>` finds it, without a second look at x.
template <class T>
inline T descend_squares(const T* g, const T* c, T a, T decay_factor, const T* x, T* moved, size_t n) {
  if (n < kLanes) {
    descend(g, c, a, decay_factor, x, moved, n);
    return sum<Square>(moved, n);
  }
  Lanes<T> squares;
  T s[4][kLanes] = {};
  const size_t j = descend_lanes(g, c, a, decay_factor, x, moved, n, s);
  memcpy(squares.group, s, sizeof(s));
  descend(g + j, c + j, a, decay_factor, x + j, moved + j, n - j);
  squares.template add<Square>(moved + j, n - j);
  return squares.total();
}

// eq. 12, then eq. 13.
template <class T>
inline void descend_momentum(const T* u, const Step<T>& step, const T* momentum, T* new_momentum, const T* x, T* moved,
                             size_t n) {
  ADAFACTOR_INDEPENDENT
  for (size_t j = 0; j < n; ++j) {
    const T average = step.beta1 * momentum[j] + u[j];
    new_momentum[j] = average;
    moved[j] = step.decay_factor * x[j] - step.alpha * average;
  }
}

// Where apply leaves x and momentum.
inline void* target_of(const adafactor_tensor& t) { return t.target ? t.target : t.param; }
inline void* momentum_target_of(const adafactor_tensor& t) {
  return t.momentum_target ? t.momentum_target : t.momentum;
}

// One tile of x and of momentum as the loops above take them, and where they leave what `finish` writes back.
template <class T>
struct Target {
  const adafactor_tensor& t;
  size_t first, n;
  bool stochastic;
  T x_tile[kTile], momentum_tile[kTile], residual_tile[kTile];
  const T *x, *momentum;
  T *moved, *new_momentum;
  double before = 0;  // sum of the x^2 that is there

  Target(const adafactor_tensor& tensor, size_t first_element, size_t count)
      : t(tensor), first(first_element), n(count) {
    const bool half = t.param_dtype == ADAFACTOR_BFLOAT16 || t.param_dtype == ADAFACTOR_FLOAT16;
    stochastic = half && (t.flags & ADAFACTOR_STOCHASTIC_ROUNDING);
    x = load(t.param_dtype, t.param, first, x_tile, n);
    if (t.flags & ADAFACTOR_Q_KNOWN) before = double(sum<Square>(x, n));
    moved = room(t.param_dtype, target_of(t), first, x_tile);
    if (t.residual) {
      const T* residual = load(ADAFACTOR_BFLOAT16, t.residual, first, residual_tile, n);
      for (size_t k = 0; k < n; ++k) x_tile[k] += residual[k];  // x, which is not of T
    }
    momentum = t.momentum ? load(t.momentum_dtype, t.momentum, first, momentum_tile, n) : nullptr;
    new_momentum = t.momentum ? room(t.momentum_dtype, momentum_target_of(t), first, momentum_tile) : nullptr;
  }

  // Rounds a part of the tile whose elements have the indices index, index + 1, ... in the whole parameter.
  void round(size_t offset, size_t count, uint64_t index) {
    narrow_stochastic(t, moved + offset, target_of(t), first + offset, count, index);
  }

  // What rounding has cut off x; of what is not finite nothing is left.
  void keep_rest() {
    const T* stored = load(t.param_dtype, target_of(t), first, residual_tile, n);
    for (size_t k = 0; k < n; ++k) {
      const T rest = moved[k] - stored[k];
      moved[k] = stored[k] - stored[k] == 0 ? rest : T(0);
    }
    close(ADAFACTOR_BFLOAT16, moved, t.residual, first, n);
  }

  double finish() {
    if (!stochastic) close(t.param_dtype, moved, target_of(t), first, n);
    if (momentum) close(t.momentum_dtype, new_momentum, momentum_target_of(t), first, n);
    if (t.residual) keep_rest();
    if (!(t.flags & ADAFACTOR_SCALE_PARAMETER)) return 0;
    return double(sum<Square>(load(t.param_dtype, target_of(t), first, x_tile, n), n));  // as stored
  }
};

// Walks over the runs of x[outer][rows][inner][columns]; `columns` is where the run's columns start.
struct Cursor {
  size_t n, inner, m, i, k_inner, block;
  void next() {
    if (++k_inner < inner) return;
    k_inner = 0;
    if (++i < n) return;
    i = 0;
    block += inner * m;
  }
  size_t columns() const { return block + k_inner * m; }
};

// Index of an element in the whole parameter, of which this may be a shard.
inline uint64_t global_index(const adafactor_tensor& t, uint64_t run, uint64_t column) {
  const uint64_t n = uint64_t(t.rows), inner = uint64_t(t.inner), b = run / (n * inner);
  run += (b * (uint64_t(t.global_rows) - n) + uint64_t(t.row_offset)) * inner;
  return run * uint64_t(t.global_columns) + uint64_t(t.column_offset) + column;
}

// Sums of x^2, after the step and as it was found.
struct Squares {
  double after = 0, before = 0;
};

template <class T>
Squares apply_factored(const adafactor_tensor& t, const Workspace& w, const Unit& unit) {
  const size_t n = size_t(t.rows), m = size_t(t.columns), inner = size_t(t.inner);
  const Step<T> step(t, w, unit.slice);
  // Where columns come first, commit has done both sides: the rows are in S and the columns in finished.
  const bool turned = columns_first(t);
  const T *finished = at<T>(turned ? w.S : w.finished, 0), *scaled = at<T>(turned ? w.finished : w.S, 0);
  T* row = at<T>(t.row, 0);
  const auto factor = [turned, finished, row, &step](size_t r) {
    if (turned) return finished[r] * step.normalised;
    row[r] = finished[r];
    return inverse_root(finished[r]) * step.normalised;
  };
  T tile[kTile], u[kTile];
  Squares Q;
  const bool known = t.flags & ADAFACTOR_Q_KNOWN;
  // Nothing to convert and no momentum: one look at everything. The squares of several rows are one sum only where
  // every row fills its lanes.
  const bool plain = t.param_dtype == Own<T>::dtype && t.grad_dtype == Own<T>::dtype && !t.momentum &&
                     (m > kTile / 2 || m % (4 * kLanes) == 0);

  const size_t first = (size_t(unit.b) * n + size_t(unit.begin)) * inner;
  const size_t last = (size_t(unit.b_end - 1) * n + size_t(unit.end)) * inner;
  Cursor cursor = {n, inner, m, size_t(unit.begin), 0, size_t(unit.b) * inner * m};
  for (size_t r = first; r < last;) {
    const size_t runs = runs_of_a_tile(m, last - r);
    if (plain && runs > 1) {  // short rows, the squares of which are one sum
      const T *x = at<T>(t.param, r * m), *g = static_cast<const T*>(t.grad) + r * m;
      T* moved = at<T>(target_of(t), r * m);
      Lanes<T> squares;
      T s[4][kLanes] = {};
      if (known) Q.before += double(sum<Square>(x, runs * m));
      for (size_t q = 0; q < runs; ++q, cursor.next())
        descend_lanes(g + q * m, scaled + cursor.columns(), factor(r + q), step.decay_factor, x + q * m, moved + q * m,
                      m, s);
      memcpy(squares.group, s, sizeof(s));
      Q.after += double(squares.total());
      r += runs;
      continue;
    }
    if (plain) {
      const T a = factor(r);
      const T* c = scaled + cursor.columns();
      for (size_t j = 0; j < m; j += kTile) {
        const size_t count = least(kTile, m - j);
        const T* x = at<T>(t.param, r * m + j);
        const T* g = static_cast<const T*>(t.grad) + r * m + j;
        if (known) Q.before += double(sum<Square>(x, count));
        Q.after += double(descend_squares(g, c + j, a, step.decay_factor, x, at<T>(target_of(t), r * m + j), count));
      }
      cursor.next();
      ++r;
      continue;
    }
    const Cursor start = cursor;
    for (size_t j = 0; j < m; j += kTile) {
      const size_t count = least(kTile, m - j);
      const T* g = load(t.grad_dtype, t.grad, r * m + j, tile, runs * count);
      Target<T> target(t, r * m + j, runs * count);
      cursor = start;
      for (size_t q = 0; q < runs; ++q, cursor.next()) {
        const T a = factor(r + q);
        const T *c = scaled + cursor.columns() + j, *h = g + q * count;
        if (target.momentum) {
          for (size_t k = 0; k < count; ++k) u[q * count + k] = h[k] * a * c[k];
        } else {
          descend(h, c, a, step.decay_factor, target.x + q * count, target.moved + q * count, count);
        }
      }
      if (target.momentum)
        descend_momentum(u, step, target.momentum, target.new_momentum, target.x, target.moved, runs * count);
      if (target.stochastic)
        for (size_t q = 0; q < runs; ++q) target.round(q * count, count, global_index(t, r + q, j));
      Q.before += target.before;
      Q.after += target.finish();
    }
    r += runs;
  }
  return Q;
}

template <class T>
Squares apply_whole(const adafactor_tensor& t, const Workspace& w, const Unit& unit) {
  const size_t m = size_t(t.columns);
  const Step<T> step(t, w, unit.slice);
  T tile[kTile], u[kTile];
  Squares Q;
  for (size_t j = size_t(unit.begin); j < size_t(unit.end); j += kTile) {
    const size_t n = least(kTile, size_t(unit.end) - j), start = size_t(unit.b) * m + j;
    const T* g = load(t.grad_dtype, t.grad, start, tile, n);
    T* v = at<T>(t.row, start);
    Target<T> target(t, start, n);
    normalise(t, g, v, v, u, n);
    for (size_t k = 0; k < n; ++k) u[k] *= step.normalised;
    if (target.momentum) {
      descend_momentum(u, step, target.momentum, target.new_momentum, target.x, target.moved, n);
    } else {
      const T* x = target.x;
      T* moved = target.moved;
      ADAFACTOR_INDEPENDENT
      for (size_t k = 0; k < n; ++k) moved[k] = step.decay_factor * x[k] - u[k];
    }
    if (target.stochastic) target.round(0, n, global_index(t, uint64_t(unit.b), j));
    Q.before += target.before;
    Q.after += target.finish();
  }
  return Q;
}

template <class T>
void apply(const adafactor_tensor& t, const Workspace& w, const Unit& unit) {
  const Squares Q = (t.flags & ADAFACTOR_FACTORED) ? apply_factored<T>(t, w, unit) : apply_whole<T>(t, w, unit);
  if (t.flags & ADAFACTOR_SCALE_PARAMETER) w.Q[unit.index] = Q.after, w.Q_found[unit.index] = Q.before;
}

}  // namespace

extern const adafactor::Kernels kernels[2];
const adafactor::Kernels kernels[2] = {  // of float and of double
    {measure<float>, combine<float>, finish<float>, commit<float>, apply<float>, parameter_scale},
    {measure<double>, combine<double>, finish<double>, commit<double>, apply<double>, parameter_scale},
};

}  // namespace ADAFACTOR_NS
