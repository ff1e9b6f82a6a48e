// The GPU architectures that `_C_cuda` is compiled for, which `kernels/dispatch.py` reads before it calls a kernel.

// Separated by spaces: "sm_80" is machine code, "compute_90" is PTX. Without C++ types, so that ctypes can call it.
extern "C" __attribute__((visibility("default"))) const char* fastssl_cuda_architectures() {
  return FASTSSL_CUDA_ARCHITECTURES;
}
