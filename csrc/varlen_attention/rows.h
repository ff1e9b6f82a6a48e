// What attention on the CPU does to rows of logits between its matrix products: bias, softmax and dropout, and their
// derivatives. fastssl/ops/varlen_attention/README.md has the formulas.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/block_gemm.h"
#include "../common/counter_random.h"
#include "../common/tensor_checks.h"

namespace fastssl {

// Rows are worked on in whole vectors: every row has room for this many columns after its last.
constexpr int64_t kPadding = kTileColumns;
// A block of the backward lies in rows of kBlockStride elements of which the first kKeyBlock are used. The gap lets the
// sums along diagonals run over the borders of the block, where they find zeros.
constexpr int64_t kQueryBlock = 48;
constexpr int64_t kKeyBlock = 192;
constexpr int64_t kGap = 64;
constexpr int64_t kBlockStride = kKeyBlock + kGap;
static_assert(kQueryBlock % kTileRows == 0 && kKeyBlock % kTileRows == 0 && kKeyBlock % kTileColumns == 0);
static_assert(kGap >= kQueryBlock + kTileColumns);

// Logits are kept in units of ln 2: the factor goes into queries and bias, and exp becomes a power of two, half the work.
constexpr double kLog2OfE = 1.44269504088896340736;
constexpr double kLnOf2 = 0.69314718055994530942;

// 2^x for x up to 127; 2^-125, which no sum with 1 notices, for everything below. A polynomial in the distance from the
// nearest integer, within 1e-7 of it, whose exponent that integer is added to. NaN for NaN.
FASTSSL_INLINE float power_of_two(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
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

// What the rows of a block have in common. Pointers to one value per query are null where there is no such argument.
template <typename T>
struct Rows {
  int64_t queries;
  int64_t keys;
  int64_t first_query;  // positions within the sequence
  int64_t first_key;
  const T* bias;  // at distance 0, in units of ln 2
  const T* gate;
  const uint32_t* dropout_states;
  uint32_t dropout_threshold;
  T kept_factor;  // 1 / (1 - p)
};

// Rows of one head lie so far apart that the processor does not foresee the next.
constexpr int64_t kRowsAhead = 8;

// out[row] = factor * x[row], zeros up to the next multiple of 16 columns and of `row_multiple` rows.
template <Isa isa, typename scalar_t, typename T>
FASTSSL_INLINE void load_rows_body(
    const scalar_t* x, int64_t ldx, int64_t rows, int64_t row_multiple, int64_t columns, T factor, T* out) {
  const int64_t ldout = round_up(columns, kTileColumns);
  for (int64_t row = 0; row < rows; ++row) {
    const scalar_t* __restrict from = x + row * ldx;
    T* __restrict to = out + row * ldout;
    for (const scalar_t* line = from; line < from + columns; line += 64 / sizeof(scalar_t)) {
      __builtin_prefetch(line + kRowsAhead * ldx);
    }
    for (int64_t column = 0; column < columns; ++column) {
      to[column] = factor * static_cast<T>(from[column]);
    }
    for (int64_t column = columns; column < ldout; ++column) {
      to[column] = 0;
    }
  }
  const int64_t end = round_up(rows, row_multiple) * ldout;
  for (int64_t i = rows * ldout; i < end; ++i) {
    out[i] = 0;
  }
}
FASTSSL_ISA_VARIANTS(load_rows)

// out[row] = factor * x[row], with a factor of its own for each row where `factors` is given.
template <Isa isa, typename T, typename scalar_t>
FASTSSL_INLINE void store_rows_body(
    const T* x, int64_t rows, int64_t columns, T factor, const T* factors, scalar_t* out, int64_t ldout) {
  const int64_t ldx = round_up(columns, kTileColumns);
  for (int64_t row = 0; row < rows; ++row) {
    const T row_factor = factors == nullptr ? factor : factors[row];
    const T* __restrict from = x + row * ldx;
    scalar_t* __restrict to = out + row * ldout;
    for (int64_t column = 0; column < columns; ++column) {
      to[column] = static_cast<scalar_t>(row_factor * from[column]);
    }
  }
}
FASTSSL_ISA_VARIANTS(store_rows)

// sums[row] = x[row] . y[row]
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

template <Isa isa, typename T>
FASTSSL_INLINE void row_dots_body(const T* x, const T* y, int64_t rows, int64_t ld, T* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    sums[row] = dot<isa>(x + row * ld, y + row * ld, ld);
  }
}
FASTSSL_ISA_VARIANTS(row_dots)

template <Isa isa, typename T>
FASTSSL_INLINE T row_maximum(const T* x, int64_t n) {
  using Vector = typename Simd<isa, T>::Vector;
  constexpr int kLanes = Simd<isa, T>::kLanes;
  Vector most;
  __builtin_memcpy(&most, x, sizeof(Vector));
  for (int64_t i = kLanes; i < n; i += kLanes) {
    Vector a;
    __builtin_memcpy(&a, x + i, sizeof(Vector));
    most = a > most ? a : most;
  }
  T result = most[0];
#pragma GCC unroll 16
  for (int lane = 1; lane < kLanes; ++lane) {
    result = most[lane] > result ? most[lane] : result;
  }
  return result;
}

template <Isa isa, typename T>
FASTSSL_INLINE T row_sum(const T* x, int64_t n) {
  using Vector = typename Simd<isa, T>::Vector;
  constexpr int kLanes = Simd<isa, T>::kLanes;
  Vector sums = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    Vector a;
    __builtin_memcpy(&a, x + i, sizeof(Vector));
    sums += a;
  }
  T sum = 0;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    sum += sums[lane];
  }
  return sum;
}

