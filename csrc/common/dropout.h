// Dropout whose mask is a function of seed and position; its Python twin is `fastssl/ops/_philox.py`.
#pragma once

#include <cstdint>
#include <cstring>

#include "counter_random.h"
#include "isa.h"
#include "tensor_checks.h"

namespace fastssl {

// What decides which elements are kept. Without dropout no random number is drawn.
struct Dropout {
  bool active;
  uint64_t seed;
  uint64_t offset;
  uint32_t threshold;
  double scale;  // of what is kept
};

inline Dropout make_dropout(double dropout_p, const std::optional<Tensor>& seed, int64_t offset) {
  if (dropout_p == 0) {
    return {false, 0, 0, 0, 1.0};
  }
  STD_TORCH_CHECK(seed.has_value(), "seed: needed for dropout");
  check_tensor(*seed, "seed", 0, ScalarType::Long);
  return {
      true,
      static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()),
      static_cast<uint64_t>(offset),
      probability_threshold(dropout_p),
      1.0 / (1.0 - dropout_p)};
}

// Bytes of scratch that `keep_bytes` needs for `count` elements.
inline int64_t keep_scratch_size(int64_t count) {
  return count + 8;
}

// Which of the elements first .. first + count - 1 are kept, one byte each, 1 or 0. The result lies within `scratch`.
// A Philox block has the bits of four elements, whose bytes are written as one word (the first element lowest).
FASTSSL_INLINE const uint8_t* keep_bytes(uint8_t* scratch, const Dropout& dropout, int64_t first, int64_t count) {
  const uint64_t seed = dropout.seed;
  const uint32_t threshold = dropout.threshold;
  const int64_t blocks = (first + count + 3) / 4 - first / 4;
  const uint64_t counter = dropout.offset + static_cast<uint64_t>(first / 4);
  for (int64_t block = 0; block < blocks; ++block) {
    const PhiloxBlock bits = philox(seed, counter + static_cast<uint64_t>(block));
    const uint32_t bytes = (bits.word[0] >= threshold ? 1u : 0u) | (bits.word[1] >= threshold ? 1u << 8 : 0u) |
        (bits.word[2] >= threshold ? 1u << 16 : 0u) | (bits.word[3] >= threshold ? 1u << 24 : 0u);
    std::memcpy(scratch + 4 * block, &bytes, sizeof(bytes));
  }
  return scratch + first % 4;
}

}  // namespace fastssl
