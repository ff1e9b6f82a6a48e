// Attention of packed sequences on the CPU. Derivation and conventions: fastssl/ops/varlen_attention/README.md.
//
// A task is one head of one sequence, or a part of it where there are fewer tasks than threads. It goes by blocks of
// queries and keys: matrix products of blocks in cache (common/block_gemm.h) and, between them, what happens to the
// logits (rows.h). Operands are copied once per task, widened to the type of the sums. Every element is written by one
// task, and its sum runs in the order of the blocks, so bits depend neither on the batch nor on the threads.

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "rows.h"

namespace fastssl {
namespace {

// Keys of values that stay in the innermost cache while all queries of a block pass over them.
constexpr int64_t kValueBlock = 96;
// Gradients of the distance bias are summed over the queries of a chunk, then over chunks, in this order.
constexpr int64_t kQueryChunk = 8 * kQueryBlock;

// Memory of one thread, aligned to whole vectors and not initialised.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(size, 1) * sizeof(T), std::align_val_t(64)))) {}
  ~Buffer() {
    ::operator delete(data_, std::align_val_t(64));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const {
    return data_;
  }

 private:
  T* data_;
};

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
  int64_t stride;  // from one frame to the next
  const int32_t* begins;
  int64_t sequences;
  int64_t longest;
  acc_t scale;  // of the products of queries and keys
  acc_t logit_scale;  // the same in units of ln 2
  std::vector<acc_t> bias;  // (H, 2R + 1)
  int64_t reach;
  std::vector<acc_t> gate;  // (N, H)
  bool drops;
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
  problem.logit_scale = scale * kLog2OfE;
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
    problem.dropout_threshold = probability_threshold(dropout_p);
    problem.kept_factor = 1 / (1 - dropout_p);
  }
  return problem;
}

void check_inputs(
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
  if (seed.has_value()) {
    check_tensor(*seed, "seed", 0, ScalarType::Long);
  }
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

// Calls `work(task, scratch)` for all tasks, the dearest first, each thread with a `Scratch` of its own.
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

// Into how many parts a task of `cost` is cut so that one thread does not work while the others wait.
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

// The distance bias of one head for every distance within a sequence; returns where distance 0 is.
template <typename scalar_t, typename T>
const T* spread_bias(const Problem<scalar_t>& problem, int64_t head, int64_t length, T* spread) {
  if (problem.bias.empty()) {
    return nullptr;
  }
  const T* middle = problem.bias.data() + head * (2 * problem.reach + 1) + problem.reach;
  for (int64_t distance = 1 - length; distance < length + kPadding; ++distance) {
    spread[distance + length - 1] =
        static_cast<T>(kLog2OfE) * middle[std::clamp(distance, -problem.reach, problem.reach)];
  }
  return spread + length - 1;
}

// Gates and dropout states of a block of queries of one head.
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
      rows.dropout_threshold = problem.dropout_threshold;
      rows.kept_factor = problem.kept_factor;
    }
    return rows;
  }
};

// Rows [begin, end) of one head, transposed block by block: key block b is (E, kKeyBlock) at out + b kKeyBlock E.
template <typename scalar_t, typename T>
void load_transposed(
    const Problem<scalar_t>& problem, const scalar_t* x, int64_t begin, int64_t end, T* staging, T* out) {
  for (int64_t row = begin; row < end; row += kKeyBlock) {
    const int64_t rows = std::min(kKeyBlock, end - row);
    load_rows(
        x + row * problem.stride, problem.stride, rows, kTileColumns, problem.width, T(1), staging);
    transpose(
        staging, problem.padded_width, rows, problem.width,
        out + (row - begin) * problem.padded_width, kKeyBlock);
  }
}

template <typename T>
struct ForwardScratch {
  template <typename scalar_t>
  explicit ForwardScratch(const Problem<scalar_t>& problem)
      : logits_stride(round_up(problem.longest, kTileColumns) + kTileColumns),
        staging(kKeyBlock * problem.padded_width),
        keys(round_up(problem.longest, kKeyBlock) * problem.padded_width),
        values(problem.longest * problem.padded_width),
        query(kQueryBlock * problem.padded_width),
        out(kQueryBlock * problem.padded_width),
        logits(kQueryBlock * logits_stride),
        bias(2 * problem.longest + kPadding) {}

  int64_t logits_stride;
  Buffer<T> staging, keys, values, query, out, logits, bias;
};