template <typename T>
FASTSSL_INLINE void add_bias(const Rows<T>& rows, int64_t row, int64_t columns, T* __restrict logits) {
  if (rows.bias == nullptr) {
    return;
  }
  const T* __restrict bias = rows.bias + rows.first_key - (rows.first_query + row);
  const T gate = rows.gate == nullptr ? T(1) : rows.gate[row];
  for (int64_t key = 0; key < columns; ++key) {
    logits[key] += gate * bias[key];
  }
}

// logits -> exp(logits - their maximum), 0 where dropped; also the factor that makes them probabilities, and logsumexp.
template <Isa isa, typename T>
FASTSSL_INLINE void softmax_body(Rows<T> rows, T* logits, int64_t ld, T* factors, T* logsumexp) {
  const int64_t columns = round_up(rows.keys, kPadding);
  for (int64_t row = 0; row < rows.queries; ++row) {
    T* __restrict x = logits + row * ld;
    add_bias(rows, row, columns, x);
    for (int64_t key = rows.keys; key < columns; ++key) {
      x[key] = -std::numeric_limits<T>::infinity();
    }
    const T most = row_maximum<isa>(x, columns);
    for (int64_t key = 0; key < columns; ++key) {
      x[key] = power_of_two(x[key] - most);
    }
    const T sum = row_sum<isa>(x, columns);
    logsumexp[row] = (most + std::log2(sum)) * static_cast<T>(kLnOf2);
    factors[row] = 1 / sum;
    if (rows.dropout_states != nullptr) {
      factors[row] *= rows.kept_factor;
      const uint32_t state = rows.dropout_states[row];
      const uint32_t threshold = rows.dropout_threshold;
      for (int32_t key = 0; key < static_cast<int32_t>(columns); ++key) {
        x[key] = murmur_mix(state ^ static_cast<uint32_t>(key)) >= threshold ? x[key] : T(0);
      }
    }
  }
}
FASTSSL_ISA_VARIANTS(softmax)

// weights: logits -> probabilities after dropout. grads: of those -> of the logits. Zeros after the last key.
template <Isa isa, typename T>
FASTSSL_INLINE void softmax_backward_body(Rows<T> rows, const T* logsumexp, const T* delta, T* weights, T* grads) {
  const int64_t columns = round_up(rows.keys, kPadding);
  for (int64_t row = 0; row < rows.queries; ++row) {
    T* __restrict weight = weights + row * kBlockStride;
    T* __restrict grad = grads + row * kBlockStride;
    const T row_logsumexp = logsumexp[row] * static_cast<T>(kLog2OfE);
    const T row_delta = delta[row];
    add_bias(rows, row, columns, weight);
    if (rows.dropout_states == nullptr) {
      for (int64_t key = 0; key < columns; ++key) {
        const T probability = power_of_two(weight[key] - row_logsumexp);
        weight[key] = probability;
        grad[key] = probability * (grad[key] - row_delta);
      }
    } else {
      const uint32_t state = rows.dropout_states[row];
      const uint32_t threshold = rows.dropout_threshold;
      const int32_t first_key = static_cast<int32_t>(rows.first_key);
      for (int32_t key = 0; key < static_cast<int32_t>(columns); ++key) {
        const bool keep = murmur_mix(state ^ static_cast<uint32_t>(first_key + key)) >= threshold;
        const T factor = keep ? rows.kept_factor : T(0);
        const T probability = power_of_two(weight[key] - row_logsumexp);
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

// From the gradients of the logits of a block: sums along its diagonals, times the gate, added to `diagonals` (at
// distance 0); and sums of its rows times the bias, added to `grad_gate` where there is a gate.
template <Isa isa, typename T>
FASTSSL_INLINE void bias_backward_body(Rows<T> rows, const T* grads, T* diagonals, T* grad_gate) {
  using Vector = typename Simd<isa, T>::Vector;
  constexpr int kLanes = Simd<isa, T>::kLanes;
  const int64_t columns = round_up(rows.keys, kPadding);
  const int64_t distance = rows.first_key - rows.first_query;
  // Lane l of the vector at `column` of row 0 goes down the diagonal from there: one column on in every row.
  for (int64_t column = -kQueryBlock; column < columns; column += kLanes) {
    Vector sum;
    __builtin_memcpy(&sum, diagonals + distance + column, sizeof(Vector));
    for (int64_t row = 0; row < rows.queries; ++row) {
      Vector grad;
      __builtin_memcpy(&grad, grads + row * (kBlockStride + 1) + column, sizeof(Vector));
      sum += (rows.gate == nullptr ? T(1) : rows.gate[row]) * grad;
    }
    __builtin_memcpy(diagonals + distance + column, &sum, sizeof(Vector));
  }
  if (rows.gate != nullptr) {
    for (int64_t row = 0; row < rows.queries; ++row) {
      grad_gate[row] +=
          static_cast<T>(kLnOf2) * dot<isa>(grads + row * kBlockStride, rows.bias + distance - row, columns);
    }
  }
}
FASTSSL_ISA_VARIANTS(bias_backward)

}  // namespace fastssl
