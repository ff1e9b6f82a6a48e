// Integer arithmetic for cutting work into blocks.
#pragma once

#include <cstdint>

namespace fastssl {

// Number of blocks of `size` that hold n elements.
constexpr int64_t divide_up(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

// The smallest multiple of `multiple` that is at least n.
constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return divide_up(n, multiple) * multiple;
}

}  // namespace fastssl