template <typename scalar_t, typename T>
void attend(
    const Problem<scalar_t>& problem, const Task& task, ForwardScratch<T>& scratch, scalar_t* out, T* logsumexp) {
  const int64_t width = problem.width;
  const int64_t padded_width = problem.padded_width;
  const int64_t begin = problem.begins[task.sequence];
  const int64_t length = problem.length(task.sequence);
  const int64_t offset = begin * problem.stride + task.head * width;
  const T* bias = spread_bias(problem, task.head, length, +scratch.bias);
  load_transposed(problem, problem.k + offset, 0, length, +scratch.staging, +scratch.keys);
  load_rows(problem.v + offset, problem.stride, length, int64_t(1), width, T(1), +scratch.values);
  for (int64_t query = task.first_query; query < task.last_query; query += kQueryBlock) {
    const int64_t queries = std::min(kQueryBlock, task.last_query - query);
    load_rows(
        problem.q + offset + query * problem.stride, problem.stride, queries, kTileRows, width, problem.logit_scale,
        +scratch.query);
    for (int64_t key = 0; key < length; key += kKeyBlock) {
      multiply(
          RowsOfA{}, Overwrite{}, +scratch.query, padded_width, queries, width,
          scratch.keys + key * padded_width, kKeyBlock, std::min(kKeyBlock, length - key),
          scratch.logits + key, scratch.logits_stride);
    }
    QueryBlock<scalar_t> block;
    Rows<T> rows = block.rows(problem, task, bias, query, queries);
    rows.keys = length;
    T factors[kQueryBlock];
    softmax(
        rows, +scratch.logits, scratch.logits_stride, +factors,
        logsumexp + task.head * problem.total + begin + query);
    for (int64_t key = 0; key < length; key += kValueBlock) {
      const auto product = [&](auto adding) {
        multiply(
            RowsOfA{}, adding, scratch.logits + key, scratch.logits_stride, queries,
            std::min(kValueBlock, length - key), scratch.values + key * padded_width,
            padded_width, padded_width, +scratch.out, padded_width);
      };
      if (key == 0) {
        product(Overwrite{});
      } else {
        product(Add{});
      }
    }
    store_rows(
        +scratch.out, queries, width, T(1), +factors,
        out + offset + query * problem.stride, problem.stride);
  }
}

ScalarType sums_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& q,  // (N, H, E)
    const Tensor& k,  // (N, H, E)
    const Tensor& v,  // (N, H, E)
    const Tensor& cu_seqlens,  // (B + 1,)
    int64_t max_length,
    double scale,
    double dropout_p,
    const std::optional<Tensor>& seed,  // ()
    const std::optional<Tensor>& distance_bias,  // (H, 2R + 1)
    const std::optional<Tensor>& gate) {  // (N, H)
  check_inputs(q, k, v, cu_seqlens, seed, distance_bias, gate);
  Tensor out = torch::stable::empty_like(q);
  Tensor logsumexp = torch::stable::new_empty(q, {q.size(1), q.size(0)}, sums_type(q));
  dispatch_floating(q.scalar_type(), "varlen_attention", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const Problem<scalar_t> problem =
        describe<scalar_t>(q, k, v, cu_seqlens, max_length, scale, dropout_p, seed, distance_bias, gate);
    scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
    acc_t* logsumexp_data = logsumexp.mutable_data_ptr<acc_t>();
    std::vector<Task> tasks;
    for (int64_t sequence = 0; sequence < problem.sequences; ++sequence) {
      const int64_t length = problem.length(sequence);
      const int64_t step = std::max(
          round_up((length + parts_of(problem, length) - 1) / parts_of(problem, length), kQueryBlock), kQueryBlock);
      for (int64_t head = 0; head < problem.heads; ++head) {
        for (int64_t query = 0; query < length; query += step) {
          tasks.push_back({sequence, head, query, std::min(query + step, length), 0, length, true, false});
        }
      }
    }
    run_tasks<ForwardScratch<acc_t>>(std::move(tasks), problem, [&](const Task& task, ForwardScratch<acc_t>& scratch) {
      attend(problem, task, scratch, out_data, logsumexp_data);
    });
  });
  return {out, logsumexp};
}

