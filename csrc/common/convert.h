// Conversion of arrays between element types.
#pragma once

#include <cstdint>

#include "inline.h"

namespace fastssl {

template <typename to_t, typename from_t>
FASTSSL_INLINE void convert(to_t* to, const from_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<to_t>(from[i]);
  }
}

}  // namespace fastssl
