// Random bits as a function of a seed and a counter, so that masks are recomputed when needed and never stored.
// `fastssl/kernels/philox.py` and `varlen_attention/reference.py` specify the same functions in Python.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"

namespace fastssl {

// Dropout keeps an element if its draw, a number of 32 bits, is at least this. `fastssl/kernels/randomness.py` has the
// versions. In version 2, the draw is in the upper 16 bits; the lower bits of the threshold are 0.
inline uint32_t dropout_threshold(double p, int64_t randomness) {
  if (randomness == 1) {
    return static_cast<uint32_t>(p * 4294967296.0);
  }
  return std::min(static_cast<uint32_t>(p * 65536.0 + 0.5), 65535u) << 16;
}

// The probability of keeping an element; kept elements are divided by it.
inline double kept_fraction(double p, int64_t randomness) {
  return randomness == 1 ? 1.0 - p : 1.0 - dropout_threshold(p, randomness) / 4294967296.0;
}

// Philox-4x32-10 (Salmon et al. 2011): the four words of block `counter` for `seed`. Vectorises over counters.
struct PhiloxBlock {
  uint32_t word[4];
};

FASTSSL_INLINE PhiloxBlock philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter);
  uint32_t c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0;
  uint32_t c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t product_1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(product_1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product_1);
    c3 = static_cast<uint32_t>(product_0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Applies the finaliser of MurmurHash3 without its last step to a number, or to each lane of a vector. Attention uses it
// to hash the coordinates of a weight, one after another.
template <typename T>
FASTSSL_INLINE void murmur_product(T& x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
}

FASTSSL_INLINE uint32_t murmur_mix(uint32_t x) {
  murmur_product(x);
  return x ^ (x >> 16);
}

}  // namespace fastssl
