// The arguments of attention on the CPU, the tasks that the work is divided into, and the threads that run them.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "../common/buffer.h"
#include "rows.h"

namespace fastssl {

// The arguments that forward and backward share.
template <typename scalar_t>
struct Problem {
  using acc_t = typename Accumulator<scalar_t>::type;

  const scalar_t* q;
  const scalar_t* k;
  const scalar_t* v;
  int64_t total;
  int64_t heads;
  int64_t width;
  int64_t padded_width;
  int64_t stride;  // elements from one frame to the next
  const int32_t* begins;
  int64_t sequences;
  int64_t longest;
  acc_t scale;
  std::vector<acc_t> bias;  // (H, 2R + 1)
  int64_t reach;
  std::vector<acc_t> gate;  // (N, H)
  bool drops;
  int64_t randomness;
  uint32_t seed_state;
  uint32_t dropout_threshold;
  acc_t kept_factor;

  int64_t length(int64_t sequence) const {
    return begins[sequence + 1] - begins[sequence];
  }
};

template <typename T>
std::vector<T> widened(const Tensor& tensor) {
  std::vector<T> values(tensor.numel());
  dispatch_floating(tensor.scalar_type(), "varlen_attention", [&](auto tag) {
    const auto* data = tensor.const_data_ptr<decltype(tag)>();
    std::copy(data, data + tensor.numel(), values.begin());
  });
  return values;
}

template <typename scalar_t>
Problem<scalar_t> describe(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& cu_seqlens,
    int64_t max_length,
    double scale,
    double dropout_p,
    int64_t randomness,
    const std::optional<Tensor>& seed,
    const std::optional<Tensor>& distance_bias,
    const std::optional<Tensor>& gate) {
  Problem<scalar_t> problem{};
  problem.q = q.const_data_ptr<scalar_t>();
  problem.k = k.const_data_ptr<scalar_t>();
  problem.v = v.const_data_ptr<scalar_t>();
  problem.total = q.size(0);
  problem.heads = q.size(1);
  problem.width = q.size(2);
  problem.padded_width = round_up(problem.width, kTileColumns);
  problem.stride = problem.heads * problem.width;
  problem.begins = cu_seqlens.const_data_ptr<int32_t>();
  problem.sequences = cu_seqlens.size(0) - 1;
  problem.longest = max_length;
  problem.scale = scale;
  if (distance_bias.has_value()) {
    problem.bias = widened<typename Problem<scalar_t>::acc_t>(*distance_bias);
    problem.reach = distance_bias->size(1) / 2;
  }
  if (gate.has_value()) {
    problem.gate = widened<typename Problem<scalar_t>::acc_t>(*gate);
  }
  if (seed.has_value()) {
    const uint64_t value = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
    problem.drops = true;
    problem.seed_state =
        murmur_mix(murmur_mix(static_cast<uint32_t>(value) ^ 0x9E3779B9u) ^ static_cast<uint32_t>(value >> 32));
    problem.dropout_threshold = dropout_threshold(dropout_p, randomness);
    problem.kept_factor = 1 / kept_fraction(dropout_p, randomness);
    problem.randomness = randomness;
  }
  return problem;
}

inline void check_inputs(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& cu_seqlens,
    const std::optional<Tensor>& seed,
    const std::optional<Tensor>& distance_bias,
    const std::optional<Tensor>& gate) {
  check_tensor(q, "q", 3, q.scalar_type());
  check_tensor(k, "k", 3, q.scalar_type());
  check_tensor(v, "v", 3, q.scalar_type());
  check_tensor(cu_seqlens, "cu_seqlens", 1, ScalarType::Int);
  check_tensor(seed, "seed", 0, ScalarType::Long);
  if (distance_bias.has_value()) {
    check_tensor(*distance_bias, "distance_bias", 2, distance_bias->scalar_type());
  }
  if (gate.has_value()) {
    check_tensor(*gate, "gate", 2, gate->scalar_type());
  }
}

// A range of queries, and of keys, of one head of one sequence.
struct Task {
  int64_t sequence;
  int64_t head;
  int64_t first_query;
  int64_t last_query;
  int64_t first_key;
  int64_t last_key;
  bool for_queries;  // backward: compute the gradients of the queries of the range
  bool for_keys;  // backward: compute the gradients of the keys of the range

  int64_t cost() const {
    return (last_query - first_query) * (last_key - first_key);
  }
};

// Calls `work(task, scratch)` for all tasks, the most expensive first. Each thread has its own `Scratch`.
template <typename Scratch, typename Problem, typename Work>
void run_tasks(std::vector<Task> tasks, const Problem& problem, const Work& work) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost() > b.cost(); });
  const int64_t count = tasks.size();
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Scratch scratch(problem);
    for (int64_t i = next++; i < count; i = next++) {
      work(tasks[i], scratch);
    }
  });
}

// The number of parts to split a head of a sequence into, so that no thread works alone while the others wait.
template <typename scalar_t>
int64_t parts_of(const Problem<scalar_t>& problem, int64_t length) {
  double all = 0;
  for (int64_t sequence = 0; sequence < problem.sequences; ++sequence) {
    const double other = problem.length(sequence);
    all += problem.heads * other * other;
  }
  const double share = all / torch::stable::get_num_threads();
  const double cost = static_cast<double>(length) * length;
  return cost > share ? static_cast<int64_t>(2 * cost / share) + 1 : 1;
}

// Writes the bias of one head for each distance within a sequence; returns a pointer to distance 0.
template <typename scalar_t, typename T>
const T* spread_bias(const Problem<scalar_t>& problem, int64_t head, int64_t length, T* spread) {
  if (problem.bias.empty()) {
    return nullptr;
  }
  const T* middle = problem.bias.data() + head * (2 * problem.reach + 1) + problem.reach;
  for (int64_t distance = 1 - length; distance < length + kPadding; ++distance) {
    spread[distance + length - 1] = middle[std::clamp(distance, -problem.reach, problem.reach)];
  }
  return spread + length - 1;
}

// The gates and dropout states of a block of queries of one head.
template <typename scalar_t>
struct QueryBlock {
  using acc_t = typename Accumulator<scalar_t>::type;
  acc_t gate[kQueryBlock];
  uint32_t states[kQueryBlock];

  Rows<acc_t> rows(
      const Problem<scalar_t>& problem, const Task& task, const acc_t* bias, int64_t first_query, int64_t queries) {
    const int64_t first_row = problem.begins[task.sequence] + first_query;
    Rows<acc_t> rows{};
    rows.queries = queries;
    rows.first_query = first_query;
    rows.scale = problem.scale;
    rows.scale_log2 = static_cast<acc_t>(problem.scale * kLog2OfE);
    rows.bias = bias;
    if (!problem.gate.empty()) {
      for (int64_t i = 0; i < queries; ++i) {
        gate[i] = problem.gate[(first_row + i) * problem.heads + task.head];
      }
      rows.gate = gate;
    }
    if (problem.drops) {
      for (int64_t i = 0; i < queries; ++i) {
        const uint32_t row_state = murmur_mix(problem.seed_state ^ static_cast<uint32_t>(first_row + i));
        states[i] = murmur_mix(row_state ^ static_cast<uint32_t>(task.head));
      }
      rows.dropout_states = states;
      rows.randomness = problem.randomness;
      rows.dropout_threshold = problem.dropout_threshold;
      rows.kept_factor = problem.kept_factor;
    }
    return rows;
  }
};

}  // namespace fastssl
