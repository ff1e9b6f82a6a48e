// Stand-ins for CUDA, with which a C++ compiler compiles kernels and runs them on the CPU.
//
// Each thread of a block is a fiber, which runs until it waits at a barrier or ends. Blocks run one after another. The
// order of blocks, warps and lanes can be chosen (`set_order`): a result that depends on it comes from a race. A warp is
// run as far ahead of the others as barriers allow, so that a missing barrier shows. Lanes wait for each other only in
// shuffles, as on GPUs since Volta.
//
// What CUDA leaves undefined ends the process with a message: an access outside of a buffer (guarded_memory.cpp), a
// barrier that some threads of a block or warp do not reach. Shared memory starts as NaN in every block. Functions of
// CUDA that no kernel uses are left out; a kernel that calls one does not compile.
#pragma once

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <type_traits>
#include <vector>

#include "guarded_memory.h"

#define __global__
#define __device__
#define __launch_bounds__(threads)
// Shared memory is thread-local memory: the linker puts all of it in one place, which can be found and filled.
#define __shared__ static thread_local

using cudaStream_t = void*;
using std::isfinite;
using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx;

namespace cuda_on_host {

constexpr int kLanes = 32;
constexpr std::size_t kStackBytes = 65536;

enum class Order { kForward, kReverse, kRandom };
enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kEnded };

struct Fiber {
  std::unique_ptr<char[]> stack;  // made when the fiber first runs; it then runs a thread of each block
  jmp_buf place;
  dim3 thread;
  State state;
  unsigned line;  // of the barrier where it waits
};

inline Order order = Order::kForward;
inline std::mt19937 generator;
inline std::function<void()> body;  // the kernel with its arguments
inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline int current;  // the fiber that runs
inline bool any, any_of_all;  // for __syncthreads_or: so far, and of all threads at the last barrier
inline std::vector<uint64_t> exchanged;  // by each fiber, in a shuffle

[[noreturn]] inline void stop(const char* what) {
  char message[512];
  const unsigned block = blockIdx.x, x = threadIdx.x, y = threadIdx.y;
  std::snprintf(message, sizeof message, "%s, in block %u, thread (%u, %u)", what, block, x, y);
  guarded::stop(message);
}

// The indices from `first` to `end` - 1 in the chosen order.
inline std::vector<int> in_order(int first, int end) {
  std::vector<int> indices;
  for (int i = first; i < end; ++i) {
    indices.push_back(i);
  }
  if (order == Order::kReverse) {
    std::reverse(indices.begin(), indices.end());
  } else if (order == Order::kRandom) {
    std::shuffle(indices.begin(), indices.end(), generator);
  }
  return indices;
}

inline int end_of_warp(int warp) {
  return std::min<int>(fibers.size(), (warp + 1) * kLanes);
}

// `swapcontext` would call the system each time, to change the signal mask.
inline void leave(Fiber& fiber) {
  if (_setjmp(fiber.place) == 0) {
    _longjmp(scheduler, 1);
  }
}

inline void wait(State state, const std::source_location& place) {
  fibers[current].state = state;
  fibers[current].line = place.line();
  leave(fibers[current]);
}

inline void fiber_main() {
  for (;;) {
    body();
    fibers[current].state = State::kEnded;
    leave(fibers[current]);
  }
}

inline void start(Fiber& fiber) {
  fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

inline void run(int index) {
  current = index;
  threadIdx = fibers[index].thread;
  if (_setjmp(scheduler) == 0) {
    if (fibers[index].stack == nullptr) {
      start(fibers[index]);
    }
    _longjmp(fibers[index].place, 1);
  }
}

// Lets fibers from `first` to `end` - 1 continue, all of which must wait at the same barrier.
inline void release(State barrier, int first, int end) {
  for (int i = first; i < end; ++i) {
    if (fibers[i].state != barrier || fibers[i].line != fibers[first].line) {
      threadIdx = fibers[i].thread;
      stop(fibers[i].state == State::kEnded ? "a barrier is missed by a thread that has ended"
                                            : "threads wait at different barriers");
    }
  }
  for (int i = first; i < end; ++i) {
    fibers[i].state = State::kReady;
  }
}

// Runs each lane of a warp that can run until it waits or ends. Returns false if there is none.
inline bool run_warp(int warp) {
  const int first = warp * kLanes, end = end_of_warp(warp);
  bool ran = false, at_warp_barrier = false;
  for (int lane : in_order(first, end)) {
    if (fibers[lane].state == State::kReady) {
      run(lane);
      ran = true;
    }
  }
  for (int lane = first; lane < end; ++lane) {
    at_warp_barrier |= fibers[lane].state == State::kAtWarpBarrier;
  }
  if (at_warp_barrier) {
    release(State::kAtWarpBarrier, first, end);
  }
  return ran;
}

// Fills the shared memory, which is this library's thread-local memory, with NaN.
inline void poison_shared_memory() {
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const auto here = reinterpret_cast<ElfW(Addr)>(&scheduler) - info->dlpi_addr - header.p_vaddr;
          if (header.p_type != PT_LOAD || here >= header.p_memsz) {
            continue;  // not the segment of this library's variables
          }
          for (int j = 0; j < info->dlpi_phnum; ++j) {
            if (info->dlpi_phdr[j].p_type == PT_TLS && info->dlpi_tls_data != nullptr) {
              std::memset(info->dlpi_tls_data, 0xff, info->dlpi_phdr[j].p_memsz);
            }
          }
          return 1;
        }
        return 0;
      },
      nullptr);
}

