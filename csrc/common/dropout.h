// Dropout with a mask that is a function of seed and position, as `fastssl/kernels/philox.py` specifies it.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>

#include "counter_random.h"
#include "isa.h"
#include "tensor_checks.h"

#if FASTSSL_HAS_ISA_VARIANTS
// GCC 12 warns about its own intrinsics, which leave a register undefined on purpose.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace fastssl {

// Determines which elements dropout keeps. If inactive, it draws no random numbers.
struct Dropout {
  bool active;
  uint64_t seed;
  uint64_t offset;
  uint32_t threshold;
  double scale;  // factor of kept elements
};

inline Dropout make_dropout(double dropout_p, const std::optional<Tensor>& seed, int64_t offset) {
  if (dropout_p == 0) {
    return {false, 0, 0, 0, 1.0};
  }
  STD_TORCH_CHECK(seed.has_value(), "seed: required if dropout_p > 0");
  check_tensor(*seed, "seed", 0, ScalarType::Long);
  return {
      true,
      static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()),
      static_cast<uint64_t>(offset),
      probability_threshold(dropout_p),
      1.0 / (1.0 - dropout_p)};
}

// The functions below write one word per Philox block: a byte for each of its four elements, lowest byte first, 1 if
// the element is kept and 0 if not. They may write up to 7 words more than `blocks`.
inline void keep_words_default(uint8_t* out, uint64_t seed, uint32_t threshold, uint64_t counter, int64_t blocks) {
  for (int64_t block = 0; block < blocks; ++block) {
    const PhiloxBlock bits = philox(seed, counter + static_cast<uint64_t>(block));
    const uint32_t word = (bits.word[0] >= threshold ? 1u : 0u) | (bits.word[1] >= threshold ? 1u << 8 : 0u) |
        (bits.word[2] >= threshold ? 1u << 16 : 0u) | (bits.word[3] >= threshold ? 1u << 24 : 0u);
    std::memcpy(out + 4 * block, &word, sizeof(word));
  }
}

#if FASTSSL_HAS_ISA_VARIANTS
// Written with intrinsics, because the compiler would shuffle lanes back and forth, which is 2.5 times slower. The
// processor's 32 by 32 bit product reads the low halves of 64-bit lanes; the high halves may hold anything.
__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"), noinline)) inline void keep_words_avx512(
    uint8_t* out, uint64_t seed, uint32_t threshold, uint64_t counter, int64_t blocks) {
  const __m512i factor_0 = _mm512_set1_epi64(0xD2511F53);
  const __m512i factor_1 = _mm512_set1_epi64(0xCD9E8D57);
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(threshold));
  for (int64_t block = 0; block < blocks; block += 8) {
    __m512i c0 = _mm512_add_epi64(
        _mm512_set1_epi64(static_cast<int64_t>(counter + static_cast<uint64_t>(block))),
        _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    __m512i c1 = _mm512_srli_epi64(c0, 32);
    __m512i c2 = _mm512_setzero_si512();
    __m512i c3 = _mm512_setzero_si512();
    uint32_t k0 = static_cast<uint32_t>(seed);
    uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m512i product_0 = _mm512_mul_epu32(c0, factor_0);
      const __m512i product_1 = _mm512_mul_epu32(c2, factor_1);
      constexpr int kXor = 0x96;
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product_1, 32), c1, _mm512_set1_epi64(k0), kXor);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product_0, 32), c3, _mm512_set1_epi64(k1), kXor);
      c1 = product_1;
      c3 = product_0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    __m512i words = _mm512_maskz_mov_epi32(_mm512_cmpge_epu32_mask(c0, limit), _mm512_set1_epi64(1));
    words = _mm512_mask_or_epi32(words, _mm512_cmpge_epu32_mask(c1, limit), words, _mm512_set1_epi64(1 << 8));
    words = _mm512_mask_or_epi32(words, _mm512_cmpge_epu32_mask(c2, limit), words, _mm512_set1_epi64(1 << 16));
    words = _mm512_mask_or_epi32(words, _mm512_cmpge_epu32_mask(c3, limit), words, _mm512_set1_epi64(1 << 24));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4 * block), _mm512_cvtepi64_epi32(words));
  }
}

