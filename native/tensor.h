// What measure, finish and apply ask of one tensor.
#ifndef ADAFACTOR_TENSOR_H
#define ADAFACTOR_TENSOR_H

#include "kernels.h"
#include "storage.h"
#include "sums.h"

namespace ADAFACTOR_NS {
namespace {

using adafactor::Unit;
using adafactor::Workspace;

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

// Adds x^2 over [begin, end), in the tiles of `apply`: its sums of the new x and the sums found here in the next update
// have the same bits, so it does not matter which of them a step uses.
template <class T>
void add_squares(const adafactor_tensor& t, size_t begin, size_t end, double& total) {
  T tile[kTile];
  for (size_t j = begin; j < end; j += kTile) {
    const size_t n = least(kTile, end - j);
    total += double(sum<Square>(load(t.param_dtype, t.param, j, tile, n), n));
  }
}

// The same over runs [first, last) of m elements, whose tiles begin anew with every run that is as long as one.
template <class T>
double sum_squares(const adafactor_tensor& t, size_t first, size_t last, size_t m) {
  double total = 0;
  for (size_t r = first; r < last;) {
    const size_t runs = runs_of_a_tile(m, last - r);
    add_squares<T>(t, r * m, (r + runs) * m, total);
    r += runs;
  }
  return total;
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

}  // namespace
}  // namespace ADAFACTOR_NS
#endif
