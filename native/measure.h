// measure: one read of g, and of x where the sum of its squares is not known (eqs. 2, 4 to 6, 11).
#ifndef ADAFACTOR_MEASURE_H
#define ADAFACTOR_MEASURE_H

#include "tensor.h"

namespace ADAFACTOR_NS {
namespace {

const size_t kColumns = 512;            // columns that eight rows visit while they are in the first-level cache
const size_t kBlockBytes = 192 * 1024;  // of gradient between its first and its second look: second-level cache
const size_t kMostRows = 64;            // of a block
const size_t kAhead = 2;                // rows between the one at hand and the one asked for, where columns come first
const size_t kStreams = 8;              // rows that are read side by side: memory answers several streams sooner than one
const size_t kPiece = 128;              // of each in turn

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

template <class T>
void measure_factored(const adafactor_tensor& t, const Workspace& w, const Unit& unit) {
  const bool whole = w.parts == 1;
  for (size_t b = size_t(unit.b); b < size_t(unit.b_end); ++b) {
    const size_t offset = (whole ? b : b * size_t(w.parts) + size_t(unit.part)) * sums_of_a_block(t);
    T *S = at<T>(whole ? w.S : w.partial_S, offset), *W = at<T>(whole ? w.W : w.partial_W, offset);
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
    if (reads_x(t)) add_squares<T>(t, begin, end, w.Q[unit.index] = 0);
  }
}

}  // namespace
}  // namespace ADAFACTOR_NS
#endif