inline void run_block(dim3 threads) {
  poison_shared_memory();
  any = false;
  for (int i = 0; i < static_cast<int>(fibers.size()); ++i) {
    fibers[i].thread = dim3(i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y);
    fibers[i].state = State::kReady;
  }
  const int count = fibers.size(), warps = (count + kLanes - 1) / kLanes;
  for (;;) {
    const std::vector<int> sequence = in_order(0, warps);
    if (std::any_of(sequence.begin(), sequence.end(), run_warp)) {
      continue;  // the first warp again, as far as it gets
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.state == State::kEnded; })) {
      return;
    }
    any_of_all = any;
    any = false;
    release(State::kAtBlockBarrier, 0, count);
  }
}

template <typename T>
const void* pointer_or_null(T argument) {
  if constexpr (std::is_pointer_v<T>) {
    return argument;
  } else {
    return nullptr;
  }
}

template <typename... Parameters, typename... Arguments>
void launch(
    const char* place,
    const char* names,
    void (*kernel)(Parameters...),
    dim3 blocks,
    dim3 threads,
    Arguments... arguments) {
  fibers.resize(threads.x * threads.y * threads.z);
  exchanged.resize(fibers.size());
  body = [=] { kernel(arguments...); };
  guarded::begin_launch(place, names, {pointer_or_null(arguments)...});
  for (int block : in_order(0, blocks.x)) {
    blockIdx = dim3(block);
    run_block(threads);
  }
  guarded::end_launch();
}

template <typename T>
T shuffle(T value, int from, const std::source_location& place) {
  static_assert(std::is_arithmetic_v<T>);
  const int lane = current;
  std::memcpy(&exchanged[lane], &value, sizeof value);
  wait(State::kAtWarpBarrier, place);
  std::memcpy(&value, &exchanged[from], sizeof value);
  wait(State::kAtWarpBarrier, place);
  return value;
}

inline void expect_full(unsigned mask) {
  if (mask != 0xffffffffu) {
    stop("a shuffle of some lanes of a warp, which only a GPU can run");
  }
}

}  // namespace cuda_on_host

inline void __syncthreads(const std::source_location& place = std::source_location::current()) {
  cuda_on_host::wait(cuda_on_host::State::kAtBlockBarrier, place);
}

inline int __syncthreads_or(int value, const std::source_location& place = std::source_location::current()) {
  cuda_on_host::any |= value != 0;
  cuda_on_host::wait(cuda_on_host::State::kAtBlockBarrier, place);
  return cuda_on_host::any_of_all;
}

template <typename T>
T __shfl_xor_sync(
    unsigned mask, T value, int distance, const std::source_location& place = std::source_location::current()) {
  cuda_on_host::expect_full(mask);
  return cuda_on_host::shuffle(value, cuda_on_host::current ^ distance, place);
}

template <typename T>
T __shfl_up_sync(
    unsigned mask, T value, int distance, const std::source_location& place = std::source_location::current()) {
  cuda_on_host::expect_full(mask);
  const int lane = cuda_on_host::current % cuda_on_host::kLanes;
  return cuda_on_host::shuffle(value, cuda_on_host::current - (lane < distance ? 0 : distance), place);
}

template <typename T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "kernels use no floating-point atomics");
  const T old = *address;
  *address += value;
  return old;
}

#define CUDA_ON_HOST_TEXT(x) #x
#define CUDA_ON_HOST_LINE(x) CUDA_ON_HOST_TEXT(x)
#define FASTSSL_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream),                                \
   cuda_on_host::launch("line " CUDA_ON_HOST_LINE(__LINE__), #__VA_ARGS__, kernel, blocks, threads, __VA_ARGS__))

extern "C" inline __attribute__((used, visibility("default"))) void set_order(int order, unsigned seed) {
  cuda_on_host::order = static_cast<cuda_on_host::Order>(order);
  cuda_on_host::generator.seed(seed);
}
