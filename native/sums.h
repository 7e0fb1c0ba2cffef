// Sums in a fixed order: sixteen lanes, then a fixed tree, whatever the width of the processor's registers.
#ifndef ADAFACTOR_SUMS_H
#define ADAFACTOR_SUMS_H

#include <stddef.h>

#if defined(__GNUC__)
#define ADAFACTOR_RESTRICT __restrict__
#elif defined(_MSC_VER)
#define ADAFACTOR_RESTRICT __restrict
#else
#define ADAFACTOR_RESTRICT
#endif

#if !defined(__GNUC__)
#include <math.h>
#endif

namespace ADAFACTOR_NS {
namespace {

const size_t kLanes = 16;

// The compilers' own names: std::sqrt is an inline function, which the linker may merge over instruction sets.
#if defined(__GNUC__)
inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }
#else
inline float root(float x) { return sqrtf(x); }
inline double root(double x) { return sqrt(x); }
#endif

// v^(-1/2), and 0 where v is 0: where a statistic is 0, so is every gradient behind it.
template <class T>
inline T inverse_root(T v) {
  const T r = T(1) / root(v);
  return v == 0 ? T(0) : r;
}

template <class T>
inline T tree(const T* lanes) {
  T a[8], b[4];
  for (size_t k = 0; k < 8; ++k) a[k] = lanes[k] + lanes[k + 8];
  for (size_t k = 0; k < 4; ++k) b[k] = a[k] + a[k + 4];
  return (b[0] + b[2]) + (b[1] + b[3]);
}

struct Identity {
  template <class T>
  static T of(T x) {
    return x;
  }
};

struct Square {
  template <class T>
  static T of(T x) {
    return x * x;
  }
};

template <class F, class T>
inline void add_lanes(T* sums, const T* x, size_t n) {
  T lanes[kLanes];
  for (size_t k = 0; k < kLanes; ++k) lanes[k] = sums[k];
  size_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (size_t k = 0; k < kLanes; ++k) lanes[k] += F::of(x[j + k]);
  for (size_t k = 0; k < kLanes; ++k) sums[k] = lanes[k];
  for (size_t k = 0; j + k < n; ++k) sums[k] += F::of(x[j + k]);
}

template <class F, class T>
inline T sum(const T* x, size_t n) {
  if (n < kLanes) {
    T s = 0;
    for (size_t j = 0; j < n; ++j) s += F::of(x[j]);
    return s;
  }
  T lanes[kLanes] = {};
  add_lanes<F>(lanes, x, n);
  return tree(lanes);
}

}  // namespace
}  // namespace ADAFACTOR_NS
#endif
