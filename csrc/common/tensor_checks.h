// Checks of tensor arguments that all compiled kernels share, and the choice of a template by dtype.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace fastssl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_tensor(const Tensor& tensor, const char* name, int64_t dim, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": unexpected dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": must be contiguous");
}

// The same check for an optional tensor, if it is given.
inline void check_tensor(const std::optional<Tensor>& tensor, const char* name, int64_t dim, ScalarType dtype) {
  if (tensor.has_value()) {
    check_tensor(*tensor, name, dim, dtype);
  }
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

// The type in which values of `scalar_t` are accumulated.
template <typename scalar_t>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

// The same type, as a dtype.
inline ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls `function` with a value of the C++ type of `dtype`; only the type of the value matters.
template <typename Function>
void dispatch_floating(ScalarType dtype, const char* op, const Function& function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    case ScalarType::BFloat16:
      return function(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return function(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, op, ": x must be float64, float32, bfloat16 or float16");
  }
}

}  // namespace fastssl
