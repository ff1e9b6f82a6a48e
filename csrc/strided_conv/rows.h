// The row-wise work of strided_conv on the CPU: the first layer's convolution, norm, activation, and their backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../common/convert.h"
#include "../common/integers.h"
#include "../common/lanes.h"
#include "../common/tensor_checks.h"
#include "../common/vector_math.h"

namespace fastssl::strided_conv {

// Rows per task: enough to justify the overhead of a task, few enough to sum in fp32.
constexpr int64_t kSegmentRows = 64;
constexpr int64_t kLanes = 16;
// Channels per task of the group norms, whose sums run over time.
constexpr int64_t kGroupChannels = 32;

// Consecutive grid rows of one sequence.
struct Segment {
  int64_t sequence;
  int64_t first_frame;
  int64_t frames;  // number of leading rows that hold a frame; the others are zero
  int64_t rows;
  int64_t block_row;  // row of the first frame within the block
};

enum class Norm { kNone, kGroup, kLayer };

// What a layer does with the output of its convolution. Missing parameters are 0 (biases) or 1 (norm_weight).
template <typename acc_t>
struct Layer {
  int64_t channels;
  Norm norm;
  bool gelu;
  acc_t eps;
  const acc_t* bias;  // (C,)
  const acc_t* norm_weight;  // (C,)
  const acc_t* norm_bias;  // (C,)
  const acc_t* mean;  // (B, C), group norm only
  const acc_t* rstd;  // (B, C), group norm only
};

// standard = (z + bias - mean) * rstd, or z + bias without a norm. Returns the rstd of layer norm, else 1.
template <typename scalar_t, typename acc_t>
FASTSSL_INLINE acc_t standardise(const Layer<acc_t>& layer, int64_t sequence, const scalar_t* z, acc_t* standard) {
  const int64_t channels = layer.channels;
  const acc_t* bias = layer.bias;
  if (layer.norm == Norm::kGroup) {
    const acc_t* mean = layer.mean + sequence * channels;
    const acc_t* rstd = layer.rstd + sequence * channels;
    for (int64_t c = 0; c < channels; ++c) {
      standard[c] = (static_cast<acc_t>(z[c]) + bias[c] - mean[c]) * rstd[c];
    }
    return 1;
  }
  for (int64_t c = 0; c < channels; ++c) {
    standard[c] = static_cast<acc_t>(z[c]) + bias[c];
  }
  if (layer.norm == Norm::kNone) {
    return 1;
  }
  const acc_t mean = sum_in_order<kLanes, acc_t>(channels, [=](int64_t c) { return standard[c]; }) / channels;
  const acc_t variance = sum_in_order<kLanes, acc_t>(channels, [=](int64_t c) {
    const acc_t centred = standard[c] - mean;
    return centred * centred;
  }) / channels;
  const acc_t rstd = 1 / std::sqrt(variance + layer.eps);
  for (int64_t c = 0; c < channels; ++c) {
    standard[c] = (standard[c] - mean) * rstd;
  }
  return rstd;
}

template <bool kCoarse, typename scalar_t, typename acc_t>
FASTSSL_INLINE void activate(const Layer<acc_t>& layer, const acc_t* standard, scalar_t* out) {
  const acc_t* weight = layer.norm_weight;
  const acc_t* bias = layer.norm_bias;
  if (layer.gelu) {
    for (int64_t c = 0; c < layer.channels; ++c) {
      const acc_t x = standard[c] * weight[c] + bias[c];
      if constexpr (kCoarse) {
        out[c] = static_cast<scalar_t>(coarse_gelu(x));
      } else {
        out[c] = static_cast<scalar_t>(gelu(x));
      }
    }
  } else {
    for (int64_t c = 0; c < layer.channels; ++c) {
      out[c] = static_cast<scalar_t>(standard[c] * weight[c] + bias[c]);
    }
  }
}

// The gradient of the activation's input.
template <typename scalar_t, typename acc_t>
FASTSSL_INLINE void activate_backward(
    const Layer<acc_t>& layer, const acc_t* standard, const scalar_t* grad_out, acc_t* grad) {
  const acc_t* weight = layer.norm_weight;
  const acc_t* bias = layer.norm_bias;
  if (layer.gelu) {
    for (int64_t c = 0; c < layer.channels; ++c) {
      grad[c] = static_cast<acc_t>(grad_out[c]) * gelu_derivative(standard[c] * weight[c] + bias[c]);
    }
  } else {
    for (int64_t c = 0; c < layer.channels; ++c) {
      grad[c] = static_cast<acc_t>(grad_out[c]);
    }
  }
}

// Replaces the gradient of the activation's input by the gradient of the convolution's output. Adds the gradients of
// the norm's weight and bias to the last two rows of `sums` (3, C); the first row belongs to the convolution's bias.
template <typename acc_t>
FASTSSL_INLINE void layer_norm_backward(
    const Layer<acc_t>& layer, const acc_t* standard, acc_t rstd, acc_t* grad, acc_t* sums) {
  const int64_t channels = layer.channels;
  const acc_t* weight = layer.norm_weight;
  acc_t* sum_weight = sums + channels;
  acc_t* sum_bias = sums + 2 * channels;
  for (int64_t c = 0; c < channels; ++c) {
    sum_weight[c] += grad[c] * standard[c];
    sum_bias[c] += grad[c];
    grad[c] *= weight[c];
  }
  const acc_t mean = sum_in_order<kLanes, acc_t>(channels, [=](int64_t c) { return grad[c]; }) / channels;
  const acc_t product = sum_in_order<kLanes, acc_t>(channels, [=](int64_t c) { return grad[c] * standard[c]; });
  const acc_t slope = product / channels;
  for (int64_t c = 0; c < channels; ++c) {
    grad[c] = rstd * (grad[c] - mean - standard[c] * slope);
  }
}

// 64 bytes of numbers; the compiler splits them into registers of the instruction set.
template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
};

