// Checks of the arguments of integrate-and-fire's forward and backward, for all devices.
#pragma once

#include "../common/tensor_checks.h"

namespace fastssl {

inline void check_integrate_and_fire(
    const Tensor& x,  // (N, C)
    const Tensor& positions,  // (N,)
    const Tensor& cu_seqlens,  // (B + 1,)
    const Tensor& cu_seqlens_out) {  // (B + 1,)
  check_tensor(x, "x", 2, x.scalar_type());
  check_tensor(positions, "positions", 1, ScalarType::Double);
  check_tensor(cu_seqlens, "cu_seqlens", 1, ScalarType::Int);
  check_tensor(cu_seqlens_out, "cu_seqlens_out", 1, ScalarType::Int);
}

}  // namespace fastssl