template <typename T>
struct BackwardScratch {
  template <typename scalar_t>
  explicit BackwardScratch(const Problem<scalar_t>& problem)
      : staging(kKeyBlock * problem.padded_width),
        key(kKeyBlock * problem.padded_width),
        key_transposed(kKeyBlock * problem.padded_width),
        value_transposed(kKeyBlock * problem.padded_width),
        query(rows(problem)),
        grad_out(rows(problem)),
        out(kQueryBlock * problem.padded_width),
        delta(problem.longest),
        grad_query(rows(problem)),
        grad_key(kKeyBlock * problem.padded_width),
        grad_value(kKeyBlock * problem.padded_width),
        grad_gate(problem.longest),
        bias(2 * problem.longest + kPadding),
        weights(kQueryBlock * kBlockStride),
        grads_with_gap(kGap + kQueryBlock * kBlockStride) {
    std::fill(grads_with_gap + 0, grads_with_gap + kGap + kQueryBlock * kBlockStride, T(0));
  }

  template <typename scalar_t>
  static int64_t rows(const Problem<scalar_t>& problem) {
    return round_up(problem.longest, kQueryBlock) * problem.padded_width;
  }

  T* grads() const {
    return grads_with_gap + kGap;
  }

  Buffer<T> staging, key, key_transposed, value_transposed, query, grad_out, out, delta, grad_query, grad_key,
      grad_value, grad_gate, bias, weights, grads_with_gap;
};

// Sums of the gradients of the logits along diagonals, a row for each head and chunk of queries of each sequence.
template <typename T>
struct Diagonals {
  template <typename scalar_t>
  explicit Diagonals(const Problem<scalar_t>& problem) {
    int64_t size = 0;
    for (int64_t sequence = 0; sequence < problem.sequences && !problem.bias.empty(); ++sequence) {
      starts.push_back(size);
      size += problem.heads * chunks(problem.length(sequence)) * row_size(problem.length(sequence));
    }
    sums.resize(size);
  }

  static int64_t chunks(int64_t length) {
    return (length + kQueryChunk - 1) / kQueryChunk;
  }

  // Distances from kQueryChunk before the first key of a chunk's last query, in whole vectors.
  static int64_t row_size(int64_t length) {
    return length + kQueryChunk + kGap + kPadding;
  }

  // Where the sums of a chunk have distance 0.
  T* middle(int64_t sequence, int64_t head, int64_t length, int64_t chunk) {
    const int64_t row = head * chunks(length) + chunk;
    return sums.data() + starts[sequence] + row * row_size(length) + (chunk + 1) * kQueryChunk + kGap;
  }

  std::vector<int64_t> starts;
  std::vector<T> sums;
};

template <typename scalar_t>
struct Gradients {
  using acc_t = typename Accumulator<scalar_t>::type;
  const scalar_t* grad_out;
  const scalar_t* out;
  const acc_t* logsumexp;
  scalar_t* grad_q;
  scalar_t* grad_k;
  scalar_t* grad_v;
  std::vector<acc_t> grad_gate;  // (N, H)
};

