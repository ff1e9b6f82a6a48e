// Integrate-and-fire on the GPU. Derivation and conventions: fastssl/kernels/integrate_and_fire/README.md.
//
// Each output row gathers its frames, and in the backward each frame gathers its slots. The kernels use no atomics, so
// the same inputs give the same bits, and the order of additions does not depend on the batch.

#include <algorithm>
#include <cstdint>
#include <tuple>

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>

#include "../common/integers.h"
#include "../common/launch.h"
#include "../common/tensor_checks.h"
#include "checks.h"

namespace fastssl {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kScanThreads = 256;
constexpr int kScanPiece = 1024;
constexpr int kFramesAtOnce = 4;  // loads that a warp keeps in flight

// WIDTH neighbouring channels, loaded or stored by one instruction.
template <typename scalar_t, int WIDTH>
struct alignas(sizeof(scalar_t) * WIDTH) Channels {
  scalar_t value[WIDTH];
};

// The first index in [begin, end) at which the increasing `values` exceed `bound`, or `end`.
template <typename value_t>
__device__ int first_above(const value_t* values, int begin, int end, value_t bound) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (values[middle] > bound) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// One warp per output row.
template <typename scalar_t, typename acc_t, int WIDTH>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) forward_kernel(
    const scalar_t* __restrict__ x_ptr,  // (N, C)
    const double* __restrict__ position,  // (N,)
    const int32_t* __restrict__ begins,  // (B + 1,)
    const int32_t* __restrict__ out_begins,  // (B + 1,)
    scalar_t* __restrict__ out_ptr,  // (N_out, C)
    int rows,
    int sequences,
    int channels,
    double threshold) {
  using Block = Channels<scalar_t, WIDTH>;
  const int row = blockIdx.x * kWarpsPerBlock + threadIdx.y;
  if (row >= rows) {
    return;
  }
  const int sequence = first_above(out_begins, 0, sequences, row) - 1;
  const int begin = begins[sequence];
  const int end = begins[sequence + 1];
  const double slot = static_cast<double>(row - out_begins[sequence]);
  const int first = first_above(position, begin, end, slot);
  int last = first;
  while (last + 1 < end && position[last] < slot + 1) {
    ++last;
  }

  for (int c = threadIdx.x * WIDTH; c < channels; c += kWarp * WIDTH) {
    acc_t sum[WIDTH] = {};
    for (int t = first; t <= last; t += kFramesAtOnce) {
      Block frames[kFramesAtOnce] = {};
#pragma unroll
      for (int u = 0; u < kFramesAtOnce; ++u) {
        if (t + u <= last) {
          frames[u] = *reinterpret_cast<const Block*>(x_ptr + static_cast<int64_t>(t + u) * channels + c);
        }
      }
#pragma unroll
      for (int u = 0; u < kFramesAtOnce; ++u) {
        if (t + u <= last) {
          const double previous = t + u == begin ? 0.0 : position[t + u - 1];
          const acc_t weight =
              static_cast<acc_t>((fmin(position[t + u], slot + 1) - fmax(previous, slot)) * threshold);
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) {
            sum[i] += weight * static_cast<acc_t>(frames[u].value[i]);
          }
        }
      }
    }
    Block result;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      result.value[i] = static_cast<scalar_t>(sum[i]);
    }
    *reinterpret_cast<Block*>(out_ptr + static_cast<int64_t>(row) * channels + c) = result;
  }
}

