// Sums over rows, such as the gradient of a bias: each chunk of rows has its own partial sums, and a second pass adds
// the chunks in order. The chunks do not depend on the number of threads, and so the bits do not either.
#pragma once

#include <algorithm>
#include <cstdint>

#include "integers.h"
#include "isa.h"

namespace fastssl {

constexpr int64_t kRowsPerChunk = 32;

inline int64_t number_of_chunks(int64_t rows) {
  return divide_up(rows, kRowsPerChunk);
}

template <Isa isa, typename acc_t>
FASTSSL_INLINE void add_chunks_body(
    acc_t* out, const acc_t* partial, int64_t chunks, int64_t chunk_stride, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    out[c] = 0;
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const acc_t* row = partial + chunk * chunk_stride;
    for (int64_t c = 0; c < columns; ++c) {
      out[c] += row[c];
    }
  }
}
FASTSSL_ISA_VARIANTS(add_chunks)

}  // namespace fastssl
