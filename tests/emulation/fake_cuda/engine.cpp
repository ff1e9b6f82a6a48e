// Preloaded, this answers PyTorch's question how many GPUs the machine has. The autograd engine asks for it before it
// runs a node whose gradients are on a GPU; everywhere else the answer must stay 0, or PyTorch would start CUDA.
#include <atomic>

namespace {
std::atomic<signed char> pretended{0};
}

extern "C" void pretend_devices(int count) { pretended = static_cast<signed char>(count); }

namespace c10::cuda {
signed char device_count() noexcept { return pretended; }
} // namespace c10::cuda