// One warp per input frame: computes its row of grad_x, and the gradient of the position where the frame ends.
template <typename scalar_t, typename acc_t, int WIDTH>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) backward_kernel(
    const scalar_t* __restrict__ grad_out_ptr,  // (N_out, C)
    const scalar_t* __restrict__ x_ptr,  // (N, C)
    const double* __restrict__ position,  // (N,)
    const int32_t* __restrict__ begins,  // (B + 1,)
    const int32_t* __restrict__ out_begins,  // (B + 1,)
    scalar_t* __restrict__ grad_x_ptr,  // (N, C)
    double* __restrict__ grad_position_ptr,  // (N,)
    int rows,
    int sequences,
    int channels,
    double threshold) {
  using Block = Channels<scalar_t, WIDTH>;
  const int t = blockIdx.x * kWarpsPerBlock + threadIdx.y;
  if (t >= rows) {
    return;
  }
  const int sequence = first_above(begins, 0, sequences, t) - 1;
  const int fired = out_begins[sequence + 1] - out_begins[sequence];
  const scalar_t* grads = grad_out_ptr + static_cast<int64_t>(out_begins[sequence]) * channels;
  const double reached = position[t];
  const double previous = t == begins[sequence] ? 0.0 : position[t - 1];
  const int first_slot = static_cast<int>(previous);
  const int last_slot = static_cast<int>(reached);
  const bool fires_later = last_slot < fired;
  const acc_t last_weight =
      static_cast<acc_t>((reached - fmax(previous, static_cast<double>(last_slot))) * threshold);

  acc_t dot = 0;
  for (int c = threadIdx.x * WIDTH; c < channels; c += kWarp * WIDTH) {
    acc_t sum[WIDTH] = {};
    // Slots that the frame extends beyond; most frames end in the slot where they start.
    for (int slot = first_slot; slot < last_slot && slot < fired; ++slot) {
      const acc_t weight =
          static_cast<acc_t>((slot + 1.0 - fmax(previous, static_cast<double>(slot))) * threshold);
      const Block grad = *reinterpret_cast<const Block*>(grads + static_cast<int64_t>(slot) * channels + c);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        sum[i] += weight * static_cast<acc_t>(grad.value[i]);
      }
    }
    // If the slot fired, a later frame of the same sequence completed it, so row t + 1 exists.
    if (fires_later) {
      const Block grad = *reinterpret_cast<const Block*>(grads + static_cast<int64_t>(last_slot) * channels + c);
      const Block frame = *reinterpret_cast<const Block*>(x_ptr + static_cast<int64_t>(t) * channels + c);
      const Block next = *reinterpret_cast<const Block*>(x_ptr + (static_cast<int64_t>(t) + 1) * channels + c);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const acc_t value = static_cast<acc_t>(grad.value[i]);
        sum[i] += last_weight * value;
        dot += value * (static_cast<acc_t>(frame.value[i]) - static_cast<acc_t>(next.value[i]));
      }
    }
    Block result;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      result.value[i] = static_cast<scalar_t>(sum[i]);
    }
    *reinterpret_cast<Block*>(grad_x_ptr + static_cast<int64_t>(t) * channels + c) = result;
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    dot += __shfl_xor_sync(0xffffffffu, dot, distance);
  }
  if (threadIdx.x == 0) {
    grad_position_ptr[t] = static_cast<double>(dot);
  }
}

// The sum over this lane of the warp and all earlier lanes.
__device__ double warp_scan(double value) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const double other = __shfl_up_sync(0xffffffffu, value, distance);
    if (static_cast<int>(threadIdx.x % kWarp) >= distance) {
      value += other;
    }
  }
  return value;
}

