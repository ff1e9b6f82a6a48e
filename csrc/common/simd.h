// The vector registers of an instruction set, as GCC's vector types.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"

namespace fastssl {

template <Isa isa, typename T>
struct Simd {
  static constexpr int kBytes = isa == Isa::kAvx512 ? 64 : isa == Isa::kAvx2 ? 32 : 16;
  static constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));
  typedef T Vector __attribute__((vector_size(kBytes)));
};

// The largest of `count` elements; `count` is a multiple of kWidth. Written with vector types, because GCC does not
// vectorise a plain loop over kWidth partial maxima, which would take four times as long.
template <Isa isa, int kWidth, typename T>
FASTSSL_INLINE T largest(const T* x, int64_t count) {
  using Vector = typename Simd<isa, T>::Vector;
  constexpr int kLanes = Simd<isa, T>::kLanes;
  constexpr int kVectors = kWidth / kLanes;
  Vector most[kVectors];
  __builtin_memcpy(most, x, sizeof(most));
  for (int64_t i = kWidth; i < count; i += kWidth) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      Vector value;
      __builtin_memcpy(&value, x + i + j * kLanes, sizeof(value));
      most[j] = value > most[j] ? value : most[j];
    }
  }
  T lanes[kWidth];
  __builtin_memcpy(lanes, most, sizeof(most));
  return *std::max_element(lanes, lanes + kWidth);
}

}  // namespace fastssl
