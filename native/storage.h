// Storage types: how a tile of numbers moves between memory and the float (or double) loops. Nowhere else in the
// kernels does a storage type appear, nor an intrinsic.
//
// A tile whose storage is T itself is worked on in place. Every conversion gives the same bits on every processor.
#ifndef ADAFACTOR_STORAGE_H
#define ADAFACTOR_STORAGE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "adafactor.h"
#include "random.h"
#include "sums.h"

#if defined(__F16C__) || (defined(_MSC_VER) && defined(__AVX2__))
#include <immintrin.h>
#define ADAFACTOR_F16C 1
#endif

namespace ADAFACTOR_NS {
namespace {

const size_t kTile = 1024;  // numbers per tile: a few tiles of doubles stay in a 32 KB first-level cache

inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

const uint32_t kInfinity = 0x7f800000u;

// condition ? a : b without a branch, which would keep the loop around it from being vectorised.
inline uint32_t choose(bool condition, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - uint32_t(condition);
  return (a & mask) | (b & ~mask);
}

// ---- one number -----------------------------------------------------------------------------------------------

inline float widen_bfloat16(uint16_t h) { return float_of(uint32_t(h) << 16); }

inline uint16_t narrow_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t nearest = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // ties to even
  const uint32_t nan = (u >> 16) | 0x40u;
  return uint16_t((u & 0x7fffffffu) > kInfinity ? nan : nearest);
}

// Adds a random number below one unit in the last place, then cuts: up with the probability of the cut-off part.
// Finite numbers stay finite.
inline uint16_t stochastic_bfloat16(float x, uint32_t random) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffffu;
  uint32_t sum = magnitude + (random >> 16);
  const uint32_t largest = 0x7f7fffffu;
  sum = magnitude < kInfinity && sum > largest ? largest : sum;
  sum = magnitude > kInfinity ? magnitude | 0x400000u : sum;
  return uint16_t((sum | (u & 0x80000000u)) >> 16);
}

inline float widen_float16(uint16_t h) {
  const uint32_t magnitude = uint32_t(h & 0x7fffu) << 13, sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t normal = magnitude + (112u << 23);
  const float tiny = float_of(magnitude + (113u << 23)) - float_of(113u << 23);  // subnormal: exact
  uint32_t u = magnitude < (1u << 23) ? bits_of(tiny) : normal;
  const uint32_t special = (magnitude + (224u << 23)) | (magnitude > (31u << 23) ? 0x400000u : 0u);
  u = magnitude >= (31u << 23) ? special : u;
  return float_of(u | sign);
}

inline uint16_t narrow_float16(float x) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t tiny = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // 0.5 has float16's least step
  uint32_t h = magnitude < 0x38800000u ? tiny : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;  // from 65520 on: infinity
  h = magnitude > kInfinity ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : h;
  return uint16_t(h | ((u >> 16) & 0x8000u));
}

inline uint16_t stochastic_float16(float x, uint32_t random) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffffu;
  const uint32_t r = random >> 19;
  const uint32_t normal = (magnitude + r - (112u << 23)) >> 13;
  // Subnormal steps are 2^-24: count them in fixed point, 13 bits behind the point. Bounded, so that the conversion
  // is always in range.
  const uint32_t least_normal = 0x38800000u, bounded = choose(magnitude < least_normal, magnitude, least_normal);
  const int32_t steps = int32_t(float_of(bounded) * 137438953472.0f);  // 2^37
  uint32_t h = choose(magnitude < least_normal, (uint32_t(steps) + r) >> 13, normal);
  h = choose(magnitude >= 0x477fe000u, 0x7bffu, h);  // from 65504 on: the largest finite number
  h = choose(magnitude == kInfinity, 0x7c00u, h);
  h = choose(magnitude > kInfinity, 0x7e00u | ((magnitude >> 13) & 0x3ffu), h);
  return uint16_t(h | ((u >> 16) & 0x8000u));
}

// ---- one tile -------------------------------------------------------------------------------------------------

inline void widen_float16(const uint16_t* in, float* out, size_t n) {
  size_t j = 0;
#ifdef ADAFACTOR_F16C
  for (; j + 8 <= n; j += 8)
    _mm256_storeu_ps(out + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + j))));
#endif
  for (; j < n; ++j) out[j] = widen_float16(in[j]);
}

inline void narrow_float16(const float* in, uint16_t* out, size_t n) {
  size_t j = 0;
#ifdef ADAFACTOR_F16C
  for (; j + 8 <= n; j += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + j), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; j < n; ++j) out[j] = narrow_float16(in[j]);
}

template <class T>
struct Own;
template <>
struct Own<float> {
  static const int64_t dtype = ADAFACTOR_FLOAT32;
};
template <>
struct Own<double> {
  static const int64_t dtype = ADAFACTOR_FLOAT64;
};

template <class To, class From>
inline void convert(const From* in, To* out, size_t n) {
  for (size_t j = 0; j < n; ++j) out[j] = To(in[j]);
}

