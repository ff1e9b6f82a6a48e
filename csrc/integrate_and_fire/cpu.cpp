// Integrate-and-fire on the CPU. Derivation and conventions: fastssl/kernels/integrate_and_fire/README.md.
//
// Each output row, and each row of the gradient, is gathered from rows of its own utterance: no two threads write the
// same element, and the order of additions does not depend on the batch.

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../common/convert.h"
#include "../common/isa.h"
#include "../common/lanes.h"
#include "../common/tensor_checks.h"
#include "checks.h"

namespace fastssl {
namespace {

constexpr int64_t kRowsAtOnce = 4;

// Rows per task. A task moves about 64 KiB, because smaller tasks do not pay for their overhead.
int64_t rows_per_task(int64_t channels, int64_t element_size) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, channels * element_size));
}

// The index of the sequence that contains a packed row.
FASTSSL_INLINE int64_t sequence_of(int64_t row, const int32_t* begins, int64_t sequences) {
  return std::upper_bound(begins, begins + sequences, row) - begins - 1;
}

// Sets `to` to the weighted sum of ROWS neighbouring rows, plus the old `to` if ADD.
template <int ROWS, bool ADD, typename to_t, typename scalar_t, typename acc_t>
FASTSSL_INLINE void combine(to_t* to, const scalar_t* rows, const acc_t* weights, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    acc_t sum = ADD ? static_cast<acc_t>(to[c]) : acc_t(0);
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row) {
      sum += weights[row] * static_cast<acc_t>(rows[row * channels + c]);
    }
    to[c] = static_cast<to_t>(sum);
  }
}

template <bool ADD, typename to_t, typename scalar_t, typename acc_t>
FASTSSL_INLINE void combine_up_to_four(
    to_t* to, const scalar_t* rows, const acc_t* weights, int64_t count, int64_t channels) {
  switch (count) {
    case 1:
      return combine<1, ADD>(to, rows, weights, channels);
    case 2:
      return combine<2, ADD>(to, rows, weights, channels);
    case 3:
      return combine<3, ADD>(to, rows, weights, channels);
    default:
      return combine<4, ADD>(to, rows, weights, channels);
  }
}

// The weighted sum of any number of neighbouring rows, added one after another. `sum` is scratch memory for one row.
template <typename scalar_t, typename acc_t>
FASTSSL_INLINE void weighted_sum(
    scalar_t* to, acc_t* sum, const scalar_t* rows, const acc_t* weights, int64_t count, int64_t channels) {
  if (count > 0 && count <= kRowsAtOnce) {
    return combine_up_to_four<false>(to, rows, weights, count, channels);
  }
  std::fill(sum, sum + channels, acc_t(0));
  for (int64_t row = 0; row < count; row += kRowsAtOnce) {
    combine_up_to_four<true>(
        sum, rows + row * channels, weights + row, std::min(count - row, kRowsAtOnce), channels);
  }
  convert(to, sum, channels);
}

// grad . (current - next)
template <typename scalar_t, typename acc_t = typename Accumulator<scalar_t>::type>
FASTSSL_INLINE acc_t dot_difference(
    const scalar_t* grad, const scalar_t* current, const scalar_t* next, int64_t channels) {
  return sum_by_halves<64, acc_t>(channels, [=](int64_t c) {
    return static_cast<acc_t>(grad[c]) * (static_cast<acc_t>(current[c]) - static_cast<acc_t>(next[c]));
  });
}

struct Geometry {
  const double* position;  // (N,)
  const int32_t* begins;  // (B + 1,)
  const int32_t* out_begins;  // (B + 1,)
  int64_t sequences;
  int64_t channels;
  double threshold;
};

// The weight of the part of `slot` between two positions.
FASTSSL_INLINE double overlap(const Geometry& geometry, double previous, double reached, double slot) {
  return (std::min(reached, slot + 1) - std::max(previous, slot)) * geometry.threshold;
}

