// Dropout with a mask that is a function of seed and position, as `fastssl/kernels/philox.py` specifies it.
#pragma once

#include <cstdint>
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
  int64_t randomness;  // version of the draws
  uint64_t seed;
  uint64_t offset;
  uint32_t threshold;
  double scale;  // factor of kept elements
};

inline Dropout make_dropout(
    double dropout_p, int64_t randomness, const std::optional<Tensor>& seed, int64_t offset) {
  if (dropout_p == 0) {
    return {false, randomness, 0, 0, 0, 1.0};
  }
  STD_TORCH_CHECK(seed.has_value(), "seed: required if dropout_p > 0");
  check_tensor(*seed, "seed", 0, ScalarType::Long);
  return {
      true,
      randomness,
      static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()),
      static_cast<uint64_t>(offset),
      dropout_threshold(dropout_p, randomness),
      1.0 / kept_fraction(dropout_p, randomness)};
}

// The functions below write a byte for each element, 1 if it is kept and 0 if not, for some Philox blocks: 4 bytes per
// block in version 1, and 8 in version 2 (kHalves). They may write up to 7 blocks more than `blocks`.
template <bool kHalves>
void keep_bytes_default(uint8_t* out, uint64_t seed, uint32_t threshold, uint64_t counter, int64_t blocks) {
  for (int64_t block = 0; block < blocks; ++block) {
    const PhiloxBlock bits = philox(seed, counter + static_cast<uint64_t>(block));
    for (const uint32_t word : bits.word) {
      if (kHalves) {
        *out++ = word << 16 >= threshold;
      }
      *out++ = word >= threshold;
    }
  }
}

#if FASTSSL_HAS_ISA_VARIANTS
// Written with intrinsics, because the compiler would shuffle lanes back and forth, which is 2.5 times slower. The
// processor's 32 by 32 bit product reads the low halves of 64-bit lanes; the high halves may hold anything.
template <bool kHalves>
__attribute__((target("arch=x86-64-v4,prefer-vector-width=512"), noinline)) void keep_bytes_avx512(
    uint8_t* out, uint64_t seed, uint32_t threshold, uint64_t counter, int64_t blocks) {
  const __m512i factor_0 = _mm512_set1_epi64(0xD2511F53);
  const __m512i factor_1 = _mm512_set1_epi64(0xCD9E8D57);
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
    if constexpr (kHalves) {
      // Each 64-bit lane has two words of a block, so its 16-bit lanes have the draws of four elements in order.
      const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(threshold >> 16));
      const __m512i first = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA);
      const __m512i second = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, _MM_PERM_CCAA);
      const __m512i one = _mm512_set1_epi16(1);
      const __m512i kept_first = _mm512_maskz_mov_epi16(_mm512_cmpge_epu16_mask(first, limit), one);
      const __m512i kept_second = _mm512_maskz_mov_epi16(_mm512_cmpge_epu16_mask(second, limit), one);
      // Packing takes two blocks from one vector and then the same two from the other.
      const __m512i packed = _mm512_packus_epi16(kept_first, kept_second);
      _mm512_storeu_si512(out + 8 * block, _mm512_shuffle_epi32(packed, _MM_PERM_DBCA));
    } else {
      const __m512i limit = _mm512_set1_epi32(static_cast<int>(threshold));
      __m512i words = _mm512_maskz_mov_epi32(_mm512_cmpge_epu32_mask(c0, limit), _mm512_set1_epi64(1));
      words = _mm512_mask_or_epi32(words, _mm512_cmpge_epu32_mask(c1, limit), words, _mm512_set1_epi64(1 << 8));
      words = _mm512_mask_or_epi32(words, _mm512_cmpge_epu32_mask(c2, limit), words, _mm512_set1_epi64(1 << 16));
      words = _mm512_mask_or_epi32(words, _mm512_cmpge_epu32_mask(c3, limit), words, _mm512_set1_epi64(1 << 24));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4 * block), _mm512_cvtepi64_epi32(words));
    }
  }
}

template <bool kHalves>
__attribute__((target("arch=x86-64-v3"), noinline)) void keep_bytes_avx2(
    uint8_t* out, uint64_t seed, uint32_t threshold, uint64_t counter, int64_t blocks) {
  const __m256i factor_0 = _mm256_set1_epi64x(0xD2511F53);
  const __m256i factor_1 = _mm256_set1_epi64x(0xCD9E8D57);
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
    if constexpr (kHalves) {
      // As with AVX-512.
      const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(threshold >> 16));
      const __m256i first = _mm256_blend_epi32(c0, _mm256_shuffle_epi32(c1, 0xA0), 0xAA);
      const __m256i second = _mm256_blend_epi32(c2, _mm256_shuffle_epi32(c3, 0xA0), 0xAA);
      const __m256i kept_first = _mm256_cmpeq_epi16(_mm256_max_epu16(first, limit), first);
      const __m256i kept_second = _mm256_cmpeq_epi16(_mm256_max_epu16(second, limit), second);
      const __m256i packed = _mm256_shuffle_epi32(_mm256_packs_epi16(kept_first, kept_second), 0xD8);
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(out + 8 * block), _mm256_and_si256(packed, _mm256_set1_epi8(1)));
    } else {
      const __m256i limit = _mm256_set1_epi32(static_cast<int>(threshold));
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
      const __m256i packed = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4 * block), _mm256_castsi256_si128(packed));
    }
  }
}
#endif

// Size of the scratch memory (bytes) that `keep_bytes` needs for `count` elements: the count, what precedes and follows
// them in their blocks, and 7 blocks.
inline int64_t keep_scratch_size(int64_t count) {
  return count + 2 * 7 + 7 * 8;
}

template <Isa isa, bool kHalves>
FASTSSL_INLINE const uint8_t* keep_bytes_of(uint8_t* scratch, const Dropout& dropout, int64_t first, int64_t count) {
  constexpr int64_t kPerBlock = kHalves ? 8 : 4;
  const int64_t blocks = (first + count + kPerBlock - 1) / kPerBlock - first / kPerBlock;
  const uint64_t counter = dropout.offset + static_cast<uint64_t>(first / kPerBlock);
#if FASTSSL_HAS_ISA_VARIANTS
  if constexpr (isa == Isa::kAvx512) {
    keep_bytes_avx512<kHalves>(scratch, dropout.seed, dropout.threshold, counter, blocks);
  } else if constexpr (isa == Isa::kAvx2) {
    keep_bytes_avx2<kHalves>(scratch, dropout.seed, dropout.threshold, counter, blocks);
  } else {
    keep_bytes_default<kHalves>(scratch, dropout.seed, dropout.threshold, counter, blocks);
  }
#else
  keep_bytes_default<kHalves>(scratch, dropout.seed, dropout.threshold, counter, blocks);
#endif
  return scratch + first % kPerBlock;
}

// Returns a pointer into `scratch`, to one byte for each of the elements first to first + count - 1: 1 if it is kept,
// 0 if not.
template <Isa isa>
FASTSSL_INLINE const uint8_t* keep_bytes(uint8_t* scratch, const Dropout& dropout, int64_t first, int64_t count) {
  return dropout.randomness == 1 ? keep_bytes_of<isa, false>(scratch, dropout, first, count)
                                 : keep_bytes_of<isa, true>(scratch, dropout, first, count);
}

}  // namespace fastssl
