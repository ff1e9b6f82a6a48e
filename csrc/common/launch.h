// Launches of CUDA kernels.
#pragma once

#include <torch/csrc/stable/macros.h>

// Launches a kernel without dynamic shared memory, and checks that the driver accepts the launch. The tests define this
// macro themselves, because they compile kernels with a C++ compiler, which does not know <<< >>>.
#ifndef FASTSSL_LAUNCH
#define FASTSSL_LAUNCH(kernel, blocks, threads, stream, ...)   \
  do {                                                         \
    (kernel)<<<(blocks), (threads), 0, (stream)>>>(__VA_ARGS__); \
    STD_CUDA_KERNEL_LAUNCH_CHECK();                            \
  } while (false)
#endif
