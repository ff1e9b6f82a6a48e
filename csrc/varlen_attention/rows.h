// What attention does with rows of logits between its matrix products: bias, softmax and dropout, and their
// derivatives. fastssl/kernels/varlen_attention/README.md has the formulas.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../common/block_gemm.h"
#include "../common/counter_random.h"
#include "../common/lanes.h"
#include "../common/simd.h"
#include "../common/tensor_checks.h"

namespace fastssl {

// Rows are processed in whole vectors, so each row has room for this many columns after its last.
constexpr int64_t kPadding = kTileColumns;
// The backward stores a block in rows of kBlockStride elements, and uses the first kKeyBlock of each. Sums along
// diagonals may run past the edges of the block into the gap, which holds zeros.
constexpr int64_t kQueryBlock = 48;
constexpr int64_t kKeyBlock = 192;
constexpr int64_t kGap = 64;
constexpr int64_t kBlockStride = kKeyBlock + kGap;
static_assert(kQueryBlock % kTileRows == 0 && kKeyBlock % kTileRows == 0 && kKeyBlock % kTileColumns == 0);
static_assert(kGap >= kQueryBlock + kTileColumns);

// exp(x) is computed as 2^(x / ln 2), and 1 / ln 2 is part of the factor of the logits: this is half the work.
constexpr double kLog2OfE = 1.44269504088896340736;
constexpr double kLnOf2 = 0.69314718055994530942;

// 2^x for x up to 127, and 2^-125 for x below -125: too small to change a sum that contains 1. The result is a
// polynomial of the fraction of x, accurate to 1e-7, with the integer part added to its exponent. NaN for NaN.
FASTSSL_INLINE float power_of_two(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which ends up in the low bits
  const float clamped = x < -125.0f ? -125.0f : x;
  const float shifted = clamped + kRound;
  const float f = clamped - (shifted - kRound);
  float p = 1.55946813e-4f;
  p = p * f + 1.34066437e-3f;
  p = p * f + 9.61769296e-3f;
  p = p * f + 5.55031055e-2f;
  p = p * f + 2.40226528e-1f;
  p = p * f + 6.93147215e-1f;
  p = p * f + 1.0f;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, p) + (__builtin_bit_cast(uint32_t, shifted) << 23));
}

FASTSSL_INLINE double power_of_two(double x) {
  return std::exp2(x);
}

// Values that the rows of a block share, and values per query; a pointer is null if the argument was not given.
template <typename T>
struct Rows {
  int64_t queries;
  int64_t keys;
  int64_t first_query;  // positions within the sequence
  int64_t first_key;
  T scale;  // multiplies the products of queries and keys
  T scale_log2;  // scale * log2(e), for powers of 2
  const T* bias;  // points to the bias of distance 0
  const T* gate;
  const uint32_t* dropout_states;
  int64_t randomness;  // version of the draws
  uint32_t dropout_threshold;
  T kept_factor;  // 1 / the probability of keeping a weight
};

// x . y, over whole vectors
template <Isa isa, typename T>
FASTSSL_INLINE T dot(const T* x, const T* y, int64_t n) {
  using Vector = typename Simd<isa, T>::Vector;
  constexpr int kLanes = Simd<isa, T>::kLanes;
  Vector sums[2] = {};
  for (int64_t i = 0; i < n; i += kTileColumns) {
#pragma GCC unroll 16
    for (int part = 0; part < kTileColumns / kLanes; ++part) {
      Vector a, b;
      __builtin_memcpy(&a, x + i + part * kLanes, sizeof(Vector));
      __builtin_memcpy(&b, y + i + part * kLanes, sizeof(Vector));
      sums[part & 1] += a * b;
    }
  }
  sums[0] += sums[1];
  T sum = 0;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    sum += sums[0][lane];
  }
  return sum;
}