__attribute__((target("arch=x86-64-v3"), noinline)) inline void keep_words_avx2(
    uint8_t* out, uint64_t seed, uint32_t threshold, uint64_t counter, int64_t blocks) {
  const __m256i factor_0 = _mm256_set1_epi64x(0xD2511F53);
  const __m256i factor_1 = _mm256_set1_epi64x(0xCD9E8D57);
  const __m256i limit = _mm256_set1_epi32(static_cast<int>(threshold));
  const __m256i low_halves = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  for (int64_t block = 0; block < blocks; block += 4) {
    __m256i c0 = _mm256_add_epi64(
        _mm256_set1_epi64x(static_cast<int64_t>(counter + static_cast<uint64_t>(block))),
        _mm256_setr_epi64x(0, 1, 2, 3));
    __m256i c1 = _mm256_srli_epi64(c0, 32);
    __m256i c2 = _mm256_setzero_si256();
    __m256i c3 = _mm256_setzero_si256();
    uint32_t k0 = static_cast<uint32_t>(seed);
    uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m256i product_0 = _mm256_mul_epu32(c0, factor_0);
      const __m256i product_1 = _mm256_mul_epu32(c2, factor_1);
      c0 = _mm256_xor_si256(
          _mm256_xor_si256(_mm256_srli_epi64(product_1, 32), c1), _mm256_set1_epi32(static_cast<int>(k0)));
      c2 = _mm256_xor_si256(
          _mm256_xor_si256(_mm256_srli_epi64(product_0, 32), c3), _mm256_set1_epi32(static_cast<int>(k1)));
      c1 = product_1;
      c3 = product_0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    // AVX2 has no unsigned comparison: c >= limit if the larger of the two is c.
    const __m256i kept_0 = _mm256_cmpeq_epi32(_mm256_max_epu32(c0, limit), c0);
    const __m256i kept_1 = _mm256_cmpeq_epi32(_mm256_max_epu32(c1, limit), c1);
    const __m256i kept_2 = _mm256_cmpeq_epi32(_mm256_max_epu32(c2, limit), c2);
    const __m256i kept_3 = _mm256_cmpeq_epi32(_mm256_max_epu32(c3, limit), c3);
    const __m256i words = _mm256_or_si256(
        _mm256_or_si256(
            _mm256_and_si256(kept_0, _mm256_set1_epi32(1)), _mm256_and_si256(kept_1, _mm256_set1_epi32(1 << 8))),
        _mm256_or_si256(
            _mm256_and_si256(kept_2, _mm256_set1_epi32(1 << 16)),
            _mm256_and_si256(kept_3, _mm256_set1_epi32(1 << 24))));
    const __m256i packed = _mm256_permutevar8x32_epi32(words, low_halves);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4 * block), _mm256_castsi256_si128(packed));
  }
}
#endif

// Size of the scratch memory (bytes) that `keep_bytes` needs for `count` elements.
inline int64_t keep_scratch_size(int64_t count) {
  return count + 8 + 28;
}

// Returns a pointer into `scratch`, to one byte for each of the elements first to first + count - 1: 1 if it is kept,
// 0 if not.
template <Isa isa>
FASTSSL_INLINE const uint8_t* keep_bytes(uint8_t* scratch, const Dropout& dropout, int64_t first, int64_t count) {
  const int64_t blocks = (first + count + 3) / 4 - first / 4;
  const uint64_t counter = dropout.offset + static_cast<uint64_t>(first / 4);
#if FASTSSL_HAS_ISA_VARIANTS
  if constexpr (isa == Isa::kAvx512) {
    keep_words_avx512(scratch, dropout.seed, dropout.threshold, counter, blocks);
  } else if constexpr (isa == Isa::kAvx2) {
    keep_words_avx2(scratch, dropout.seed, dropout.threshold, counter, blocks);
  } else {
    keep_words_default(scratch, dropout.seed, dropout.threshold, counter, blocks);
  }
#else
  keep_words_default(scratch, dropout.seed, dropout.threshold, counter, blocks);
#endif
  return scratch + first % 4;
}

}  // namespace fastssl
