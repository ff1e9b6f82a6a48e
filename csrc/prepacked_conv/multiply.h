// Matrix products of rows with prepacked weights. Derivation: fastssl/kernels/prepacked_conv/README.md.
//
// Operands are stored in units of four bytes: 1 float, 2 bfloat16 or 4 bytes that are neighbours along the depth of the
// product. A panel holds 64 columns of a weight, [step][column], one unit per step and column. A tile of 6 rows by up
// to 4 vectors of sums stays in registers; the last rows of a block may be a tile of 4, 2 or 1. The bits of a row do not
// depend on the rows that it is computed with.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/isa.h"
#include "../common/simd.h"

namespace fastssl::prepacked {

constexpr int64_t kPanelColumns = 64;
constexpr int kTallestTile = 6;

// How operands are stored and multiplied. Products in bytes need a processor that has an instruction for them; those in
// bfloat16 also run on others, where each unit is split into two floats.
enum class Format { kFloat, kBFloat16, kBFloat16Dot, kInt8Dot };

template <Format format>
using FormatTag = std::integral_constant<Format, format>;

// Number of values in a unit.
constexpr int64_t values_per_unit(Format format) {
  return format == Format::kFloat ? 1 : format == Format::kInt8Dot ? 4 : 2;
}

template <Isa isa, Format format>
struct Multiplier {
  using Sum = std::conditional_t<format == Format::kInt8Dot, int32_t, float>;
  using SumVector = typename Simd<isa, Sum>::Vector;
  using Units = typename Simd<isa, uint32_t>::Vector;
  using Floats = typename Simd<isa, float>::Vector;

  static FASTSSL_INLINE void add(SumVector& sum, const Units& left, const Units& right) {
    if constexpr (format == Format::kFloat) {
      sum += (Floats)left * (Floats)right;
    } else if constexpr (format == Format::kBFloat16) {
      sum += (Floats)(left << 16) * (Floats)(right << 16);
      sum += (Floats)(left & 0xFFFF0000u) * (Floats)(right & 0xFFFF0000u);
    } else {
#if FASTSSL_HAS_ISA_VARIANTS
      SumVector total = sum;  // GCC would keep `sum` itself in memory
      if constexpr (format == Format::kBFloat16Dot) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(total) : "v"(left), "v"(right));
      } else {  // unsigned bytes of `left` times signed bytes of `right`
        asm("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(left), "v"(right));
      }
      sum = total;
#endif
    }
  }
};

template <Isa isa, Format format, int kVectors, typename SumVector, typename Units>
FASTSSL_INLINE void add_products(SumVector (&sums)[kVectors], uint32_t unit, const Units (&right)[kVectors]) {
  const Units left = unit - Units{};
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) {
    Multiplier<isa, format>::add(sums[i], left, right[i]);
  }
}

// Sums of products over `steps` units: out[row][i] for the vectors of columns from `panel` on.
template <Isa isa, Format format, int kRows, int kVectors, typename SumVector>
FASTSSL_INLINE void multiply_tile(
    const uint32_t* const* rows,
    int64_t offset,  // unit of the rows to begin with
    int64_t steps,
    const uint32_t* panel,
    SumVector (*out)[kVectors]) {
  using Units = typename Simd<isa, uint32_t>::Vector;
  constexpr int kLanes = Simd<isa, uint32_t>::kLanes;
  // Rows that the tile does not have are never read.
  const uint32_t* row_0 = rows[0] + offset;
  const uint32_t* row_1 = rows[kRows > 1 ? 1 : 0] + offset;
  const uint32_t* row_2 = rows[kRows > 2 ? 2 : 0] + offset;
  const uint32_t* row_3 = rows[kRows > 3 ? 3 : 0] + offset;
  const uint32_t* row_4 = rows[kRows > 4 ? 4 : 0] + offset;
  const uint32_t* row_5 = rows[kRows > 5 ? 5 : 0] + offset;
  SumVector sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      sums[row][i] = SumVector{};
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    Units right[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      __builtin_memcpy(&right[i], panel + step * kPanelColumns + i * kLanes, sizeof(Units));
    }
    add_products<isa, format>(sums[0], row_0[step], right);
    if constexpr (kRows > 1) {
      add_products<isa, format>(sums[1], row_1[step], right);
    }
    if constexpr (kRows > 2) {
      add_products<isa, format>(sums[2], row_2[step], right);
      add_products<isa, format>(sums[3], row_3[step], right);
    }
    if constexpr (kRows > 4) {
      add_products<isa, format>(sums[4], row_4[step], right);
      add_products<isa, format>(sums[5], row_5[step], right);
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      __builtin_memcpy(&out[row][i], &sums[row][i], sizeof(SumVector));
    }
  }
}

}  // namespace fastssl::prepacked
