// Integrate-and-fire on the CPU. Derivation and conventions: fastssl/ops/integrate_and_fire/README.md.
//
// Every output row, and every row of the gradient, gathers what belongs to it from its own utterance alone: no two
// threads write the same element, and the order of additions does not depend on the batch.

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../common/isa.h"
#include "../common/tensor_checks.h"

namespace fastssl {
namespace {

// Rows per task such that a task moves about 64 KiB: less is lost in the overhead of handing it out.
int64_t rows_per_task(int64_t channels, int64_t element_size) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, channels * element_size));
}

// The sequence that a packed row belongs to.
int64_t sequence_of(int64_t row, const int32_t* begins, int64_t sequences) {
  return std::upper_bound(begins, begins + sequences, row) - begins - 1;
}

template <Isa isa, typename scalar_t, typename acc_t>
FASTSSL_INLINE void add_scaled_body(acc_t* sum, const scalar_t* row, acc_t scale, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    sum[c] += scale * static_cast<acc_t>(row[c]);
  }
}
FASTSSL_ISA_VARIANTS(add_scaled)

template <Isa isa, typename scalar_t, typename acc_t>
FASTSSL_INLINE void store_body(scalar_t* row, const acc_t* sum, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    row[c] = static_cast<scalar_t>(sum[c]);
  }
}
FASTSSL_ISA_VARIANTS(store)

// grad . (current - next). Sixteen partial sums, because the compiler may not reorder a floating-point sum by itself.
template <Isa isa, typename scalar_t>
FASTSSL_INLINE auto dot_difference_body(
    const scalar_t* grad, const scalar_t* current, const scalar_t* next, int64_t channels) {
  using acc_t = typename Accumulator<scalar_t>::type;
  constexpr int64_t kLanes = 16;
  acc_t partial[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      partial[lane] += static_cast<acc_t>(grad[c + lane]) *
          (static_cast<acc_t>(current[c + lane]) - static_cast<acc_t>(next[c + lane]));
    }
  }
  acc_t sum = 0;
  for (; c < channels; ++c) {
    sum += static_cast<acc_t>(grad[c]) * (static_cast<acc_t>(current[c]) - static_cast<acc_t>(next[c]));
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum += partial[lane];
  }
  return sum;
}
FASTSSL_ISA_VARIANTS(dot_difference)

