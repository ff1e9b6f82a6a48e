// Bias, GELU and dropout on the CPU. Derivation: fastssl/kernels/bias_gelu_dropout/README.md.

#include <optional>
#include <tuple>
#include <vector>

#include "../common/dropout.h"
#include "../common/isa.h"
#include "../common/row_chunks.h"
#include "../common/tensor_checks.h"
#include "../common/vector_math.h"

namespace fastssl {
namespace {

template <typename scalar_t, typename acc_t>
struct Call {
  const scalar_t* grad_out;  // backward only
  const scalar_t* x;
  const acc_t* bias;  // zeros if the op has no bias
  scalar_t* out;  // in the backward: the gradient of x
  int64_t width;
  Dropout dropout;
};

template <Isa isa, typename scalar_t, typename acc_t>
FASTSSL_INLINE void forward_rows_body(
    const Call<scalar_t, acc_t>* call, uint8_t* keep_scratch, int64_t first_row, int64_t last_row) {
  const int64_t width = call->width;
  const acc_t* __restrict bias = call->bias;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t begin = row * width;
    const scalar_t* __restrict x = call->x + begin;
    scalar_t* __restrict out = call->out + begin;
    if (!call->dropout.active) {
      for (int64_t c = 0; c < width; ++c) {
        out[c] = static_cast<scalar_t>(gelu(static_cast<acc_t>(x[c]) + bias[c]));
      }
      continue;
    }
    const acc_t scale = static_cast<acc_t>(call->dropout.scale);
    const uint8_t* __restrict keep = keep_bytes<isa>(keep_scratch, call->dropout, begin, width);
    for (int64_t c = 0; c < width; ++c) {
      const acc_t scaled = gelu(static_cast<acc_t>(x[c]) + bias[c]) * scale;
      out[c] = static_cast<scalar_t>(keep[c] ? scaled : acc_t(0));
    }
  }
}
FASTSSL_ISA_VARIANTS(forward_rows)

// Runs the backward for the rows of one chunk. `grad_bias` belongs to the chunk and must start at zero.
template <Isa isa, typename scalar_t, typename acc_t>
FASTSSL_INLINE void backward_rows_body(
    const Call<scalar_t, acc_t>* call,
    uint8_t* keep_scratch,
    acc_t* __restrict grad_bias,
    int64_t first_row,
    int64_t last_row) {
  const int64_t width = call->width;
  const acc_t* __restrict bias = call->bias;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t begin = row * width;
    const scalar_t* __restrict grad_out = call->grad_out + begin;
    const scalar_t* __restrict x = call->x + begin;
    scalar_t* __restrict grad_x = call->out + begin;
    if (!call->dropout.active) {
      for (int64_t c = 0; c < width; ++c) {
        const acc_t grad = static_cast<acc_t>(grad_out[c]) * gelu_derivative(static_cast<acc_t>(x[c]) + bias[c]);
        grad_bias[c] += grad;
        grad_x[c] = static_cast<scalar_t>(grad);
      }
      continue;
    }
    const acc_t scale = static_cast<acc_t>(call->dropout.scale);
    const uint8_t* __restrict keep = keep_bytes<isa>(keep_scratch, call->dropout, begin, width);
    for (int64_t c = 0; c < width; ++c) {
      const acc_t scaled = static_cast<acc_t>(grad_out[c]) * scale;
      const acc_t grad = (keep[c] ? scaled : acc_t(0)) * gelu_derivative(static_cast<acc_t>(x[c]) + bias[c]);
      grad_bias[c] += grad;
      grad_x[c] = static_cast<scalar_t>(grad);
    }
  }
}
FASTSSL_ISA_VARIANTS(backward_rows)

// The bias, or zeros if the op has none.
template <typename acc_t>
const acc_t* bias_or_zeros(const std::optional<Tensor>& bias, std::vector<acc_t>& zeros, int64_t width) {
  if (bias.has_value()) {
    return bias->const_data_ptr<acc_t>();
  }
  zeros.assign(width, acc_t(0));
  return zeros.data();
}

Tensor forward(
    const Tensor& x,  // (N, D)
    std::optional<Tensor> bias,  // (D,)
    double dropout_p,
    int64_t randomness,
    std::optional<Tensor> seed,
    int64_t offset) {
  check_tensor(x, "x", 2, x.scalar_type());
  check_tensor(bias, "bias", 1, accumulator_dtype(x.scalar_type()));
  const int64_t width = x.size(1);
  Tensor out = torch::stable::empty_like(x);
  dispatch_floating(x.scalar_type(), "bias_gelu_dropout", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    std::vector<acc_t> zeros;
    const Call<scalar_t, acc_t> call{
        nullptr,
        x.const_data_ptr<scalar_t>(),
        bias_or_zeros(bias, zeros, width),
        out.mutable_data_ptr<scalar_t>(),
        width,
        make_dropout(dropout_p, randomness, seed, offset)};
    torch::stable::parallel_for(0, x.size(0), kRowsPerChunk, [&](int64_t first_row, int64_t last_row) {
      std::vector<uint8_t> keep_scratch(keep_scratch_size(width));
      forward_rows(&call, keep_scratch.data(), first_row, last_row);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& grad_out,  // (N, D)
    const Tensor& x,  // (N, D)
    std::optional<Tensor> bias,  // (D,)
    double dropout_p,
    int64_t randomness,
    std::optional<Tensor> seed,
    int64_t offset) {
  check_tensor(x, "x", 2, x.scalar_type());
  check_tensor(grad_out, "grad_out", 2, x.scalar_type());
  check_tensor(bias, "bias", 1, accumulator_dtype(x.scalar_type()));
  const int64_t rows = x.size(0);
  const int64_t width = x.size(1);
  const int64_t chunks = number_of_chunks(rows);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_bias = bias.has_value() ? torch::stable::empty_like(*bias) : torch::stable::new_empty(x, {0});
  dispatch_floating(x.scalar_type(), "bias_gelu_dropout", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    std::vector<acc_t> zeros;
    const Call<scalar_t, acc_t> call{
        grad_out.const_data_ptr<scalar_t>(),
        x.const_data_ptr<scalar_t>(),
        bias_or_zeros(bias, zeros, width),
        grad_x.mutable_data_ptr<scalar_t>(),
        width,
        make_dropout(dropout_p, randomness, seed, offset)};
    std::vector<acc_t> partial(chunks * width);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first_chunk, int64_t last_chunk) {
      std::vector<uint8_t> keep_scratch(keep_scratch_size(width));
      for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
        const int64_t begin = chunk * kRowsPerChunk;
        const int64_t end = std::min(begin + kRowsPerChunk, rows);
        backward_rows(&call, keep_scratch.data(), partial.data() + chunk * width, begin, end);
      }
    });
    if (bias.has_value()) {
      add_chunks(grad_bias.mutable_data_ptr<acc_t>(), partial.data(), chunks, width, width);
    }
  });
  return {grad_x, grad_bias};
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl_native, CPU, m) {
  m.impl("bias_gelu_dropout_fwd", TORCH_BOX(&fastssl::forward));
  m.impl("bias_gelu_dropout_bwd", TORCH_BOX(&fastssl::backward));
}
