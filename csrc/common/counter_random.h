// Random bits as a function of a seed and a counter, so that masks are recomputed when needed and never stored.
// `fastssl/kernels/philox.py` and `varlen_attention/reference.py` specify the same functions in Python.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastssl {

// An event of probability p happens if 32 random bits are below this.
FASTSSL_INLINE uint32_t probability_threshold(double p) {
  return static_cast<uint32_t>(p * 4294967296.0);
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

// The finaliser of MurmurHash3. Attention uses it to hash the coordinates of a weight, one after another.
FASTSSL_INLINE uint32_t murmur_mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}

}  // namespace fastssl
