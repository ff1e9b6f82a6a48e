// Rows of one head as operands of common/block_gemm.h: widened to the type of the sums, or pairs of bfloat16. A pair
// holds two numbers that are neighbours along the sum. So a matrix that is summed over its columns in one product and
// over its rows in another needs two copies in pairs; otherwise one copy is enough.
#pragma once

#include <cstdint>

#include "../common/block_gemm.h"
#include "../common/tensor_checks.h"

namespace fastssl {

template <typename Operand>
constexpr int64_t kDepth = kIsPair<Operand> ? 2 : 1;  // numbers in an operand

template <typename Operand>
constexpr int64_t depth_of(int64_t numbers) {
  return divide_up(numbers, kDepth<Operand>);
}

// Rows of one head are too far apart for the processor to prefetch the next one by itself.
constexpr int64_t kRowsAhead = 8;

template <typename scalar_t>
FASTSSL_INLINE void prefetch_row(const scalar_t* row, int64_t columns) {
  for (int64_t column = 0; column < columns; column += 64 / static_cast<int64_t>(sizeof(scalar_t))) {
    __builtin_prefetch(row + column);
  }
}

// out[row] = x[row], padded with zeros to a multiple of 16 columns and of `row_multiple` rows.
template <Isa isa, typename scalar_t, typename T>
FASTSSL_INLINE void widen_rows_body(
    const scalar_t* x, int64_t ldx, int64_t rows, int64_t row_multiple, int64_t columns, T* out) {
  const int64_t ldout = round_up(columns, kTileColumns);
  for (int64_t row = 0; row < rows; ++row) {
    const scalar_t* __restrict from = x + row * ldx;
    T* __restrict to = out + row * ldout;
    prefetch_row(from + kRowsAhead * ldx, columns);
    for (int64_t column = 0; column < columns; ++column) {
      to[column] = static_cast<T>(from[column]);
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
FASTSSL_ISA_VARIANTS(widen_rows)

// Like `widen_rows`, but keeps bf16 and packs columns 2i and 2i + 1 into one pair; rows are padded to 16 pairs.
template <Isa isa>
FASTSSL_INLINE void pair_columns_body(
    const torch::headeronly::BFloat16* x,
    int64_t ldx,
    int64_t rows,
    int64_t row_multiple,
    int64_t columns,
    BFloat16Pair* out) {
  const int64_t ldout = round_up(depth_of<BFloat16Pair>(columns), kTileColumns);
  for (int64_t row = 0; row < rows; ++row) {
    prefetch_row(x + (row + kRowsAhead) * ldx, columns);
    char* to = reinterpret_cast<char*>(out + row * ldout);
    __builtin_memcpy(to, x + row * ldx, 2 * columns);
    __builtin_memset(to + 2 * columns, 0, 4 * ldout - 2 * columns);
  }
  __builtin_memset(out + rows * ldout, 0, 4 * (round_up(rows, row_multiple) - rows) * ldout);
}
FASTSSL_ISA_VARIANTS(pair_columns)

// Pairs along the rows: out[row / 2] = x[row], x[row + 1]. The last row of an odd number is paired with zeros.
template <Isa isa>
FASTSSL_INLINE void pair_rows_body(
    const torch::headeronly::BFloat16* x, int64_t ldx, int64_t rows, int64_t columns, BFloat16Pair* out) {
  const int64_t ldout = round_up(columns, kTileColumns);
  for (int64_t row = 0; row < rows; row += 2) {
    const torch::headeronly::BFloat16* __restrict first = x + row * ldx;
    const torch::headeronly::BFloat16* __restrict second = row + 1 < rows ? first + ldx : first;
    const uint32_t mask = row + 1 < rows ? 0xFFFFFFFFu : 0xFFFFu;
    BFloat16Pair* __restrict to = out + row / 2 * ldout;
    prefetch_row(first + kRowsAhead * ldx, columns);
    prefetch_row(second + kRowsAhead * ldx, columns);
    for (int64_t column = 0; column < columns; ++column) {
      to[column] = (first[column].x | static_cast<uint32_t>(second[column].x) << 16) & mask;
    }
    for (int64_t column = columns; column < ldout; ++column) {
      to[column] = 0;
    }
  }
}
FASTSSL_ISA_VARIANTS(pair_rows)

// Layout for a sum over the columns: rows of round_up(depth_of(columns), 16) operands.
template <typename scalar_t, typename Operand>
void load_along_columns(
    const scalar_t* x, int64_t ldx, int64_t rows, int64_t row_multiple, int64_t columns, Operand* out) {
  if constexpr (kIsPair<Operand>) {
    pair_columns(x, ldx, rows, row_multiple, columns, out);
  } else {
    widen_rows(x, ldx, rows, row_multiple, columns, out);
  }
}

// Layout for a sum over the rows: depth_of(rows) rows of round_up(columns, 16) operands.
template <typename scalar_t, typename Operand>
void load_along_rows(const scalar_t* x, int64_t ldx, int64_t rows, int64_t columns, Operand* out) {
  if constexpr (kIsPair<Operand>) {
    pair_rows(x, ldx, rows, columns, out);
  } else {
    widen_rows(x, ldx, rows, int64_t(1), columns, out);
  }
}

FASTSSL_INLINE uint32_t rounded_to_bfloat16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
}

template <Isa isa>
FASTSSL_INLINE void round_columns_body(const float* x, int64_t ld, int64_t rows, int64_t columns, BFloat16Pair* out) {
  typedef uint16_t __attribute__((may_alias)) Half;
  for (int64_t row = 0; row < rows; ++row) {
    const float* __restrict from = x + row * ld;
    Half* __restrict to = reinterpret_cast<Half*>(out + row * (ld / 2));
    const int64_t end = round_up(columns, kTileColumns);
    for (int64_t column = 0; column < end; ++column) {
      to[column] = static_cast<uint16_t>(rounded_to_bfloat16(from[column]));
    }
    if (columns % 2 != 0) {
      to[columns] = 0;
    }
  }
}
FASTSSL_ISA_VARIANTS(round_columns)

template <Isa isa>
FASTSSL_INLINE void round_rows_body(const float* x, int64_t ld, int64_t rows, int64_t columns, BFloat16Pair* out) {
  for (int64_t row = 0; row < rows; row += 2) {
    const float* __restrict first = x + row * ld;
    const float* __restrict second = row + 1 < rows ? first + ld : first;
    const uint32_t mask = row + 1 < rows ? 0xFFFFFFFFu : 0xFFFFu;
    BFloat16Pair* __restrict to = out + row / 2 * ld;
    for (int64_t column = 0; column < columns; ++column) {
      to[column] = (rounded_to_bfloat16(first[column]) | rounded_to_bfloat16(second[column]) << 16) & mask;
    }
  }
}
FASTSSL_ISA_VARIANTS(round_rows)

// Returns a computed block as an operand that is summed over its columns. Pairs are written to `pairs`, in rows of
// ld / 2; an odd last column is paired with zeros.
template <typename Operand, typename T>
const Operand* along_columns(const T* x, int64_t ld, int64_t rows, int64_t columns, Operand* pairs) {
  if constexpr (kIsPair<Operand>) {
    round_columns(x, ld, rows, columns, pairs);
    return pairs;
  } else {
    return x;
  }
}

// Returns a computed block as an operand that is summed over its rows. Pairs are written to `pairs`, in rows of ld.
template <typename Operand, typename T>
const Operand* along_rows(const T* x, int64_t ld, int64_t rows, int64_t columns, Operand* pairs) {
  if constexpr (kIsPair<Operand>) {
    round_rows(x, ld, rows, round_up(columns, kTileColumns), pairs);
    return pairs;
  } else {
    return x;
  }
}

// out[row] = factor * x[row], or factors[row] * x[row] if `factors` is given.
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

}  // namespace fastssl