// z = window . taps, the first layer's convolution at one frame. Keeps four vectors of channels in registers.
template <typename acc_t>
FASTSSL_INLINE void window_product(
    const acc_t* taps,  // (K, C)
    const acc_t* window,  // (K,)
    int64_t kernel,
    int64_t channels,
    acc_t* z) {
  using vector_t = typename Vector<acc_t>::type;
  constexpr int64_t kWidth = 64 / sizeof(acc_t);
  int64_t c = 0;
  for (; c + 4 * kWidth <= channels; c += 4 * kWidth) {
    vector_t sum_0{}, sum_1{}, sum_2{}, sum_3{};
    for (int64_t k = 0; k < kernel; ++k) {
      const vector_t* row = reinterpret_cast<const vector_t*>(taps + k * channels + c);
      sum_0 += row[0] * window[k];
      sum_1 += row[1] * window[k];
      sum_2 += row[2] * window[k];
      sum_3 += row[3] * window[k];
    }
    vector_t* out = reinterpret_cast<vector_t*>(z + c);
    out[0] = sum_0;
    out[1] = sum_1;
    out[2] = sum_2;
    out[3] = sum_3;
  }
  for (; c < channels; ++c) {
    acc_t sum = 0;
    for (int64_t k = 0; k < kernel; ++k) {
      sum += taps[k * channels + c] * window[k];
    }
    z[c] = sum;
  }
}

// sums[k] += sum over rows of grad[row] * window_row[k], the gradient of the first layer's taps.
template <typename acc_t>
FASTSSL_INLINE void add_window_gradients(
    const acc_t* grad,  // (rows, C)
    const acc_t* windows,  // window of row r at r * stride
    int64_t rows,
    int64_t kernel,
    int64_t stride,
    int64_t channels,
    acc_t* sums) {  // (K, C)
  using vector_t = typename Vector<acc_t>::type;
  constexpr int64_t kWidth = 64 / sizeof(acc_t);
  int64_t c = 0;
  for (; c + 4 * kWidth <= channels; c += 4 * kWidth) {
    for (int64_t k = 0; k < kernel; ++k) {
      vector_t* sum = reinterpret_cast<vector_t*>(sums + k * channels + c);
      vector_t sum_0 = sum[0], sum_1 = sum[1], sum_2 = sum[2], sum_3 = sum[3];
      for (int64_t r = 0; r < rows; ++r) {
        const vector_t* row = reinterpret_cast<const vector_t*>(grad + r * channels + c);
        const acc_t sample = windows[r * stride + k];
        sum_0 += row[0] * sample;
        sum_1 += row[1] * sample;
        sum_2 += row[2] * sample;
        sum_3 += row[3] * sample;
      }
      sum[0] = sum_0;
      sum[1] = sum_1;
      sum[2] = sum_2;
      sum[3] = sum_3;
    }
  }
  for (; c < channels; ++c) {
    for (int64_t k = 0; k < kernel; ++k) {
      for (int64_t r = 0; r < rows; ++r) {
        sums[k * channels + c] += grad[r * channels + c] * windows[r * stride + k];
      }
    }
  }
}

