// Matrix products of blocks that stay in cache, for kernels that also work on the block before and after the product.
// Operands are row-major; the code is vectorised along the columns of B and C. Each call selects an instruction set
// (isa.h).
//
// A tile of 6 rows by up to 4 vectors stays in registers (AVX-512: 24 sums, 4 vectors of B, 1 element of A), so each
// element of A is loaded once per 4 vector products, and each vector of B once per 6. Products are summed in order of
// `depth`, in chains of at most `kLongestChain` that start at zero and are then added to C: rounding errors grow with
// the length of a chain. The bits of an element depend neither on its neighbours nor on how the caller cuts rows and
// columns into blocks.
//
// Operands are float, double, or pairs of bfloat16. A pair holds two neighbours along `depth`, the first in the low
// half. Pairs are summed in float, and need a processor with an instruction that multiplies them
// (`multiplies_bfloat16`).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "integers.h"
#include "isa.h"
#include "simd.h"

namespace fastssl {

// Callers pad the rows of A and C, and the columns of B and C, to a multiple of these. The padding may hold anything.
constexpr int64_t kTileRows = 6;
constexpr int64_t kTileColumns = 16;

using BFloat16Pair = uint32_t;

template <typename Operand>
constexpr bool kIsPair = std::is_same_v<Operand, BFloat16Pair>;

inline bool multiplies_bfloat16() {
#if FASTSSL_HAS_ISA_VARIANTS
  return current_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Number of products to sum before the sum is added to C. It is lower without fused multiply-add, where each product
// is rounded as well.
template <Isa isa>
constexpr int64_t kLongestChain = isa == Isa::kDefault ? 16 : 32;

// Number of vectors in a row of the widest tile.
template <Isa isa>
constexpr int kTileVectors = isa == Isa::kAvx512 ? 4 : 2;

// How A is stored: row m contains either A[m, :] or A[:, m].
using RowsOfA = std::false_type;
using ColumnsOfA = std::true_type;
using Overwrite = std::false_type;
using Add = std::true_type;

template <typename Sum, typename Right, typename Operand>
FASTSSL_INLINE void multiply_add(Sum& sum, Operand left, const Right& right) {
  if constexpr (kIsPair<Operand>) {
#if FASTSSL_HAS_ISA_VARIANTS
    const Right spread = left - Right{};
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(right), "v"(spread));
#endif
  } else {
    sum += left * right;
  }
}

template <Isa isa, int kVectors, typename Transposed, typename Adding, typename Operand, typename Sum>
FASTSSL_INLINE void multiply_tile(
    const Operand* __restrict a,
    int64_t lda,
    int64_t depth,
    const Operand* __restrict b,
    int64_t ldb,
    Sum* __restrict c,
    int64_t ldc) {
  using SumVector = typename Simd<isa, Sum>::Vector;
  using Vector = typename Simd<isa, Operand>::Vector;
  constexpr int kLanes = Simd<isa, Sum>::kLanes;
  SumVector sum[kTileRows][kVectors];
#pragma GCC unroll 6
  for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      sum[row][i] = SumVector{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      __builtin_memcpy(&right[i], b + k * ldb + i * kLanes, sizeof(Vector));
    }
#pragma GCC unroll 6
    for (int row = 0; row < kTileRows; ++row) {
      const Operand left = Transposed::value ? a[k * lda + row] : a[row * lda + k];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        multiply_add(sum[row][i], left, right[i]);
      }
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (Adding::value) {
        SumVector before;
        __builtin_memcpy(&before, c + row * ldc + i * kLanes, sizeof(SumVector));
        sum[row][i] += before;
      }
      __builtin_memcpy(c + row * ldc + i * kLanes, &sum[row][i], sizeof(SumVector));
    }
  }
}

template <Isa isa, int kVectors, typename Transposed, typename Adding, typename Operand, typename Sum>
FASTSSL_INLINE void multiply_panel(
    const Operand* a, int64_t lda, int64_t rows, int64_t depth, const Operand* b, int64_t ldb, Sum* c, int64_t ldc) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const Operand* first = a + (Transposed::value ? row : row * lda);
    const int64_t chain = kIsPair<Operand> ? depth : std::min(depth, kLongestChain<isa>);
    multiply_tile<isa, kVectors, Transposed, Adding>(first, lda, chain, b, ldb, c + row * ldc, ldc);
    // Pairs need no short chains: they round more coarsely anyway, and GCC would not keep their sums in registers here.
    if constexpr (!kIsPair<Operand>) {
      for (int64_t k = chain; k < depth; k += chain) {
        multiply_tile<isa, kVectors, Transposed, Add>(
            first + (Transposed::value ? k * lda : k), lda, std::min(chain, depth - k), b + k * ldb, ldb, c + row * ldc,
            ldc);
      }
    }
  }
}

