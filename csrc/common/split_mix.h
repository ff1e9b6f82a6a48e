// SplitMix64 (Steele, Lea, Flood 2014): number i of a seed comes from split_mix(seed + i * kGolden). Vectorises over i.
// `fastssl/kernels/splitmix.py` specifies the same functions in Python.
#pragma once

#include <cstdint>

#include "isa.h"
#include "vector_math.h"

namespace fastssl {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

FASTSSL_INLINE uint64_t split_mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// A uniform number in (0, 1): an odd multiple of 2^-24.
FASTSSL_INLINE float split_mix_uniform(uint64_t seed, uint64_t counter) {
  const int32_t bits = static_cast<int32_t>(split_mix(seed + counter * kGolden) >> 41);
  return static_cast<float>(bits) * 0x1p-23f + 0x1p-24f;
}

// Standard Gumbel noise; the uniform number is the same for every T.
template <typename T>
FASTSSL_INLINE T split_mix_gumbel(uint64_t seed, uint64_t counter) {
  return -vector_log(-vector_log(static_cast<T>(split_mix_uniform(seed, counter))));
}

}  // namespace fastssl