template <typename scalar_t, typename T>
void attend_backward(
    const Problem<scalar_t>& problem,
    const Task& task,
    BackwardScratch<T>& scratch,
    Gradients<scalar_t>& gradients,
    Diagonals<T>& diagonals) {
  const int64_t width = problem.width;
  const int64_t padded_width = problem.padded_width;
  const int64_t begin = problem.begins[task.sequence];
  const int64_t length = problem.length(task.sequence);
  const int64_t stride = problem.stride;
  const int64_t offset = begin * stride + task.head * width;
  const int64_t queries_of_task = task.last_query - task.first_query;
  const T* logsumexp = gradients.logsumexp + task.head * problem.total + begin;
  const T* bias = spread_bias(problem, task.head, length, +scratch.bias);

  for (int64_t row = 0; row < queries_of_task; row += kQueryBlock) {
    const int64_t rows = std::min(kQueryBlock, queries_of_task - row);
    const int64_t from = offset + (task.first_query + row) * stride;
    T* grad_out = scratch.grad_out + row * padded_width;
    load_rows(problem.q + from, stride, rows, kTileRows, width, problem.logit_scale, scratch.query + row * padded_width);
    load_rows(gradients.grad_out + from, stride, rows, kTileRows, width, T(1), grad_out);
    load_rows(gradients.out + from, stride, rows, kTileRows, width, T(1), +scratch.out);
    row_dots(+scratch.out, grad_out, rows, padded_width, scratch.delta + row);
  }
  std::fill(scratch.grad_gate + 0, scratch.grad_gate + queries_of_task, T(0));

  for (int64_t key = task.first_key; key < task.last_key; key += kKeyBlock) {
    const int64_t keys = std::min(kKeyBlock, task.last_key - key);
    load_rows(problem.v + offset + key * stride, stride, keys, kTileColumns, width, T(1), +scratch.key);
    transpose(+scratch.key, padded_width, keys, width, +scratch.value_transposed, kKeyBlock);
    load_rows(problem.k + offset + key * stride, stride, keys, kTileColumns, width, T(1), +scratch.key);
    transpose(+scratch.key, padded_width, keys, width, +scratch.key_transposed, kKeyBlock);

    for (int64_t row = 0; row < queries_of_task; row += kQueryBlock) {
      const int64_t queries = std::min(kQueryBlock, queries_of_task - row);
      const T* query = scratch.query + row * padded_width;
      const T* grad_out = scratch.grad_out + row * padded_width;
      multiply(
          RowsOfA{}, Overwrite{}, query, padded_width, queries, width, +scratch.key_transposed, kKeyBlock, keys,
          +scratch.weights, kBlockStride);
      multiply(
          RowsOfA{}, Overwrite{}, grad_out, padded_width, queries, width, +scratch.value_transposed, kKeyBlock, keys,
          scratch.grads(), kBlockStride);
      QueryBlock<scalar_t> block;
      Rows<T> rows = block.rows(problem, task, bias, task.first_query + row, queries);
      rows.first_key = key;
      rows.keys = keys;
      softmax_backward(
          rows, logsumexp + task.first_query + row, scratch.delta + row, +scratch.weights, scratch.grads());
      if (task.for_keys) {
        const auto product = [&](auto adding) {
          multiply(
              ColumnsOfA{}, adding, +scratch.weights, kBlockStride, keys, queries, grad_out, padded_width,
              padded_width, +scratch.grad_value, padded_width);
          multiply(
              ColumnsOfA{}, adding, scratch.grads(), kBlockStride, keys, queries, query, padded_width, padded_width,
              +scratch.grad_key, padded_width);
        };
        if (row == 0) {
          product(Overwrite{});
        } else {
          product(Add{});
        }
      }
      if (task.for_queries) {
        const auto product = [&](auto adding) {
          multiply(
              RowsOfA{}, adding, scratch.grads(), kBlockStride, queries, keys, +scratch.key, padded_width,
              padded_width, scratch.grad_query + row * padded_width, padded_width);
        };
        if (key == 0) {
          product(Overwrite{});
        } else {
          product(Add{});
        }
        if (bias != nullptr) {
          T* middle = diagonals.middle(task.sequence, task.head, length, (task.first_query + row) / kQueryChunk);
          bias_backward(rows, scratch.grads(), middle, scratch.grad_gate + row);
        }
      }
    }
    if (task.for_keys) {
      const T* no_factors = nullptr;
      scalar_t* grad_k = gradients.grad_k + offset + key * stride;
      scalar_t* grad_v = gradients.grad_v + offset + key * stride;
      store_rows(+scratch.grad_key, keys, width, static_cast<T>(kLnOf2), no_factors, grad_k, stride);
      store_rows(+scratch.grad_value, keys, width, T(1), no_factors, grad_v, stride);
    }
  }
  if (task.for_queries) {
    const T* no_factors = nullptr;
    scalar_t* grad_q = gradients.grad_q + offset + task.first_query * stride;
    store_rows(+scratch.grad_query, queries_of_task, width, problem.scale, no_factors, grad_q, stride);
    for (int64_t row = 0; row < queries_of_task && !gradients.grad_gate.empty(); ++row) {
      gradients.grad_gate[(begin + task.first_query + row) * problem.heads + task.head] = scratch.grad_gate[row];
    }
  }
}

// Adds the rows of all sequences and chunks, in this order, beyond R to the ends of the bias.
template <typename scalar_t, typename T>
std::vector<T> sum_diagonals(const Problem<scalar_t>& problem, Diagonals<T>& diagonals) {
  std::vector<T> grad_bias(problem.bias.size());
  for (int64_t sequence = 0; sequence < problem.sequences && !grad_bias.empty(); ++sequence) {
    const int64_t length = problem.length(sequence);
    torch::stable::parallel_for(0, problem.heads, 1, [&](int64_t first_head, int64_t last_head) {
      for (int64_t head = first_head; head < last_head; ++head) {
        T* sums = grad_bias.data() + head * (2 * problem.reach + 1) + problem.reach;
        for (int64_t chunk = 0; chunk < Diagonals<T>::chunks(length); ++chunk) {
          const T* row = diagonals.middle(sequence, head, length, chunk);
          const int64_t last_query = std::min((chunk + 1) * kQueryChunk, length) - 1;
          for (int64_t distance = -last_query; distance < length - chunk * kQueryChunk; ++distance) {
            sums[std::clamp(distance, -problem.reach, problem.reach)] += row[distance];
          }
        }
      }
    });
  }
  return grad_bias;
}