Tensor forward(
    const Tensor& x,  // (N, C)
    const Tensor& positions,  // (N,)
    const Tensor& cu_seqlens,  // (B + 1,)
    const Tensor& cu_seqlens_out,  // (B + 1,)
    int64_t total_out,
    double threshold) {
  check_tensor(x, "x", 2, x.scalar_type());
  check_tensor(positions, "positions", 1, ScalarType::Double);
  check_tensor(cu_seqlens, "cu_seqlens", 1, ScalarType::Int);
  check_tensor(cu_seqlens_out, "cu_seqlens_out", 1, ScalarType::Int);
  const int64_t channels = x.size(1);
  Tensor out = torch::stable::new_empty(x, {total_out, channels});
  const double* position = positions.const_data_ptr<double>();
  const int32_t* begins = cu_seqlens.const_data_ptr<int32_t>();
  const int32_t* out_begins = cu_seqlens_out.const_data_ptr<int32_t>();
  const int64_t sequences = cu_seqlens.size(0) - 1;

  dispatch_floating(x.scalar_type(), "integrate_and_fire", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const scalar_t* x_data = x.const_data_ptr<scalar_t>();
    scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(
        0, total_out, rows_per_task(channels, sizeof(scalar_t)), [&](int64_t first_row, int64_t last_row) {
          std::vector<acc_t> sum(channels);
          for (int64_t row = first_row; row < last_row; ++row) {
            const int64_t sequence = sequence_of(row, out_begins, sequences);
            const int64_t begin = begins[sequence];
            const int64_t end = begins[sequence + 1];
            const double slot = static_cast<double>(row - out_begins[sequence]);
            std::fill(sum.begin(), sum.end(), acc_t(0));
            int64_t t = std::upper_bound(position + begin, position + end, slot) - position;
            for (bool more = true; more && t < end; ++t) {
              const double previous = t == begin ? 0.0 : position[t - 1];
              const double overlap = std::min(position[t], slot + 1) - std::max(previous, slot);
              add_scaled(sum.data(), x_data + t * channels, static_cast<acc_t>(overlap * threshold), channels);
              more = position[t] < slot + 1;
            }
            store(out_data + row * channels, sum.data(), channels);
          }
        });
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
  check_tensor(x, "x", 2, x.scalar_type());
  check_tensor(grad_out, "grad_out", 2, x.scalar_type());
  check_tensor(positions, "positions", 1, ScalarType::Double);
  check_tensor(cu_seqlens, "cu_seqlens", 1, ScalarType::Int);
  check_tensor(cu_seqlens_out, "cu_seqlens_out", 1, ScalarType::Int);
  const int64_t channels = x.size(1);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weights = torch::stable::empty_like(positions);
  const double* position = positions.const_data_ptr<double>();
  const int32_t* begins = cu_seqlens.const_data_ptr<int32_t>();
  const int32_t* out_begins = cu_seqlens_out.const_data_ptr<int32_t>();
  const int64_t sequences = cu_seqlens.size(0) - 1;
  double* grad_weights_data = grad_weights.mutable_data_ptr<double>();

  dispatch_floating(x.scalar_type(), "integrate_and_fire", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const scalar_t* x_data = x.const_data_ptr<scalar_t>();
    const scalar_t* grad_out_data = grad_out.const_data_ptr<scalar_t>();
    scalar_t* grad_x_data = grad_x.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(
        0, x.size(0), rows_per_task(channels, sizeof(scalar_t)), [&](int64_t first_row, int64_t last_row) {
          std::vector<acc_t> sum(channels);
          for (int64_t t = first_row; t < last_row; ++t) {
            const int64_t sequence = sequence_of(t, begins, sequences);
            const int64_t fired = out_begins[sequence + 1] - out_begins[sequence];
            const scalar_t* grads = grad_out_data + out_begins[sequence] * channels;
            const double previous = t == begins[sequence] ? 0.0 : position[t - 1];
            const int64_t last_slot = static_cast<int64_t>(std::floor(position[t]));
            std::fill(sum.begin(), sum.end(), acc_t(0));
            for (int64_t slot = static_cast<int64_t>(std::floor(previous)); slot <= std::min(last_slot, fired - 1);
                 ++slot) {
              const double overlap = std::min(position[t], slot + 1.0) - std::max(previous, static_cast<double>(slot));
              add_scaled(sum.data(), grads + slot * channels, static_cast<acc_t>(overlap * threshold), channels);
            }
            store(grad_x_data + t * channels, sum.data(), channels);
            // Where the slot fired, a later frame of the same sequence ended it, so row t + 1 exists.
            grad_weights_data[t] = last_slot < fired
                ? dot_difference(
                      grads + last_slot * channels, x_data + t * channels, x_data + (t + 1) * channels, channels)
                : acc_t(0);
          }
        });
  });
  // A weight moves its own frame's end and every later one: the gradient is the sum from its frame on.
  torch::stable::parallel_for(0, sequences, 16, [&](int64_t first_sequence, int64_t last_sequence) {
    for (int64_t sequence = first_sequence; sequence < last_sequence; ++sequence) {
      double sum = 0;
      for (int64_t t = begins[sequence + 1] - 1; t >= begins[sequence]; --t) {
        sum += grad_weights_data[t];
        grad_weights_data[t] = sum;
      }
    }
  });
  return {grad_x, grad_weights};
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl_native, CPU, m) {
  m.impl("integrate_and_fire_fwd", TORCH_BOX(&fastssl::forward));
  m.impl("integrate_and_fire_bwd", TORCH_BOX(&fastssl::backward));
}
