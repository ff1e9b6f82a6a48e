// Mean and rstd (1 / standard deviation) for group norm on the CPU: over stored rows, or, for the first layer, from the
// moments of the waveform's windows. Derivation: fastssl/kernels/strided_conv/README.md.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../common/isa.h"
#include "../common/tensor_checks.h"
#include "rows.h"

namespace fastssl {
namespace {

using namespace strided_conv;

// Mean and rstd over the frames of one sequence, for a few channels, in two passes.
template <Isa isa, typename scalar_t, typename acc_t>
FASTSSL_INLINE void group_statistics_body(
    const scalar_t* x, const acc_t* bias, int64_t frames, int64_t row_stride, int64_t channels, double eps, acc_t* mean,
    acc_t* rstd) {
  double sum[kGroupChannels] = {};
  double square[kGroupChannels] = {};
  for (int64_t t = 0; t < frames; ++t) {
    for (int64_t c = 0; c < channels; ++c) {
      sum[c] += static_cast<double>(x[t * row_stride + c]);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    sum[c] /= frames;
  }
  for (int64_t t = 0; t < frames; ++t) {
    for (int64_t c = 0; c < channels; ++c) {
      const double centred = static_cast<double>(x[t * row_stride + c]) - sum[c];
      square[c] += centred * centred;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<acc_t>(sum[c] + static_cast<double>(bias[c]));
    rstd[c] = static_cast<acc_t>(1 / std::sqrt(square[c] / frames + eps));
  }
}
FASTSSL_ISA_VARIANTS(group_statistics)

Tensor compute_group_statistics(
    const Tensor& conv_out,  // (N, C)
    const Tensor& parameters,  // (3, C)
    const Tensor& cu_seqlens,  // (B + 1,)
    double eps) {
  check_tensor(conv_out, "conv_out", 2, conv_out.scalar_type());
  check_tensor(cu_seqlens, "cu_seqlens", 1, ScalarType::Int);
  const int64_t channels = conv_out.size(1);
  const int64_t sequences = cu_seqlens.size(0) - 1;
  const int32_t* begins = cu_seqlens.const_data_ptr<int32_t>();
  Tensor statistics = torch::stable::new_zeros(parameters, {2, sequences, channels});
  dispatch_floating(conv_out.scalar_type(), "strided_conv", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const scalar_t* data = conv_out.const_data_ptr<scalar_t>();
    const acc_t* bias = parameters.const_data_ptr<acc_t>();
    acc_t* mean = statistics.mutable_data_ptr<acc_t>();
    for_each_group_tile(cu_seqlens, channels, [&](const GroupTile& tile) {
      const int64_t c = tile.first_channel;
      acc_t* out = mean + tile.sequence * channels + c;
      group_statistics(
          data + begins[tile.sequence] * channels + c, bias + c, tile.frames, channels, tile.channels, eps, out,
          out + sequences * channels);
    });
  });
  return statistics;
}

// Number of windows per task for the first layer's statistics.
constexpr int64_t kMomentFrames = 1024;

// Adds the windows of a few frames to `out` (K,); if `mean` is given, adds their centred products to `out` (K, K).
template <Isa isa, typename scalar_t>
FASTSSL_INLINE void window_moments_body(
    const scalar_t* samples,
    int64_t frames,
    int64_t kernel,
    int64_t stride,
    const double* mean,
    double* centred,
    double* out) {
  for (int64_t t = 0; t < frames; ++t) {
    const scalar_t* window = samples + t * stride;
    if (mean == nullptr) {
      for (int64_t k = 0; k < kernel; ++k) {
        out[k] += static_cast<double>(window[k]);
      }
      continue;
    }
    for (int64_t k = 0; k < kernel; ++k) {
      centred[k] = static_cast<double>(window[k]) - mean[k];
    }
    for (int64_t j = 0; j < kernel; ++j) {
      for (int64_t k = 0; k < kernel; ++k) {
        out[j * kernel + k] += centred[j] * centred[k];
      }
    }
  }
}
FASTSSL_ISA_VARIANTS(window_moments)

// The mean (K,) of the windows of one sequence; if `mean` is given, their covariance (K, K).
template <typename scalar_t>
void average_windows(
    const scalar_t* samples, int64_t frames, int64_t kernel, int64_t stride, const double* mean, double* out) {
  const int64_t width = mean == nullptr ? kernel : kernel * kernel;
  const int64_t tasks = divide_up(frames, kMomentFrames);
  std::vector<double> partial(tasks * width);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    std::vector<double> centred(kernel);
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task * kMomentFrames;
      window_moments(
          samples + begin * stride, std::min(kMomentFrames, frames - begin), kernel, stride, mean, centred.data(),
          partial.data() + task * width);
    }
  });
  for (int64_t i = 0; i < width; ++i) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) {
      sum += partial[task * width + i];
    }
    out[i] = sum / frames;
  }
}

