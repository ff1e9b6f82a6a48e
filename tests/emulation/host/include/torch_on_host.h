// Included before a CUDA source: its operators are registered as `fastssl_on_host::...` for tensors on the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cuda_runtime.h>

namespace torch::stable::accelerator {

struct NoDeviceGuard {
  explicit NoDeviceGuard(int32_t) {}
};

}  // namespace torch::stable::accelerator

// What a test may put in the place of `dispatch_floating`, to compile for one dtype instead of four.
template <typename Dtype, typename Function>
void dispatch_float32(Dtype, const char*, const Function& function) {
  function(float{});
}

inline AOTITorchError no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

#define DeviceGuard NoDeviceGuard
#define aoti_torch_get_current_cuda_stream no_stream
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(fastssl_on_host, CPU, m, C10_UID)