// An empty tensor where the argument was not given: a schema cannot return None.
template <typename T>
Tensor narrowed(const std::vector<T>& values, const Tensor& q, const std::optional<Tensor>& argument) {
  if (!argument.has_value()) {
    return torch::stable::new_empty(q, {0});
  }
  Tensor tensor = torch::stable::empty_like(*argument);
  dispatch_floating(tensor.scalar_type(), "varlen_attention", [&](auto tag) {
    using scalar_t = decltype(tag);
    std::transform(values.begin(), values.end(), tensor.mutable_data_ptr<scalar_t>(), [](T value) {
      return static_cast<scalar_t>(value);
    });
  });
  return tensor;
}

// A task per head of a sequence, which computes its logits once. A long sequence among few is cut into chunks, whose
// keys and queries have tasks of their own, and computes its logits twice.
template <typename scalar_t>
std::vector<Task> backward_tasks(const Problem<scalar_t>& problem) {
  std::vector<Task> tasks;
  for (int64_t sequence = 0; sequence < problem.sequences; ++sequence) {
    const int64_t length = problem.length(sequence);
    const int64_t parts = parts_of(problem, length);
    const int64_t query_step = round_up((length + parts - 1) / parts, kQueryChunk);
    const int64_t key_step = round_up((length + parts - 1) / parts, kKeyBlock);
    for (int64_t head = 0; head < problem.heads && length > 0; ++head) {
      if (parts == 1) {
        tasks.push_back({sequence, head, 0, length, 0, length, true, true});
        continue;
      }
      for (int64_t query = 0; query < length; query += query_step) {
        tasks.push_back({sequence, head, query, std::min(query + query_step, length), 0, length, true, false});
      }
      for (int64_t key = 0; key < length; key += key_step) {
        tasks.push_back({sequence, head, 0, length, key, std::min(key + key_step, length), false, true});
      }
    }
  }
  return tasks;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out,  // (N, H, E)
    const Tensor& q,  // (N, H, E)
    const Tensor& k,  // (N, H, E)
    const Tensor& v,  // (N, H, E)
    const Tensor& out,  // (N, H, E)
    const Tensor& logsumexp,  // (H, N)
    const Tensor& cu_seqlens,  // (B + 1,)
    int64_t max_length,
    double scale,
    double dropout_p,
    const std::optional<Tensor>& seed,  // ()
    const std::optional<Tensor>& distance_bias,  // (H, 2R + 1)
    const std::optional<Tensor>& gate) {  // (N, H)
  check_inputs(q, k, v, cu_seqlens, seed, distance_bias, gate);
  check_tensor(grad_out, "grad_out", 3, q.scalar_type());
  check_tensor(out, "out", 3, q.scalar_type());
  check_tensor(logsumexp, "logsumexp", 2, sums_type(q));
  Tensor grad_q = torch::stable::empty_like(q);
  Tensor grad_k = torch::stable::empty_like(q);
  Tensor grad_v = torch::stable::empty_like(q);
  Tensor grad_distance_bias, grad_gate;
  dispatch_floating(q.scalar_type(), "varlen_attention", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const Problem<scalar_t> problem =
        describe<scalar_t>(q, k, v, cu_seqlens, max_length, scale, dropout_p, seed, distance_bias, gate);
    Gradients<scalar_t> gradients{
        grad_out.const_data_ptr<scalar_t>(),
        out.const_data_ptr<scalar_t>(),
        logsumexp.const_data_ptr<acc_t>(),
        grad_q.mutable_data_ptr<scalar_t>(),
        grad_k.mutable_data_ptr<scalar_t>(),
        grad_v.mutable_data_ptr<scalar_t>(),
        std::vector<acc_t>(problem.gate.size())};
    Diagonals<acc_t> diagonals(problem);
    run_tasks<BackwardScratch<acc_t>>(
        backward_tasks(problem), problem, [&](const Task& task, BackwardScratch<acc_t>& scratch) {
          attend_backward(problem, task, scratch, gradients, diagonals);
        });
    grad_distance_bias = narrowed(sum_diagonals(problem, diagonals), q, distance_bias);
    grad_gate = narrowed(gradients.grad_gate, q, gate);
  });
  return {grad_q, grad_k, grad_v, grad_distance_bias, grad_gate};
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl_native, CPU, m) {
  m.impl("varlen_attention_fwd", TORCH_BOX(&fastssl::forward));
  m.impl("varlen_attention_bwd", TORCH_BOX(&fastssl::backward));
}