// The statistics of group norm in the first layer, from the mean and covariance of the waveform's windows.
std::tuple<Tensor, Tensor, Tensor> first_layer_statistics(
    const Tensor& x,  // (N_in, 1)
    const Tensor& taps,  // (K, C)
    const Tensor& parameters,  // (3, C)
    const Tensor& cu_seqlens_in,  // (B + 1,)
    const Tensor& cu_seqlens,  // (B + 1,)
    int64_t stride,
    double eps) {
  check_tensor(x, "x", 2, x.scalar_type());
  check_tensor(cu_seqlens_in, "cu_seqlens_in", 1, ScalarType::Int);
  check_tensor(cu_seqlens, "cu_seqlens", 1, ScalarType::Int);
  const int64_t kernel = taps.size(0);
  const int64_t channels = taps.size(1);
  const int64_t sequences = cu_seqlens.size(0) - 1;
  const int32_t* begins_in = cu_seqlens_in.const_data_ptr<int32_t>();
  const int32_t* begins = cu_seqlens.const_data_ptr<int32_t>();
  Tensor statistics = torch::stable::new_zeros(parameters, {2, sequences, channels});
  Tensor means = torch::stable::new_zeros(parameters, {sequences, kernel}, ScalarType::Double);
  Tensor covariances = torch::stable::new_zeros(parameters, {sequences, kernel, kernel}, ScalarType::Double);
  dispatch_floating(x.scalar_type(), "strided_conv", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const scalar_t* samples = x.const_data_ptr<scalar_t>();
    const acc_t* weight = taps.const_data_ptr<acc_t>();
    const acc_t* bias = parameters.const_data_ptr<acc_t>();
    acc_t* mean_out = statistics.mutable_data_ptr<acc_t>();
    for (int64_t sequence = 0; sequence < sequences; ++sequence) {
      const int64_t frames = begins[sequence + 1] - begins[sequence];
      if (frames == 0) {
        continue;
      }
      double* mean = means.mutable_data_ptr<double>() + sequence * kernel;
      double* covariance = covariances.mutable_data_ptr<double>() + sequence * kernel * kernel;
      average_windows<scalar_t>(samples + begins_in[sequence], frames, kernel, stride, nullptr, mean);
      average_windows<scalar_t>(samples + begins_in[sequence], frames, kernel, stride, mean, covariance);
      for (int64_t c = 0; c < channels; ++c) {
        double level = static_cast<double>(bias[c]);
        double variance = 0;
        for (int64_t j = 0; j < kernel; ++j) {
          double product = 0;
          for (int64_t k = 0; k < kernel; ++k) {
            product += covariance[j * kernel + k] * static_cast<double>(weight[k * channels + c]);
          }
          level += mean[j] * static_cast<double>(weight[j * channels + c]);
          variance += product * static_cast<double>(weight[j * channels + c]);
        }
        const int64_t index = sequence * channels + c;
        mean_out[index] = static_cast<acc_t>(level);
        mean_out[sequences * channels + index] = static_cast<acc_t>(1 / std::sqrt(std::max(variance, 0.0) + eps));
      }
    }
  });
  return {statistics, means, covariances};
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl_native, CPU, m) {
  m.impl("strided_conv_group_statistics", TORCH_BOX(&fastssl::compute_group_statistics));
  m.impl("strided_conv_first_statistics", TORCH_BOX(&fastssl::first_layer_statistics));
}
