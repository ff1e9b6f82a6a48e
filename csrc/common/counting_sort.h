// A stable counting sort whose result does not depend on the number of workers.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "buffer.h"

namespace fastssl {

// Sorts entries by a key from 0 to keys - 1. Each item contributes any number of entries; entries with the same key
// keep the order of their items. Each worker processes a share of the items and has a table with one number per key.
// Usage:
//
//   sort.for_each_worker([&](int64_t* counts, int64_t first, int64_t last) { ... ++counts[key]; });
//   sort.finish_counting();
//   sort.for_each_worker([&](int64_t* next, int64_t first, int64_t last) { ... sorted[next[key]++] = entry; });
//
// Afterwards the entries of a key are at begins()[key] to begins()[key + 1] - 1.
class CountingSort {
 public:
  CountingSort(int64_t items, int64_t keys, int64_t workers)
      : items_(items), keys_(keys), workers_(workers), tables_(workers * keys), begins_(keys + 1) {}

  // Calls `function(table, first_item, last_item)` for each worker, in parallel.
  template <typename Function>
  void for_each_worker(const Function& function) {
    torch::stable::parallel_for(0, workers_, 1, [&](int64_t first, int64_t last) {
      for (int64_t worker = first; worker < last; ++worker) {
        function(tables_.data() + worker * keys_, items_ * worker / workers_, items_ * (worker + 1) / workers_);
      }
    });
  }

  // Replaces each count with the place of the worker's first entry of that key.
  void finish_counting() {
    int64_t place = 0;
    for (int64_t key = 0; key < keys_; ++key) {
      begins_[key] = place;
      for (int64_t worker = 0; worker < workers_; ++worker) {
        int64_t& entry = tables_[worker * keys_ + key];
        const int64_t count = entry;
        entry = place;
        place += count;
      }
    }
    begins_[keys_] = place;
  }

  const int64_t* begins() const {  // (keys + 1,)
    return begins_.data();
  }

  // Number of entries that were counted.
  int64_t size() const {
    return begins_[keys_];
  }

 private:
  int64_t items_;
  int64_t keys_;
  int64_t workers_;
  std::vector<int64_t> tables_;  // (workers, keys)
  Buffer<int64_t> begins_;
};

}  // namespace fastssl