template <Isa isa, typename Transposed, typename Adding, typename Operand, typename Sum>
FASTSSL_INLINE void multiply_blocks_body(
    Transposed,
    Adding,
    const Operand* a,
    int64_t lda,
    int64_t rows,
    int64_t depth,
    const Operand* b,
    int64_t ldb,
    int64_t columns,
    Sum* c,
    int64_t ldc) {
  constexpr int kLanes = Simd<isa, Sum>::kLanes;
  constexpr int kMost = kTileVectors<isa>;
  for (int64_t vectors = round_up(columns, kTileColumns) / kLanes; vectors > 0;) {
    // Make the panels as equal as possible, because a panel of one vector cannot keep the multipliers busy: five
    // vectors become 3 + 2.
    const int64_t width = divide_up(vectors, divide_up(vectors, kMost));
    if constexpr (kMost == 4) {
      if (width == 4) {
        multiply_panel<isa, 4, Transposed, Adding>(a, lda, rows, depth, b, ldb, c, ldc);
      } else if (width == 3) {
        multiply_panel<isa, 3, Transposed, Adding>(a, lda, rows, depth, b, ldb, c, ldc);
      }
    }
    if (width == 2) {
      multiply_panel<isa, 2, Transposed, Adding>(a, lda, rows, depth, b, ldb, c, ldc);
    } else if (width == 1) {
      multiply_panel<isa, 1, Transposed, Adding>(a, lda, rows, depth, b, ldb, c, ldc);
    }
    vectors -= width;
    b += width * kLanes;
    c += width * kLanes;
  }
}
FASTSSL_ISA_VARIANTS(multiply_blocks)

// C = A B, or C += A B, with A (rows, depth) and B (depth, columns). ld* is the number of elements from one row in
// memory to the next. If the operands are pairs, depth and ld* count pairs.
template <typename Transposed, typename Adding, typename Operand, typename Sum>
void multiply(
    Transposed transposed,
    Adding adding,
    const Operand* a,
    int64_t lda,
    int64_t rows,
    int64_t depth,
    const Operand* b,
    int64_t ldb,
    int64_t columns,
    Sum* c,
    int64_t ldc) {
  if constexpr (!kIsPair<Operand>) {
    multiply_blocks(transposed, adding, a, lda, rows, depth, b, ldb, columns, c, ldc);
  } else {
#if FASTSSL_HAS_ISA_VARIANTS
    multiply_blocks_avx512(transposed, adding, a, lda, rows, depth, b, ldb, columns, c, ldc);
#endif
  }
}

// Swaps the off-diagonal blocks of `kDistance` lanes of two rows that are `kDistance` apart.
template <int kDistance, typename Vector, std::size_t... kLane>
FASTSSL_INLINE void exchange_blocks(Vector& low, Vector& high, std::index_sequence<kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  const Vector a = low;
  const Vector b = high;
  low = __builtin_shufflevector(a, b, ((kLane & kDistance) ? kLanes + kLane - kDistance : kLane)...);
  high = __builtin_shufflevector(a, b, ((kLane & kDistance) ? kLanes + kLane : kLane + kDistance)...);
}

template <int kDistance, typename Vector, int kLanes>
FASTSSL_INLINE void transpose_registers(Vector (&rows)[kLanes]) {
  if constexpr (kDistance < kLanes) {
#pragma GCC unroll 16
    for (int row = 0; row < kLanes; ++row) {
      if ((row & kDistance) == 0) {
        exchange_blocks<kDistance>(rows[row], rows[row + kDistance], std::make_index_sequence<kLanes>{});
      }
    }
    transpose_registers<2 * kDistance>(rows);
  }
}

// out[column][row] = x[row][column], with rows and columns rounded up to a multiple of 16.
template <Isa isa, typename T>
FASTSSL_INLINE void transpose_body(const T* x, int64_t ldx, int64_t rows, int64_t columns, T* out, int64_t ldout) {
  using Vector = typename Simd<isa, T>::Vector;
  constexpr int kLanes = Simd<isa, T>::kLanes;
  rows = round_up(rows, kTileColumns);
  columns = round_up(columns, kTileColumns);
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      Vector tile[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        __builtin_memcpy(&tile[i], x + (row + i) * ldx + column, sizeof(Vector));
      }
      transpose_registers<1>(tile);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        __builtin_memcpy(out + (column + i) * ldout + row, &tile[i], sizeof(Vector));
      }
    }
  }
}
FASTSSL_ISA_VARIANTS(transpose)

}  // namespace fastssl