// Where the rows of the convolution come from: memory, or, for the first layer, the waveform.
template <typename scalar_t, typename acc_t>
struct Source {
  const scalar_t* data;
  const int32_t* begins;  // where each sequence of `data` begins, or nullptr if `data` is the block itself
  const acc_t* taps;  // (K, C) of the first layer
  int64_t kernel;  // 0 if `data` holds rows
  int64_t stride;

  // The size of the buffer for the windows of a segment.
  int64_t window_numbers() const {
    return kernel == 0 ? 0 : (kSegmentRows - 1) * stride + kernel;
  }
};

// Copies the samples of a segment's windows to `windows`.
template <typename scalar_t, typename acc_t>
FASTSSL_INLINE void load_windows(const Source<scalar_t, acc_t>& source, const Segment& segment, acc_t* windows) {
  const scalar_t* samples =
      source.data + source.begins[segment.sequence] + segment.first_frame * source.stride;
  const int64_t count = (segment.frames - 1) * source.stride + source.kernel;
  convert(windows, samples, count);
}

// Standardises one frame of a segment. Returns the rstd of layer norm, else 1.
template <typename scalar_t, typename acc_t>
FASTSSL_INLINE acc_t standardise_frame(
    const Source<scalar_t, acc_t>& source,
    const Layer<acc_t>& layer,
    const Segment& segment,
    int64_t frame,
    const acc_t* windows,
    acc_t* standard) {
  if (source.kernel > 0) {
    window_product(source.taps, windows + frame * source.stride, source.kernel, layer.channels, standard);
    return standardise(layer, segment.sequence, standard, standard);
  }
  const int64_t row =
      source.begins ? source.begins[segment.sequence] + segment.first_frame + frame : segment.block_row + frame;
  return standardise(layer, segment.sequence, source.data + row * layer.channels, standard);
}

// Where rows of the result go: each is copied into all windows of the next layer that contain it.
template <typename scalar_t>
struct Windows {
  scalar_t* data;  // (count, kernel * C)
  int64_t count;
  int64_t kernel;
  int64_t stride;
};

// Gradients of a block's rows in the order in which the next layer's products write them. The gradient of row
// u * phases + p is in `first` if p < first_phases, else in `second` if p < first_phases + second_phases. Other rows
// have a gradient of zero, because no window contains them.
template <typename scalar_t>
struct Gradients {
  const scalar_t* first;
  const scalar_t* second;
  int64_t first_phases;
  int64_t second_phases;
  int64_t phases;
  int64_t channels;
  const scalar_t* zeros;  // (C,)
};

template <typename scalar_t>
Gradients<scalar_t> make_gradients(
    const Tensor& first,  // (U, first_phases * C), or packed (N, C)
    const Tensor& second,  // (U, second_phases * C)
    int64_t phases,
    const std::vector<scalar_t>& zeros) {  // (C,)
  const int64_t channels = zeros.size();
  return {
      first.const_data_ptr<scalar_t>(),
      second.const_data_ptr<scalar_t>(),
      first.size(1) / channels,
      second.size(1) / channels,
      phases,
      channels,
      zeros.data()};
}

template <typename scalar_t>
FASTSSL_INLINE const scalar_t* gradient_row(const Gradients<scalar_t>& grads, int64_t row) {
  const int64_t u = row / grads.phases;
  const int64_t phase = row - u * grads.phases;
  if (phase < grads.first_phases) {
    return grads.first + (u * grads.first_phases + phase) * grads.channels;
  }
  if (phase < grads.first_phases + grads.second_phases) {
    return grads.second + (u * grads.second_phases + phase - grads.first_phases) * grads.channels;
  }
  return grads.zeros;
}

// The work of one task of a group norm: up to kGroupChannels channels of all frames of one sequence.
struct GroupTile {
  int64_t sequence;
  int64_t frames;
  int64_t first_channel;
  int64_t channels;
};

// Calls `function(tile)` for all tiles of sequences that have frames, in parallel.
template <typename Function>
void for_each_group_tile(const Tensor& cu_seqlens, int64_t channels, const Function& function) {
  const int32_t* begins = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t tiles = divide_up(channels, kGroupChannels);
  torch::stable::parallel_for(0, (cu_seqlens.size(0) - 1) * tiles, 1, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t sequence = index / tiles;
      const int64_t channel = (index % tiles) * kGroupChannels;
      const int64_t frames = begins[sequence + 1] - begins[sequence];
      if (frames > 0) {
        function(GroupTile{sequence, frames, channel, std::min(kGroupChannels, channels - channel)});
      }
    }
  });
}

}  // namespace fastssl::strided_conv
