// What happens to the rows of a product: input rows become units of the weight's format, and sums become output rows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <torch/headeronly/util/BFloat16.h>

#include "../common/convert.h"
#include "../common/integers.h"
#include "../common/lanes.h"
#include "../common/simd.h"
#include "../common/vector_math.h"
#include "multiply.h"

namespace fastssl::prepacked {

using torch::headeronly::BFloat16;

// A row as bytes: x is about scale * (byte - zero).
struct ByteRow {
  float scale;
  float zero;
};

// Writes a row as unsigned bytes that range from its smallest to its largest value, or to zero if that lies outside.
// A row with NaN or infinity, or whose range is infinite in float, gets a scale of NaN.
template <Isa isa>
FASTSSL_INLINE ByteRow quantize_row(const float* x, int64_t channels, uint8_t* out) {
  constexpr int64_t kLanes = 64;
  float low[kLanes] = {};
  float high[kLanes] = {};
  float probe[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = x[c + lane];
      low[lane] = value < low[lane] ? value : low[lane];
      high[lane] = value > high[lane] ? value : high[lane];
      probe[lane] += value * 0.0f;
    }
  }
  for (int64_t lane = 0; c < channels; ++c, ++lane) {
    low[lane] = x[c] < low[lane] ? x[c] : low[lane];
    high[lane] = x[c] > high[lane] ? x[c] : high[lane];
    probe[lane] += x[c] * 0.0f;
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      low[lane] = low[lane + half] < low[lane] ? low[lane + half] : low[lane];
      high[lane] = high[lane + half] > high[lane] ? high[lane + half] : high[lane];
      probe[lane] += probe[lane + half];
    }
  }
  const float range = high[0] - low[0];
  const bool usable = range > 1e-30f && range <= std::numeric_limits<float>::max();
  const float inverse = usable ? 255.0f / range : 0.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float zero = usable ? (-low[0] * inverse + kRound) - kRound : 0.0f;
  for (int64_t i = 0; i < channels; ++i) {
    const float shifted = x[i] * inverse + kRound;
    const int32_t rounded = __builtin_bit_cast(int32_t, shifted) - __builtin_bit_cast(int32_t, kRound);
    const int32_t byte = rounded + static_cast<int32_t>(zero);
    out[i] = static_cast<uint8_t>(byte < 0 ? 0 : (byte > 255 ? 255 : byte));
  }
  const float unusable = range > 1e-30f ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
  return {(usable ? range / 255.0f : unusable) + probe[0], zero};
}

// Copies `channels` values of an input row to units of the format, and fills the last unit with zeros.
template <Isa isa, Format format, typename scalar_t>
FASTSSL_INLINE ByteRow convert_row(const scalar_t* x, int64_t channels, int64_t units, float* wide, uint32_t* out) {
  out[units - 1] = 0;
  if constexpr (format == Format::kInt8Dot) {
    convert(wide, x, channels);
    return quantize_row<isa>(wide, channels, reinterpret_cast<uint8_t*>(out));
  } else if constexpr (format == Format::kFloat) {
    convert(reinterpret_cast<float*>(out), x, channels);
  } else if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    std::memcpy(out, x, channels * sizeof(BFloat16));
  } else {
    convert(reinterpret_cast<BFloat16*>(out), x, channels);
  }
  return {1.0f, 0.0f};
}

template <Isa isa, bool kCoarse>
FASTSSL_INLINE void gelu_row(float* x, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    x[c] = kCoarse ? coarse_gelu(x[c]) : fast_gelu(x[c]);
  }
}

template <Isa isa>
FASTSSL_INLINE void normalize_row(float* x, int64_t channels, const float* weight, const float* bias, float eps) {
  const float mean = sum_by_halves<64, float>(channels, [=](int64_t c) { return x[c]; }) / channels;
  const float variance = sum_by_halves<64, float>(channels, [=](int64_t c) {
    return (x[c] - mean) * (x[c] - mean);
  }) / channels;
  const float rstd = 1.0f / std::sqrt(variance + eps);
  for (int64_t c = 0; c < channels; ++c) {
    x[c] = (x[c] - mean) * rstd * weight[c] + bias[c];
  }
}

}  // namespace fastssl::prepacked
