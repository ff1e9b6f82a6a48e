// One source for several instruction sets: FASTSSL_ISA_VARIANTS(name) turns the template `name_body` into a function
// `name` that runs the widest version the machine supports. So a wheel runs on any machine, wherever it was built.
//
//   template <Isa isa, typename scalar_t>
//   FASTSSL_INLINE void scale_body(scalar_t* x, float factor, int64_t n) { for (...) x[i] *= factor; }
//   FASTSSL_ISA_VARIANTS(scale)
//   ... scale(x, 2.0f, n);
//
// Everything that a body calls must be FASTSSL_INLINE (or a template small enough to be inlined): functions that remain
// calls are compiled for the baseline. So are lambdas; move a loop inside `parallel_for` to a body of its own.
// FASTSSL_CPU_CAPABILITY=default|avx2|avx512, read once, selects one version.
#pragma once

#include <cstdlib>
#include <cstring>

#include <torch/headeronly/util/Exception.h>

#include "inline.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTSSL_HAS_ISA_VARIANTS 1
#else
#define FASTSSL_HAS_ISA_VARIANTS 0
#endif

namespace fastssl {

enum class Isa { kDefault, kAvx2, kAvx512 };

inline Isa widest_isa() {
#if FASTSSL_HAS_ISA_VARIANTS
  if (__builtin_cpu_supports("x86-64-v4")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("x86-64-v3")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kDefault;
}

inline Isa chosen_isa() {
  const char* wish = std::getenv("FASTSSL_CPU_CAPABILITY");
  if (wish == nullptr || *wish == '\0') {
    return widest_isa();
  }
  const Isa isa = std::strcmp(wish, "avx512") == 0 ? Isa::kAvx512
      : std::strcmp(wish, "avx2") == 0             ? Isa::kAvx2
                                                   : Isa::kDefault;
  STD_TORCH_CHECK(
      isa != Isa::kDefault || std::strcmp(wish, "default") == 0,
      "FASTSSL_CPU_CAPABILITY: must be avx512, avx2 or default, got ",
      wish);
  STD_TORCH_CHECK(isa <= widest_isa(), "FASTSSL_CPU_CAPABILITY: this machine does not support ", wish);
  return isa;
}

inline Isa current_isa() {
  static const Isa isa = chosen_isa();
  return isa;
}

}  // namespace fastssl

#if FASTSSL_HAS_ISA_VARIANTS
#define FASTSSL_ISA_VARIANTS(name)                                                                                  \
  template <typename... Args>                                                                                       \
  __attribute__((target("arch=x86-64-v4,prefer-vector-width=512"), noinline)) auto name##_avx512(Args... args) {    \
    return name##_body<::fastssl::Isa::kAvx512>(args...);                                                           \
  }                                                                                                                 \
  template <typename... Args>                                                                                       \
  __attribute__((target("arch=x86-64-v3"), noinline)) auto name##_avx2(Args... args) {                              \
    return name##_body<::fastssl::Isa::kAvx2>(args...);                                                             \
  }                                                                                                                 \
  template <typename... Args>                                                                                       \
  auto name(Args... args) {                                                                                         \
    switch (::fastssl::current_isa()) {                                                                             \
      case ::fastssl::Isa::kAvx512:                                                                                 \
        return name##_avx512(args...);                                                                              \
      case ::fastssl::Isa::kAvx2:                                                                                   \
        return name##_avx2(args...);                                                                                \
      default:                                                                                                      \
        return name##_body<::fastssl::Isa::kDefault>(args...);                                                      \
    }                                                                                                               \
  }
#else
#define FASTSSL_ISA_VARIANTS(name)                              \
  template <typename... Args>                                   \
  auto name(Args... args) {                                     \
    return name##_body<::fastssl::Isa::kDefault>(args...);      \
  }
#endif
