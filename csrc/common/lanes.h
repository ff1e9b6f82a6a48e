// Sums that use a fixed number of partial sums, called lanes, because the compiler may not reorder a floating-point sum
// by itself. Term i goes to lane i % kLanes. The order of additions is the same for every instruction set.
#pragma once

#include <cstdint>

#include "inline.h"

namespace fastssl {

// Adds the upper half of the lanes to the lower half, in place, until one is left.
template <int64_t kLanes, typename T>
FASTSSL_INLINE T add_halves(T* lanes) {
#pragma GCC unroll 8
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

// The sum of term(0) to term(count - 1). Adds the lanes by halves.
template <int64_t kLanes, typename T, typename Term>
FASTSSL_INLINE T sum_by_halves(int64_t count, const Term& term) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += term(i + lane);
    }
  }
  for (int64_t lane = 0; i < count; ++i, ++lane) {
    lanes[lane] += term(i);
  }
  return add_halves<kLanes>(lanes);
}

// The sum of term(0) to term(count - 1). First adds the terms after the last multiple of kLanes, then the lanes in
// order.
template <int64_t kLanes, typename T, typename Term>
FASTSSL_INLINE T sum_in_order(int64_t count, const Term& term) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += term(i + lane);
    }
  }
  T sum = 0;
  for (; i < count; ++i) {
    sum += term(i);
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum += lanes[lane];
  }
  return sum;
}

}  // namespace fastssl