template <Isa isa, typename scalar_t>
FASTSSL_INLINE void forward_rows_body(
    const Geometry* geometry_pointer, const scalar_t* x, scalar_t* out, int64_t first_row, int64_t last_row) {
  using acc_t = typename Accumulator<scalar_t>::type;
  const Geometry geometry = *geometry_pointer;
  std::vector<acc_t> sum(geometry.channels);
  std::vector<acc_t> weights;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t sequence = sequence_of(row, geometry.out_begins, geometry.sequences);
    const double* position = geometry.position;
    const int64_t begin = geometry.begins[sequence];
    const int64_t end = geometry.begins[sequence + 1];
    const double slot = static_cast<double>(row - geometry.out_begins[sequence]);
    const int64_t first = std::upper_bound(position + begin, position + end, slot) - position;
    weights.clear();
    for (int64_t t = first; t < end; ++t) {
      const double previous = t == begin ? 0.0 : position[t - 1];
      weights.push_back(static_cast<acc_t>(overlap(geometry, previous, position[t], slot)));
      if (position[t] >= slot + 1) {
        break;
      }
    }
    const int64_t count = static_cast<int64_t>(weights.size());
    weighted_sum(
        out + row * geometry.channels,
        sum.data(),
        x + first * geometry.channels,
        weights.data(),
        count,
        geometry.channels);
  }
}
FASTSSL_ISA_VARIANTS(forward_rows)

template <Isa isa, typename scalar_t>
FASTSSL_INLINE void backward_rows_body(
    const Geometry* geometry_pointer,
    const scalar_t* grad_out,
    const scalar_t* x,
    scalar_t* grad_x,
    double* grad_positions,
    int64_t first_row,
    int64_t last_row) {
  using acc_t = typename Accumulator<scalar_t>::type;
  const Geometry geometry = *geometry_pointer;
  const int64_t channels = geometry.channels;
  std::vector<acc_t> sum(channels);
  std::vector<acc_t> weights;
  for (int64_t t = first_row; t < last_row; ++t) {
    const int64_t sequence = sequence_of(t, geometry.begins, geometry.sequences);
    const int64_t fired = geometry.out_begins[sequence + 1] - geometry.out_begins[sequence];
    const scalar_t* grads = grad_out + geometry.out_begins[sequence] * channels;
    const double reached = geometry.position[t];
    const double previous = t == geometry.begins[sequence] ? 0.0 : geometry.position[t - 1];
    const int64_t first_slot = static_cast<int64_t>(previous);
    const int64_t last_slot = static_cast<int64_t>(reached);
    weights.clear();
    for (int64_t slot = first_slot; slot <= std::min(last_slot, fired - 1); ++slot) {
      weights.push_back(static_cast<acc_t>(overlap(geometry, previous, reached, static_cast<double>(slot))));
    }
    const int64_t count = static_cast<int64_t>(weights.size());
    weighted_sum(
        grad_x + t * channels, sum.data(), grads + first_slot * channels, weights.data(), count, channels);
    // If the slot fired, a later frame of the same sequence completed it, so row t + 1 exists.
    grad_positions[t] = last_slot < fired
        ? dot_difference(grads + last_slot * channels, x + t * channels, x + (t + 1) * channels, channels)
        : acc_t(0);
  }
}
FASTSSL_ISA_VARIANTS(backward_rows)

