// Dropout, residual and layer norm on the CPU. Derivation: fastssl/kernels/dropout_add_layer_norm/README.md.
//
// Each row is read from memory once; intermediate results stay in the first-level cache.

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/dropout.h"
#include "../common/isa.h"
#include "../common/lanes.h"
#include "../common/row_chunks.h"
#include "../common/tensor_checks.h"

namespace fastssl {
namespace {

constexpr int64_t kLanes = 64;

template <typename T>
FASTSSL_INLINE T sum_of(const T* x, int64_t n) {
  return sum_by_halves<kLanes, T>(n, [=](int64_t i) { return x[i]; });
}

template <typename T>
FASTSSL_INLINE T dot(const T* x, const T* y, int64_t n) {
  return sum_by_halves<kLanes, T>(n, [=](int64_t i) { return x[i] * y[i]; });
}

// sum[c] = residual[c] + dropout(x)[c]
template <typename scalar_t, typename acc_t>
FASTSSL_INLINE void add_branch(
    acc_t* __restrict sum,
    const scalar_t* __restrict x,
    const scalar_t* __restrict residual,
    const uint8_t* __restrict keep,
    const Dropout& dropout,
    int64_t width) {
  if (!dropout.active) {
    for (int64_t c = 0; c < width; ++c) {
      sum[c] = static_cast<acc_t>(residual[c]) + static_cast<acc_t>(x[c]);
    }
    return;
  }
  const acc_t scale = static_cast<acc_t>(dropout.scale);
  for (int64_t c = 0; c < width; ++c) {
    const acc_t scaled = static_cast<acc_t>(x[c]) * scale;
    sum[c] = static_cast<acc_t>(residual[c]) + (keep[c] ? scaled : acc_t(0));
  }
}

template <typename scalar_t, typename acc_t>
struct Forward {
  const scalar_t* x;
  const scalar_t* residual;
  const acc_t* weight;
  const acc_t* bias;
  scalar_t* out;
  scalar_t* sum;  // null if it is not returned
  acc_t* mean;
  acc_t* rstd;
  int64_t width;
  acc_t eps;
  Dropout dropout;
};

template <Isa isa, typename scalar_t, typename acc_t>
FASTSSL_INLINE void forward_rows_body(
    const Forward<scalar_t, acc_t>* call, acc_t* buffer, uint8_t* keep_scratch, int64_t first_row, int64_t last_row) {
  const int64_t width = call->width;
  const acc_t* __restrict weight = call->weight;
  const acc_t* __restrict bias = call->bias;
  acc_t* __restrict sum = buffer;
  acc_t* __restrict centred = buffer + width;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t begin = row * width;
    const uint8_t* keep = call->dropout.active ? keep_bytes<isa>(keep_scratch, call->dropout, begin, width) : nullptr;
    add_branch(sum, call->x + begin, call->residual + begin, keep, call->dropout, width);
    if (call->sum != nullptr) {
      // Normalise the rounded sum, which is returned, because the backward reads that one.
      scalar_t* __restrict stored = call->sum + begin;
      for (int64_t c = 0; c < width; ++c) {
        stored[c] = static_cast<scalar_t>(sum[c]);
        sum[c] = static_cast<acc_t>(stored[c]);
      }
    }
    const acc_t mean = sum_of(sum, width) / static_cast<acc_t>(width);
    for (int64_t c = 0; c < width; ++c) {
      centred[c] = sum[c] - mean;
    }
    const acc_t variance = dot(centred, centred, width) / static_cast<acc_t>(width);
    const acc_t rstd = acc_t(1) / std::sqrt(variance + call->eps);
    scalar_t* __restrict out = call->out + begin;
    for (int64_t c = 0; c < width; ++c) {
      out[c] = static_cast<scalar_t>(centred[c] * rstd * weight[c] + bias[c]);
    }
    call->mean[row] = mean;
    call->rstd[row] = rstd;
  }
}
FASTSSL_ISA_VARIANTS(forward_rows)

template <typename scalar_t, typename acc_t>
struct Backward {
  const scalar_t* grad_out;
  const scalar_t* grad_sum;  // null if the sum was not returned
  const scalar_t* x;  // the branch, or the sum if `residual` is null
  const scalar_t* residual;
  const acc_t* weight;
  const acc_t* mean;
  const acc_t* rstd;
  scalar_t* grad_x;  // null without dropout, where it equals grad_residual
  scalar_t* grad_residual;
  int64_t width;
  Dropout dropout;
};

// Runs the backward for the rows of one chunk. `grad_weight` and `grad_bias` belong to the chunk and must start at
// zero.
template <Isa isa, typename scalar_t, typename acc_t>
FASTSSL_INLINE void backward_rows_body(
    const Backward<scalar_t, acc_t>* call,
    acc_t* buffer,
    uint8_t* keep_scratch,
    acc_t* __restrict grad_weight,
    acc_t* __restrict grad_bias,
    int64_t first_row,
    int64_t last_row) {
  const int64_t width = call->width;
  const acc_t* __restrict weight = call->weight;
  acc_t* __restrict normalised = buffer;
  acc_t* __restrict grad = buffer + width;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t begin = row * width;
    const acc_t mean = call->mean[row];
    const acc_t rstd = call->rstd[row];
    const uint8_t* keep = call->dropout.active ? keep_bytes<isa>(keep_scratch, call->dropout, begin, width) : nullptr;
    if (call->residual == nullptr) {
      const scalar_t* __restrict sum = call->x + begin;
      for (int64_t c = 0; c < width; ++c) {
        normalised[c] = static_cast<acc_t>(sum[c]);
      }
    } else {
      add_branch(normalised, call->x + begin, call->residual + begin, keep, call->dropout, width);
    }
    const scalar_t* __restrict grad_out = call->grad_out + begin;
    for (int64_t c = 0; c < width; ++c) {
      const acc_t grad_c = static_cast<acc_t>(grad_out[c]);
      const acc_t normalised_c = (normalised[c] - mean) * rstd;
      normalised[c] = normalised_c;
      grad[c] = grad_c * weight[c];
      grad_weight[c] += grad_c * normalised_c;
      grad_bias[c] += grad_c;
    }
    const acc_t mean_grad = sum_of(grad, width) / static_cast<acc_t>(width);
    const acc_t mean_product = dot(grad, normalised, width) / static_cast<acc_t>(width);
    for (int64_t c = 0; c < width; ++c) {
      grad[c] = (grad[c] - mean_grad - normalised[c] * mean_product) * rstd;
    }
    if (call->grad_sum != nullptr) {
      const scalar_t* __restrict grad_sum = call->grad_sum + begin;
      for (int64_t c = 0; c < width; ++c) {
        grad[c] += static_cast<acc_t>(grad_sum[c]);
      }
    }
    scalar_t* __restrict grad_residual = call->grad_residual + begin;
    for (int64_t c = 0; c < width; ++c) {
      grad_residual[c] = static_cast<scalar_t>(grad[c]);
    }
    if (keep != nullptr) {
      scalar_t* __restrict grad_x = call->grad_x + begin;
      const acc_t scale = static_cast<acc_t>(call->dropout.scale);
      for (int64_t c = 0; c < width; ++c) {
        const acc_t scaled = grad[c] * scale;
        grad_x[c] = static_cast<scalar_t>(keep[c] ? scaled : acc_t(0));
      }
    }
  }
}
FASTSSL_ISA_VARIANTS(backward_rows)

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x,  // (N, D)
    const Tensor& residual,  // (N, D)
    const Tensor& weight,  // (D,)
    const Tensor& bias,  // (D,)
    double eps,
    double dropout_p,
    int64_t randomness,
    std::optional<Tensor> seed,
    int64_t offset,
    bool prenorm) {
  check_tensor(x, "x", 2, x.scalar_type());
  check_tensor(residual, "residual", 2, x.scalar_type());
  check_tensor(weight, "weight", 1, accumulator_dtype(x.scalar_type()));
  check_tensor(bias, "bias", 1, weight.scalar_type());
  const int64_t rows = x.size(0);
  const int64_t width = x.size(1);
  const Dropout dropout = make_dropout(dropout_p, randomness, seed, offset);
  Tensor out = torch::stable::empty_like(x);
  Tensor sum = prenorm ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor mean = torch::stable::new_empty(weight, {rows});
  Tensor rstd = torch::stable::new_empty(weight, {rows});
  dispatch_floating(x.scalar_type(), "dropout_add_layer_norm", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const Forward<scalar_t, acc_t> call{
        x.const_data_ptr<scalar_t>(),
        residual.const_data_ptr<scalar_t>(),
        weight.const_data_ptr<acc_t>(),
        bias.const_data_ptr<acc_t>(),
        out.mutable_data_ptr<scalar_t>(),
        prenorm ? sum.mutable_data_ptr<scalar_t>() : nullptr,
        mean.mutable_data_ptr<acc_t>(),
        rstd.mutable_data_ptr<acc_t>(),
        width,
        static_cast<acc_t>(eps),
        dropout};
    torch::stable::parallel_for(0, rows, kRowsPerChunk, [&](int64_t first_row, int64_t last_row) {
      std::vector<acc_t> buffer(2 * width);
      std::vector<uint8_t> keep_scratch(keep_scratch_size(width));
      forward_rows(&call, buffer.data(), keep_scratch.data(), first_row, last_row);
    });
  });
  return {out, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out,  // (N, D)
    std::optional<Tensor> grad_sum,  // (N, D)
    const Tensor& x,  // (N, D)
    std::optional<Tensor> residual,  // (N, D)
    const Tensor& weight,  // (D,)
    const Tensor& mean,  // (N,)
    const Tensor& rstd,  // (N,)
    double dropout_p,
    int64_t randomness,
    std::optional<Tensor> seed,
    int64_t offset) {
  check_tensor(x, "x", 2, x.scalar_type());
  check_tensor(grad_out, "grad_out", 2, x.scalar_type());
  check_tensor(grad_sum, "grad_sum", 2, x.scalar_type());
  check_tensor(residual, "residual", 2, x.scalar_type());
  check_tensor(weight, "weight", 1, accumulator_dtype(x.scalar_type()));
  check_tensor(mean, "mean", 1, weight.scalar_type());
  check_tensor(rstd, "rstd", 1, weight.scalar_type());
  const int64_t rows = x.size(0);
  const int64_t width = x.size(1);
  const int64_t chunks = number_of_chunks(rows);
  const Dropout dropout = make_dropout(dropout_p, randomness, seed, offset);
  Tensor grad_x = dropout.active ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_residual = torch::stable::empty_like(x);
  Tensor grad_weight = torch::stable::empty_like(weight);
  Tensor grad_bias = torch::stable::empty_like(weight);
  dispatch_floating(x.scalar_type(), "dropout_add_layer_norm", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const Backward<scalar_t, acc_t> call{
        grad_out.const_data_ptr<scalar_t>(),
        data_or_null<scalar_t>(grad_sum),
        x.const_data_ptr<scalar_t>(),
        data_or_null<scalar_t>(residual),
        weight.const_data_ptr<acc_t>(),
        mean.const_data_ptr<acc_t>(),
        rstd.const_data_ptr<acc_t>(),
        dropout.active ? grad_x.mutable_data_ptr<scalar_t>() : nullptr,
        grad_residual.mutable_data_ptr<scalar_t>(),
        width,
        dropout};
    std::vector<acc_t> partial(chunks * 2 * width);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first_chunk, int64_t last_chunk) {
      std::vector<acc_t> buffer(2 * width);
      std::vector<uint8_t> keep_scratch(keep_scratch_size(width));
      for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
        acc_t* grads = partial.data() + chunk * 2 * width;
        const int64_t begin = chunk * kRowsPerChunk;
        const int64_t end = std::min(begin + kRowsPerChunk, rows);
        backward_rows(&call, buffer.data(), keep_scratch.data(), grads, grads + width, begin, end);
      }
    });
    add_chunks(grad_weight.mutable_data_ptr<acc_t>(), partial.data(), chunks, 2 * width, width);
    add_chunks(grad_bias.mutable_data_ptr<acc_t>(), partial.data() + width, chunks, 2 * width, width);
  });
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl_native, CPU, m) {
  m.impl("dropout_add_layer_norm_fwd", TORCH_BOX(&fastssl::forward));
  m.impl("dropout_add_layer_norm_bwd", TORCH_BOX(&fastssl::backward));
}
