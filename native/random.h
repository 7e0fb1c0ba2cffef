// The random numbers of stochastic rounding: a hash of the seed, the update, the tensor and the element.
//
// They depend on nothing else, so any split over threads or devices rounds alike, and they need only 32-bit add,
// multiply, xor and shift, so every backend can make the same ones. For element e of tensor `rng_stream` (e counts
// in memory order over the whole parameter, e = ((b*global_rows + i)*inner + k_inner)*global_columns + j):
//
//     k0 = absorb(seed low, seed high, step, rng_stream, e high)      k1 = mix(k0 ^ 0x85ebca6b)
//     h  = e low + k0;  h ^= h >> 16;  h *= 0x7feb352d;  h ^= (h >> 15) ^ k1;  h *= 0x846ca68b;  h ^= h >> 16
//
// bfloat16 uses the upper 16 bits of h, float16 the upper 13. Constants: Chris Wellons' lowbias32.
// adafactor/core/rounding.py is the same in NumPy.
#ifndef ADAFACTOR_RANDOM_H
#define ADAFACTOR_RANDOM_H

#include <stdint.h>

namespace ADAFACTOR_NS {
namespace {

inline uint32_t mix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  return h ^ (h >> 16);
}

struct Key {
  uint32_t k0, k1;
};

inline Key make_key(uint64_t seed, uint64_t step, uint64_t rng_stream, uint64_t index) {
  const uint32_t words[5] = {uint32_t(seed), uint32_t(seed >> 32), uint32_t(step), uint32_t(rng_stream),
                             uint32_t(index >> 32)};
  uint32_t k = 0;
  for (uint32_t word : words) k = mix(k ^ word) + 0x9e3779b9u;
  return {k, mix(k ^ 0x85ebca6bu)};
}

inline uint32_t random_bits(uint32_t low, Key key) {
  uint32_t h = low + key.k0;
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= (h >> 15) ^ key.k1;
  h *= 0x846ca68bu;
  return h ^ (h >> 16);
}

}  // namespace
}  // namespace ADAFACTOR_NS
#endif