// One block per sequence: computes the running sum of the weights divided by the threshold, and the number of output
// frames (NaN if a weight is invalid). A single thread adds, so that the sums never decrease and equal those of the CPU
// to the last bit; the other threads load and divide.
template <typename scalar_t>
__global__ void __launch_bounds__(kScanThreads) scan_kernel(
    const scalar_t* __restrict__ weights,  // (N,)
    const int32_t* __restrict__ begins,  // (B + 1,)
    double* __restrict__ position,  // (N,)
    double* __restrict__ fired,  // (B,)
    double threshold) {
  constexpr int kAtOnce = 8;
  __shared__ double sums[kScanPiece];
  const int end = begins[blockIdx.x + 1];
  double sum = 0;
  bool invalid = false;
  for (int first = begins[blockIdx.x]; first < end; first += kScanPiece) {
    const int count = min(kScanPiece, end - first);
    for (int i = threadIdx.x; i < kScanPiece; i += kScanThreads) {
      const double value = i < count ? static_cast<double>(weights[first + i]) : 0.0;
      invalid |= !(value >= 0 && isfinite(value));
      sums[i] = value;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 0; i < count; i += kAtOnce) {
        double part[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          part[j] = sums[i + j];
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          sum += part[j];
          sums[i + j] = sum;
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kScanThreads) {
      position[first + i] = sums[i] / threshold;
    }
    __syncthreads();
  }
  const bool any_invalid = __syncthreads_or(invalid);
  if (threadIdx.x == 0) {
    fired[blockIdx.x] = any_invalid ? nan("") : floor(sum / threshold);
  }
}

// One block per sequence: replaces each element by the sum from it to the end of its sequence. The sequence is split
// into pieces from its end, so the order of additions depends on the sequence alone.
__global__ void __launch_bounds__(kScanThreads) reverse_scan_kernel(
    double* __restrict__ values,  // (N,)
    const int32_t* __restrict__ begins) {  // (B + 1,)
  constexpr int kWarps = kScanThreads / kWarp;
  __shared__ double warp_sums[kWarps];
  const int begin = begins[blockIdx.x];
  const int warp = threadIdx.x / kWarp;
  double carried = 0;
  for (int top = begins[blockIdx.x + 1]; top > begin; top -= kScanThreads) {
    const int t = top - 1 - static_cast<int>(threadIdx.x);
    double value = warp_scan(t >= begin ? values[t] : 0.0);
    if (threadIdx.x % kWarp == kWarp - 1) {
      warp_sums[warp] = value;
    }
    __syncthreads();
    double total = carried;
    for (int i = 0; i < kWarps; ++i) {
      if (i == warp) {
        value += total;
      }
      total += warp_sums[i];
    }
    if (t >= begin) {
      values[t] = value;
    }
    carried = total;
    __syncthreads();
  }
}

bool aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

int blocks_for(int64_t rows) {
  return static_cast<int>(divide_up(rows, kWarpsPerBlock));
}

std::tuple<Tensor, Tensor> scan(
    const Tensor& weights,  // (N,)
    const Tensor& cu_seqlens,  // (B + 1,)
    double threshold) {
  check_tensor(weights, "weights", 1, weights.scalar_type());
  check_tensor(cu_seqlens, "cu_seqlens", 1, ScalarType::Int);
  const torch::stable::accelerator::DeviceGuard guard(weights.get_device_index());
  const int64_t sequences = cu_seqlens.size(0) - 1;
  Tensor positions = torch::stable::new_empty(weights, {weights.size(0)}, ScalarType::Double);
  Tensor fired = torch::stable::new_empty(weights, {sequences}, ScalarType::Double);
  if (sequences == 0) {
    return {positions, fired};
  }
  dispatch_floating(weights.scalar_type(), "integrate_and_fire", [&](auto tag) {
    using scalar_t = decltype(tag);
    FASTSSL_LAUNCH(
        scan_kernel<scalar_t>,
        static_cast<int>(sequences),
        kScanThreads,
        current_stream(weights),
        weights.const_data_ptr<scalar_t>(),
        cu_seqlens.const_data_ptr<int32_t>(),
        positions.mutable_data_ptr<double>(),
        fired.mutable_data_ptr<double>(),
        threshold);
  });
  return {positions, fired};
}

Tensor forward(
    const Tensor& x,  // (N, C)
    const Tensor& positions,  // (N,)
    const Tensor& cu_seqlens,  // (B + 1,)
    const Tensor& cu_seqlens_out,  // (B + 1,)
    int64_t total_out,
    double threshold) {
  check_integrate_and_fire(x, positions, cu_seqlens, cu_seqlens_out);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int channels = static_cast<int>(x.size(1));
  const int sequences = static_cast<int>(cu_seqlens.size(0)) - 1;
  Tensor out = torch::stable::new_empty(x, {total_out, channels});
  if (total_out == 0 || channels == 0) {
    return out;
  }
  dispatch_floating(x.scalar_type(), "integrate_and_fire", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    constexpr int kWidth = 16 / sizeof(scalar_t);
    const scalar_t* x_data = x.const_data_ptr<scalar_t>();
    scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
    const bool wide = channels % kWidth == 0 && aligned(x_data) && aligned(out_data);
    auto* kernel = wide ? forward_kernel<scalar_t, acc_t, kWidth> : forward_kernel<scalar_t, acc_t, 1>;
    FASTSSL_LAUNCH(
        kernel,
        blocks_for(total_out),
        dim3(kWarp, kWarpsPerBlock),
        current_stream(x),
        x_data,
        positions.const_data_ptr<double>(),
        cu_seqlens.const_data_ptr<int32_t>(),
        cu_seqlens_out.const_data_ptr<int32_t>(),
        out_data,
        static_cast<int>(total_out),
        sequences,
        channels,
        threshold);
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& grad_out,  // (N_out, C)
    const Tensor& x,  // (N, C)
    const Tensor& positions,  // (N,)
    const Tensor& cu_seqlens,  // (B + 1,)
    const Tensor& cu_seqlens_out,  // (B + 1,)
    double threshold) {
  check_integrate_and_fire(x, positions, cu_seqlens, cu_seqlens_out);
  check_tensor(grad_out, "grad_out", 2, x.scalar_type());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int rows = static_cast<int>(x.size(0));
  const int channels = static_cast<int>(x.size(1));
  const int sequences = static_cast<int>(cu_seqlens.size(0)) - 1;
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weights = torch::stable::empty_like(positions);
  if (rows == 0) {
    return {grad_x, grad_weights};
  }
  const cudaStream_t stream = current_stream(x);
  dispatch_floating(x.scalar_type(), "integrate_and_fire", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    constexpr int kWidth = 16 / sizeof(scalar_t);
    const scalar_t* x_data = x.const_data_ptr<scalar_t>();
    const scalar_t* grad_out_data = grad_out.const_data_ptr<scalar_t>();
    scalar_t* grad_x_data = grad_x.mutable_data_ptr<scalar_t>();
    const bool wide =
        channels % kWidth == 0 && aligned(x_data) && aligned(grad_out_data) && aligned(grad_x_data);
    auto* kernel = wide ? backward_kernel<scalar_t, acc_t, kWidth> : backward_kernel<scalar_t, acc_t, 1>;
    FASTSSL_LAUNCH(
        kernel,
        blocks_for(rows),
        dim3(kWarp, kWarpsPerBlock),
        stream,
        grad_out_data,
        x_data,
        positions.const_data_ptr<double>(),
        cu_seqlens.const_data_ptr<int32_t>(),
        cu_seqlens_out.const_data_ptr<int32_t>(),
        grad_x_data,
        grad_weights.mutable_data_ptr<double>(),
        rows,
        sequences,
        channels,
        threshold);
  });
  FASTSSL_LAUNCH(
      reverse_scan_kernel,
      sequences,
      kScanThreads,
      stream,
      grad_weights.mutable_data_ptr<double>(),
      cu_seqlens.const_data_ptr<int32_t>());
  return {grad_x, grad_weights};
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl_native, CUDA, m) {
  m.impl("integrate_and_fire_scan", TORCH_BOX(&fastssl::scan));
  m.impl("integrate_and_fire_fwd", TORCH_BOX(&fastssl::forward));
  m.impl("integrate_and_fire_bwd", TORCH_BOX(&fastssl::backward));
}
