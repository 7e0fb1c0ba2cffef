// combine adds what the units measured, finish is eqs. 3, 7, 9 and 10, commit writes the statistics.
#ifndef ADAFACTOR_FINISH_H
#define ADAFACTOR_FINISH_H

#include "tensor.h"

namespace ADAFACTOR_NS {
namespace {

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
        const MatrixSums matrix = finish_columns(t, statistic + k * m, S + k * m, W + k * m, m, divisor);
        if (t.matrix_sums) t.matrix_sums[2 * k] = matrix.columns, t.matrix_sums[2 * k + 1] = matrix.weighted;
        mu = matrix.columns / global_m;
        u2 += mu * matrix.weighted;  // eq. 7
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

}  // namespace
}  // namespace ADAFACTOR_NS
#endif