ADAFACTOR_CALLED void widen(int64_t dtype, const void* memory, size_t at, float* tile, size_t n) {
  switch (dtype) {
    case ADAFACTOR_BFLOAT16: {
      const uint16_t* in = static_cast<const uint16_t*>(memory) + at;
      for (size_t j = 0; j < n; ++j) tile[j] = widen_bfloat16(in[j]);
      break;
    }
    case ADAFACTOR_FLOAT16: widen_float16(static_cast<const uint16_t*>(memory) + at, tile, n); break;
    case ADAFACTOR_FLOAT64: convert(static_cast<const double*>(memory) + at, tile, n); break;
    default: convert(static_cast<const float*>(memory) + at, tile, n); break;
  }
}

ADAFACTOR_CALLED void widen(int64_t dtype, const void* memory, size_t at, double* tile, size_t n) {
  if (dtype == ADAFACTOR_FLOAT64) return convert(static_cast<const double*>(memory) + at, tile, n);
  float single[kTile];
  widen(dtype, memory, at, single, n);
  convert(single, tile, n);
}

ADAFACTOR_CALLED void narrow(int64_t dtype, const float* tile, void* memory, size_t at, size_t n) {
  switch (dtype) {
    case ADAFACTOR_BFLOAT16: {
      uint16_t* out = static_cast<uint16_t*>(memory) + at;
      for (size_t j = 0; j < n; ++j) out[j] = narrow_bfloat16(tile[j]);
      break;
    }
    case ADAFACTOR_FLOAT16: narrow_float16(tile, static_cast<uint16_t*>(memory) + at, n); break;
    case ADAFACTOR_FLOAT64: convert(tile, static_cast<double*>(memory) + at, n); break;
    default: convert(tile, static_cast<float*>(memory) + at, n); break;
  }
}

ADAFACTOR_CALLED void narrow(int64_t dtype, const double* tile, void* memory, size_t at, size_t n) {
  if (dtype == ADAFACTOR_FLOAT64) return convert(tile, static_cast<double*>(memory) + at, n);
  float single[kTile];
  convert(tile, single, n);
  narrow(dtype, single, memory, at, n);
}

// Elements whose global indices are index, index + 1, ...
ADAFACTOR_CALLED void narrow_stochastic(const adafactor_tensor& t, const float* tile, void* memory, size_t at, size_t n,
                                        uint64_t index) {
  uint16_t* out = static_cast<uint16_t*>(memory) + at;
  const uint64_t left = (uint64_t(1) << 32) - uint32_t(index);  // elements until the lower half of the index wraps
  if (n > left) {
    narrow_stochastic(t, tile + left, memory, at + size_t(left), n - size_t(left), index + left);
    n = size_t(left);
  }
  const Key key = make_key(t.seed, t.step, t.rng_stream, index);
  const uint32_t low = uint32_t(index);
  if (t.param_dtype == ADAFACTOR_BFLOAT16) {
    for (size_t j = 0; j < n; ++j) out[j] = stochastic_bfloat16(tile[j], random_bits(low + uint32_t(j), key));
  } else {
    for (size_t j = 0; j < n; ++j) out[j] = stochastic_float16(tile[j], random_bits(low + uint32_t(j), key));
  }
}

inline void narrow_stochastic(const adafactor_tensor&, const double*, void*, size_t, size_t, uint64_t) {}  // has no double

// Asks for the tile after this one: while a tile is converted and worked on, nothing else is read from memory.
inline void prefetch(int64_t dtype, const void* memory, size_t at, size_t n) {
#if defined(__GNUC__)
  const size_t size = dtype == ADAFACTOR_FLOAT64 ? 8 : dtype == ADAFACTOR_FLOAT32 ? 4 : 2;
  const char* next = static_cast<const char*>(memory) + (at + n) * size;
  for (size_t k = 0; k < n * size; k += 64) ask(next + k);
#else
  (void)dtype, (void)memory, (void)at, (void)n;
#endif
}

// The tile at `at`, in place if its storage is T, else a copy in `tile`.
template <class T>
inline const T* load(int64_t dtype, const void* memory, size_t at, T* tile, size_t n) {
  prefetch(dtype, memory, at, n);
  if (dtype == Own<T>::dtype) return static_cast<const T*>(memory) + at;
  widen(dtype, memory, at, tile, n);
  return tile;
}

// Where a tile is made that belongs at `at`: there if its storage is T, else in `tile`.
template <class T>
inline T* room(int64_t dtype, void* memory, size_t at, T* tile) {
  return dtype == Own<T>::dtype ? static_cast<T*>(memory) + at : tile;
}

// Writes back what was made in `room`.
template <class T>
inline void close(int64_t dtype, const T* tile, void* memory, size_t at, size_t n) {
  if (dtype != Own<T>::dtype) narrow(dtype, tile, memory, at, n);
}

}  // namespace
}  // namespace ADAFACTOR_NS
#endif