// sums[row] = x[row] . y[row], in double, which costs little compared with the matrix products. The dot product is
// subtracted from numbers of its own size, and the gradients of biases and gates sum the small differences.
template <Isa isa, typename scalar_t, typename T>
FASTSSL_INLINE void row_dots_body(
    const scalar_t* x, const scalar_t* y, int64_t rows, int64_t ld, int64_t columns, T* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    const scalar_t* a = x + row * ld;
    const scalar_t* b = y + row * ld;
    sums[row] = static_cast<T>(sum_in_order<16, double>(columns, [=](int64_t column) {
      return static_cast<double>(static_cast<T>(a[column])) * static_cast<T>(b[column]);
    }));
  }
}
FASTSSL_ISA_VARIANTS(row_dots)

struct Larger {
  template <typename Vector>
  FASTSSL_INLINE void operator()(Vector& most, const Vector& x) const {
    most = x > most ? x : most;
  }
};

struct Plus {
  template <typename Vector>
  FASTSSL_INLINE void operator()(Vector& sum, const Vector& x) const {
    sum += x;
  }
};

// Reduces the n values factor * x[i] with `fold`, starting from `identity`. Reads whole vectors, so the memory after
// x[n - 1] must be readable up to the end of its vector.
template <Isa isa, typename T, typename Fold>
FASTSSL_INLINE T fold_row(const T* x, T factor, int64_t n, T identity, Fold fold) {
  using Vector = typename Simd<isa, T>::Vector;
  constexpr int kLanes = Simd<isa, T>::kLanes;
  constexpr int kChains = 4;  // independent of each other, so that additions overlap
  const Vector start = Vector{} + identity;
  Vector folded[kChains] = {start, start, start, start};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      Vector a;
      __builtin_memcpy(&a, x + i + chain * kLanes, sizeof(Vector));
      fold(folded[chain], a * factor);
    }
  }
  for (; i < n; i += kLanes) {
    Vector a;
    __builtin_memcpy(&a, x + i, sizeof(Vector));
    a *= factor;
    for (int lane = 0; lane < kLanes; ++lane) {
      a[lane] = lane < n - i ? a[lane] : identity;
    }
    fold(folded[0], a);
  }
  fold(folded[0], folded[1]);
  fold(folded[2], folded[3]);
  fold(folded[0], folded[2]);
  T lanes[kLanes];
  __builtin_memcpy(lanes, &folded[0], sizeof(Vector));
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) {
      fold(lanes[lane], lanes[lane + half]);
    }
  }
  return lanes[0];
}

// Number of elements of a row that one `fold_row` sums: 16 additions per lane, so that rounding errors do not grow with
// the length of the row.
template <Isa isa, typename T>
constexpr int64_t kSumBlock = 64 * Simd<isa, T>::kLanes;

// If there is a bias, turns products of queries and keys into logits. Returns the factor that converts the result to
// units of ln 2.
template <typename T>
FASTSSL_INLINE T add_bias(const Rows<T>& rows, int64_t row, int64_t columns, T* __restrict logits) {
  if (rows.bias == nullptr) {
    return rows.scale_log2;
  }
  const T* __restrict bias = rows.bias + rows.first_key - (rows.first_query + row);
  const T gate = rows.gate == nullptr ? T(1) : rows.gate[row];
  const T scale = rows.scale;
  for (int64_t key = 0; key < columns; ++key) {
    logits[key] = scale * logits[key] + gate * bias[key];
  }
  return static_cast<T>(kLog2OfE);
}

// Keys whose draws are computed together under version 2: two vectors of AVX-512.
constexpr int64_t kDrawBlock = 32;
static_assert(kKeyBlock % kDrawBlock == 0);

