// Elementary functions that the compiler vectorises in a plain loop, for any instruction set of isa.h: they have no
// branches, calls or tables. Errors in float are at most 2 units in the last place for exp and log, and 2e-7 absolute
// for the normal distribution and GELU (a tenth of that where they are small). The double versions, for gradient
// checks, call the C library.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "isa.h"

namespace fastssl {

// e^x; 0 below the smallest normal number, infinity above the largest, NaN for NaN.
FASTSSL_INLINE float vector_exp(float x) {
  constexpr float kLowest = -87.33654f;
  constexpr float kHighest = 88.72283f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < kLowest ? kLowest : (x > kHighest ? kHighest : x);
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  // Compute 2^n in two factors, because 2^128 is not a float.
  const int32_t exponent = __builtin_bit_cast(int32_t, shifted) - __builtin_bit_cast(int32_t, kRound);
  const int32_t half = exponent >> 1;
  const float scale_1 = __builtin_bit_cast(float, (half + 127) << 23);
  const float scale_2 = __builtin_bit_cast(float, (exponent - half + 127) << 23);
  const float y = p * scale_1 * scale_2;
  return x < kLowest ? 0.0f : (x > kHighest ? std::numeric_limits<float>::infinity() : y);
}

FASTSSL_INLINE double vector_exp(double x) {
  return std::exp(x);
}

// The natural logarithm. x must be a positive normal number.
FASTSSL_INLINE float vector_log(float x) {
  const int32_t bits = __builtin_bit_cast(int32_t, x);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // x = (1 + r) 2^exponent with 1 + r from sqrt(1/2) to sqrt(2)
  const float r = __builtin_bit_cast(float, bits - (exponent << 23)) - 1.0f;
  const float n = static_cast<float>(exponent);
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float square = r * r;
  const float low = (square * r * p - n * 2.12194440e-4f) - 0.5f * square;  // ln 2 in two parts
  return r + low + n * 0.693359375f;
}

FASTSSL_INLINE double vector_log(double x) {
  return std::log(x);
}

// The standard normal distribution at x: the probability below x, and the density times the square root of 2 pi.
template <typename T>
struct Normal {
  T below;
  T bell;
};

FASTSSL_INLINE Normal<float> normal_at(float x) {
  // erfc(z) = exp(-z^2) P(t), t = 1 / (1 + 0.4 z). The coefficients are a minimax fit of P with a relative error of
  // 1.3e-7.
  const float bell = vector_exp(-0.5f * x * x);
  const float t = 1.0f / (1.0f + 0.4f * 0.70710678f * (x < 0.0f ? -x : x));
  float p = 0.0502621010f;
  p = p * t - 0.182901472f;
  p = p * t + 0.169085637f;
  p = p * t - 0.00560788950f;
  p = p * t + 0.141431704f;
  p = p * t + 0.168541878f;
  p = p * t + 0.207842723f;
  p = p * t + 0.225669593f;
  p = p * t + 0.225675866f;
  const float tail = 0.5f * p * t * bell;
  return {x < 0.0f ? tail : 1.0f - tail, bell};
}

FASTSSL_INLINE Normal<double> normal_at(double x) {
  return {0.5 * std::erfc(-x * 0.70710678118654752440), std::exp(-0.5 * x * x)};
}

// x times the probability that a standard normal number is below x: the exact GELU, not the tanh approximation.
template <typename T>
FASTSSL_INLINE T gelu(T x) {
  return x * normal_at(x).below;
}

// GELU with an error of at most 2e-7 times |x| or 2e-7: a rational function for the normal distribution up to 5.7
// standard deviations. Half of the operations of `gelu`, which is more accurate where the result is small.
FASTSSL_INLINE float fast_gelu(float x) {
  constexpr float kHighest = 5.7f;
  const float z = x < -kHighest ? -kHighest : (x > kHighest ? kHighest : x);
  const float square = z * z;
  float p = 2.12654037e-8f;
  p = p * square + 6.67122322e-6f;
  p = p * square + 1.9817843e-4f;
  p = p * square + 4.85389167e-3f;
  p = p * square + 3.66072394e-2f;
  p = p * square + 3.98941785e-1f;
  float q = 1.17817672e-6f;
  q = q * square + 8.37264888e-5f;
  q = q * square + 2.04833224e-3f;
  q = q * square + 3.02441698e-2f;
  q = q * square + 2.58422464e-1f;
  q = q * square + 1.0f;
  return x * (0.5f + z * (p / q));
}

// GELU with an error of at most 5e-5, less than the rounding of its result to bfloat16 or bytes: a polynomial for the
// normal distribution up to 4.4 standard deviations. A third of the operations of `gelu`.
FASTSSL_INLINE float coarse_gelu(float x) {
  constexpr float kHighest = 4.4f;
  const float square = x * x;
  float p = 3.5693975e-11f;
  p = p * square - 3.7540215e-9f;
  p = p * square + 1.7408375e-7f;
  p = p * square - 4.7248491e-6f;
  p = p * square + 8.4292806e-5f;
  p = p * square - 1.0549912e-3f;
  p = p * square + 9.6430229e-3f;
  p = p * square - 6.6076420e-2f;
  p = p * square + 3.9876160e-1f;
  const float y = x * (0.5f + x * p);
  return x < -kHighest ? 0.0f : (x > kHighest ? x : y);
}

template <typename T>
FASTSSL_INLINE T gelu_derivative(T x) {
  const Normal<T> normal = normal_at(x);
  return normal.below + x * normal.bell * static_cast<T>(0.39894228040143267794);
}

}  // namespace fastssl
