// Sums in a fixed order: four groups of sixteen lanes, then a fixed tree, whatever the width of the processor's
// registers. Four groups, because one would make every addition wait for the one before it.
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

// Not copied into every loop that needs it: a tile takes far longer than a call.
#if defined(__GNUC__)
#define ADAFACTOR_CALLED __attribute__((noinline))
#else
#define ADAFACTOR_CALLED __declspec(noinline)
#endif

namespace ADAFACTOR_NS {
namespace {

const size_t kLanes = 16;

// Before a loop whose turns do not read what another turn writes, whatever its pointers say.
#if defined(__clang__)
#define ADAFACTOR_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define ADAFACTOR_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define ADAFACTOR_INDEPENDENT __pragma(loop(ivdep))
#else
#define ADAFACTOR_INDEPENDENT
#endif

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

// Asks for memory that is wanted soon; beyond the end of a buffer it asks in vain.
inline void ask(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

// Adds f(x) of n elements to four groups of lanes.
template <class F, class T>
inline void add_lanes(const T* x, size_t n, T* a, T* b, T* c, T* d) {
  size_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
    for (size_t k = 0; k < kLanes; ++k) a[k] += F::of(x[j + k]);
    for (size_t k = 0; k < kLanes; ++k) b[k] += F::of(x[j + kLanes + k]);
    for (size_t k = 0; k < kLanes; ++k) c[k] += F::of(x[j + 2 * kLanes + k]);
    for (size_t k = 0; k < kLanes; ++k) d[k] += F::of(x[j + 3 * kLanes + k]);
  }
  for (; j + kLanes <= n; j += kLanes)
    for (size_t k = 0; k < kLanes; ++k) a[k] += F::of(x[j + k]);
  if (j == n) return;
  T rest[kLanes] = {};  // an index that is not constant would take `a` out of its register
  for (size_t k = 0; j + k < n; ++k) rest[k] = F::of(x[j + k]);
  for (size_t k = 0; k < kLanes; ++k) a[k] += rest[k];
}

template <class T>
inline T total_of_lanes(const T* a, const T* b, const T* c, const T* d) {
  T sums[kLanes];
  for (size_t k = 0; k < kLanes; ++k) sums[k] = (a[k] + b[k]) + (c[k] + d[k]);
  return tree(sums);
}

template <class T>
struct Lanes {
  T group[4][kLanes] = {};

  // Adds f(x) of n elements. The sum of several calls is that of one, if all but the last have multiples of 64.
  template <class F>
  void add(const T* x, size_t n) {
    T a[kLanes], b[kLanes], c[kLanes], d[kLanes];
    for (size_t k = 0; k < kLanes; ++k) a[k] = group[0][k], b[k] = group[1][k], c[k] = group[2][k], d[k] = group[3][k];
    add_lanes<F>(x, n, a, b, c, d);
    for (size_t k = 0; k < kLanes; ++k) group[0][k] = a[k], group[1][k] = b[k], group[2][k] = c[k], group[3][k] = d[k];
  }

  T total() const { return total_of_lanes(group[0], group[1], group[2], group[3]); }
};

// What `Lanes` finds of one call, in registers. Called, not copied into the loops around it, where compilers lose them.
template <class F, class T>
ADAFACTOR_CALLED T sum(const T* x, size_t n) {
  if (n < kLanes) {
    T s = 0;
    for (size_t j = 0; j < n; ++j) s += F::of(x[j]);
    return s;
  }
  T a[kLanes] = {}, b[kLanes] = {}, c[kLanes] = {}, d[kLanes] = {};
  add_lanes<F>(x, n, a, b, c, d);
  return total_of_lanes(a, b, c, d);
}

}  // namespace
}  // namespace ADAFACTOR_NS
#endif
