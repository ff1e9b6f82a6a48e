// Scratch memory for vector loops.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

namespace fastssl {

// `size` uninitialised elements, aligned to a cache line, which is also the size of the widest vector.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(size, 1) * sizeof(T), kAlignment))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    ::operator delete(data_, kAlignment);
  }

  T* data() const {
    return data_;
  }

  T& operator[](int64_t i) const {
    return data_[i];
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace fastssl