// Writes the draws of dropout for the keys from `key`, a multiple of 16, up to the end of a block. Version 2 hashes a
// key whose bit 3 is 0 together with the key 8 further on. So a vector of hashes serves two vectors of keys.
template <Isa isa>
FASTSSL_INLINE void draw_block(uint32_t state, uint32_t key, uint32_t* draws) {
  using Vector = typename Simd<isa, uint32_t>::Vector;
  constexpr int kLanes = Simd<isa, uint32_t>::kLanes;
  constexpr uint32_t kFirst[16] = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
#pragma GCC unroll 4
  for (int part = 0; part < 16; part += kLanes) {
    Vector first;
    __builtin_memcpy(&first, kFirst + part, sizeof(Vector));
    Vector upper = (first + key) ^ state;
    murmur_product(upper);
    const Vector lower = upper + (upper << 16);
#if FASTSSL_HAS_ISA_VARIANTS
    if constexpr (isa == Isa::kAvx512) {
      const Vector left = __builtin_shufflevector(lower, upper, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
      const Vector right =
          __builtin_shufflevector(lower, upper, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
      __builtin_memcpy(draws, &left, sizeof(Vector));
      __builtin_memcpy(draws + kLanes, &right, sizeof(Vector));
      continue;
    }
#endif
    __builtin_memcpy(draws + kFirst[part], &lower, sizeof(Vector));
    __builtin_memcpy(draws + kFirst[part] + 8, &upper, sizeof(Vector));
  }
}

// Writes the draws of dropout for `columns` keys, whose first is a multiple of 16. Writes whole blocks.
template <Isa isa, typename T>
FASTSSL_INLINE void draw_keys(const Rows<T>& rows, int64_t row, int64_t first_key, int64_t columns, uint32_t* draws) {
  const uint32_t state = rows.dropout_states[row];
  const uint32_t first = static_cast<uint32_t>(first_key);
  if (rows.randomness == 1) {
    for (uint32_t i = 0; i < static_cast<uint32_t>(columns); ++i) {
      draws[i] = murmur_mix(state ^ (first + i));
    }
    return;
  }
  for (int64_t i = 0; i < columns; i += kDrawBlock) {
    draw_block<isa>(state, first + static_cast<uint32_t>(i), draws + i);
  }
}

// Replaces products of queries and keys by exp(logit - the row's largest logit), or 0 if dropped. Also writes the
// factor that turns each row into probabilities, and its logsumexp. Columns after the last key hold no meaningful
// values.
template <Isa isa, typename T>
FASTSSL_INLINE void softmax_body(Rows<T> rows, T* logits, int64_t ld, T* factors, T* logsumexp) {
  const int64_t columns = round_up(rows.keys, kPadding);
  for (int64_t row = 0; row < rows.queries; ++row) {
    T* __restrict x = logits + row * ld;
    const T factor = add_bias(rows, row, columns, x);
    const T most = fold_row<isa>(x, factor, rows.keys, -std::numeric_limits<T>::infinity(), Larger{});
    for (int64_t key = 0; key < columns; ++key) {
      x[key] = power_of_two(factor * x[key] - most);
    }
    double sum = 0;
    for (int64_t key = 0; key < rows.keys; key += kSumBlock<isa, T>) {
      sum += fold_row<isa>(x + key, T(1), std::min(kSumBlock<isa, T>, rows.keys - key), T(0), Plus{});
    }
    logsumexp[row] = static_cast<T>((most + std::log2(sum)) * kLnOf2);
    factors[row] = static_cast<T>((rows.dropout_states == nullptr ? T(1) : rows.kept_factor) / sum);
    if (rows.dropout_states != nullptr) {
      const uint32_t threshold = rows.dropout_threshold;
      uint32_t draws[kKeyBlock];
      for (int64_t first = 0; first < columns; first += kKeyBlock) {
        const int64_t count = std::min(kKeyBlock, columns - first);
        draw_keys<isa>(rows, row, first, count, draws);
        for (int64_t i = 0; i < count; ++i) {
          x[first + i] = draws[i] >= threshold ? x[first + i] : T(0);
        }
      }
    }
  }
}
FASTSSL_ISA_VARIANTS(softmax)

// Replaces `weights`, the products of queries and keys, by probabilities after dropout. Replaces `grads`, the gradients
// of those probabilities, by the gradients of the logits. Writes zeros after the last key.
template <Isa isa, typename T>
FASTSSL_INLINE void softmax_backward_body(Rows<T> rows, const T* logsumexp, const T* delta, T* weights, T* grads) {
  const int64_t columns = round_up(rows.keys, kPadding);
  for (int64_t row = 0; row < rows.queries; ++row) {
    T* __restrict weight = weights + row * kBlockStride;
    T* __restrict grad = grads + row * kBlockStride;
    const T row_logsumexp = static_cast<T>(logsumexp[row] * kLog2OfE);
    // Without this, all probabilities of a row with logits near 10 are off by the same factor, up to 3e-7.
    const T remainder = static_cast<T>(logsumexp[row] * kLog2OfE - row_logsumexp);
    const T row_delta = delta[row];
    const T logit_factor = add_bias(rows, row, columns, weight);
    if (rows.dropout_states == nullptr) {
      for (int64_t key = 0; key < columns; ++key) {
        const T probability = power_of_two((logit_factor * weight[key] - row_logsumexp) - remainder);
        weight[key] = probability;
        grad[key] = probability * (grad[key] - row_delta);
      }
    } else {
      const uint32_t threshold = rows.dropout_threshold;
      uint32_t draws[kKeyBlock];
      draw_keys<isa>(rows, row, rows.first_key, columns, draws);
      for (int64_t key = 0; key < columns; ++key) {
        const T factor = draws[key] >= threshold ? rows.kept_factor : T(0);
        const T probability = power_of_two((logit_factor * weight[key] - row_logsumexp) - remainder);
        weight[key] = factor * probability;
        grad[key] = probability * (factor * grad[key] - row_delta);
      }
    }
    for (int64_t key = rows.keys; key < kKeyBlock; ++key) {
      weight[key] = 0;
      grad[key] = 0;
    }
  }
}
FASTSSL_ISA_VARIANTS(softmax_backward)

// Number of gradients on a diagonal to sum before adding the sum to others. The sum must be precise, because gradients
// of both signs nearly cancel.
constexpr int64_t kDiagonalChain = 12;

// Takes the gradients of a block's logits. Adds their sums along diagonals, times the gate, to `diagonals`, which
// points to distance 0. If there is a gate, adds the dot product of each row with the bias to `grad_gate`.
template <Isa isa, typename T>
FASTSSL_INLINE void bias_backward_body(Rows<T> rows, const T* grads, double* diagonals, T* grad_gate) {
  using Vector = typename Simd<isa, T>::Vector;
  constexpr int kLanes = Simd<isa, T>::kLanes;
  const int64_t columns = round_up(rows.keys, kPadding);
  const int64_t distance = rows.first_key - rows.first_query;
  // Lane l of the vector at `column` in row 0 follows the diagonal from there: one column further in each row.
  for (int64_t column = -kQueryBlock; column < columns; column += kLanes) {
    Vector sum{};
    for (int64_t first = 0; first < rows.queries; first += kDiagonalChain) {
      Vector part{};
      for (int64_t row = first; row < std::min(first + kDiagonalChain, rows.queries); ++row) {
        Vector grad;
        __builtin_memcpy(&grad, grads + row * (kBlockStride + 1) + column, sizeof(Vector));
        part += (rows.gate == nullptr ? T(1) : rows.gate[row]) * grad;
      }
      sum += part;
    }
    double* sums = diagonals + distance + column;
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] += sum[lane];
    }
  }
  if (rows.gate != nullptr) {
    for (int64_t row = 0; row < rows.queries; ++row) {
      grad_gate[row] += dot<isa>(grads + row * kBlockStride, rows.bias + distance - row, columns);
    }
  }
}
FASTSSL_ISA_VARIANTS(bias_backward)

}  // namespace fastssl