// Returns the position where each frame ends, and the number of output frames of each sequence, which is NaN if one of
// its weights is invalid.
std::tuple<Tensor, Tensor> scan(
    const Tensor& weights,  // (N,)
    const Tensor& cu_seqlens,  // (B + 1,)
    double threshold) {
  check_tensor(weights, "weights", 1, weights.scalar_type());
  check_tensor(cu_seqlens, "cu_seqlens", 1, ScalarType::Int);
  const int64_t sequences = cu_seqlens.size(0) - 1;
  Tensor positions = torch::stable::new_empty(weights, {weights.size(0)}, ScalarType::Double);
  Tensor fired = torch::stable::new_empty(weights, {sequences}, ScalarType::Double);
  double* position = positions.mutable_data_ptr<double>();
  double* count = fired.mutable_data_ptr<double>();
  const int32_t* begins = cu_seqlens.const_data_ptr<int32_t>();
  dispatch_floating(weights.scalar_type(), "integrate_and_fire", [&](auto tag) {
    using scalar_t = decltype(tag);
    const scalar_t* weight = weights.const_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, sequences, 4, [&](int64_t first_sequence, int64_t last_sequence) {
      for (int64_t sequence = first_sequence; sequence < last_sequence; ++sequence) {
        double sum = 0;
        bool valid = true;
        for (int64_t t = begins[sequence]; t < begins[sequence + 1]; ++t) {
          const double value = static_cast<double>(weight[t]);
          valid &= value >= 0 && value < std::numeric_limits<double>::infinity();
          sum += value;
          position[t] = sum / threshold;
        }
        count[sequence] = valid ? std::floor(sum / threshold) : std::numeric_limits<double>::quiet_NaN();
      }
    });
  });
  return {positions, fired};
}

Geometry geometry_of(
    const Tensor& x,
    const Tensor& positions,
    const Tensor& cu_seqlens,
    const Tensor& cu_seqlens_out,
    double threshold) {
  check_integrate_and_fire(x, positions, cu_seqlens, cu_seqlens_out);
  return {
      positions.const_data_ptr<double>(),
      cu_seqlens.const_data_ptr<int32_t>(),
      cu_seqlens_out.const_data_ptr<int32_t>(),
      cu_seqlens.size(0) - 1,
      x.size(1),
      threshold};
}

Tensor forward(
    const Tensor& x,  // (N, C)
    const Tensor& positions,  // (N,)
    const Tensor& cu_seqlens,  // (B + 1,)
    const Tensor& cu_seqlens_out,  // (B + 1,)
    int64_t total_out,
    double threshold) {
  Tensor out = torch::stable::new_empty(x, {total_out, x.size(1)});
  const Geometry geometry = geometry_of(x, positions, cu_seqlens, cu_seqlens_out, threshold);
  dispatch_floating(x.scalar_type(), "integrate_and_fire", [&](auto tag) {
    using scalar_t = decltype(tag);
    const scalar_t* x_data = x.const_data_ptr<scalar_t>();
    scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(
        0, total_out, rows_per_task(x.size(1), sizeof(scalar_t)), [&](int64_t first_row, int64_t last_row) {
          forward_rows(&geometry, x_data, out_data, first_row, last_row);
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
  check_tensor(grad_out, "grad_out", 2, x.scalar_type());
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weights = torch::stable::empty_like(positions);
  const Geometry geometry = geometry_of(x, positions, cu_seqlens, cu_seqlens_out, threshold);
  double* grad_weights_data = grad_weights.mutable_data_ptr<double>();
  dispatch_floating(x.scalar_type(), "integrate_and_fire", [&](auto tag) {
    using scalar_t = decltype(tag);
    const scalar_t* x_data = x.const_data_ptr<scalar_t>();
    const scalar_t* grad_out_data = grad_out.const_data_ptr<scalar_t>();
    scalar_t* grad_x_data = grad_x.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(
        0, x.size(0), rows_per_task(x.size(1), sizeof(scalar_t)), [&](int64_t first_row, int64_t last_row) {
          backward_rows(&geometry, grad_out_data, x_data, grad_x_data, grad_weights_data, first_row, last_row);
        });
  });
  // A weight moves the end of its own frame and of all later frames, so its gradient is the sum over these frames.
  torch::stable::parallel_for(0, geometry.sequences, 4, [&](int64_t first_sequence, int64_t last_sequence) {
    for (int64_t sequence = first_sequence; sequence < last_sequence; ++sequence) {
      double sum = 0;
      for (int64_t t = geometry.begins[sequence + 1] - 1; t >= geometry.begins[sequence]; --t) {
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
  m.impl("integrate_and_fire_scan", TORCH_BOX(&fastssl::scan));
  m.impl("integrate_and_fire_fwd", TORCH_BOX(&fastssl::forward));
  m.impl("integrate_and_fire_bwd", TORCH_BOX(&fastssl::backward));
}
