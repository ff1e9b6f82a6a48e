// Attention of packed sequences on the CPU. Derivation and conventions: fastssl/kernels/varlen_attention/README.md.
//
// A task is one head of one sequence, or a part of it if a whole head would keep a thread busy while others wait. It
// works on blocks of queries and keys. It multiplies blocks that stay in cache (common/block_gemm.h), and computes the
// softmax between the products (rows.h). Operands are copied once per task (operands.h). Each element is written by one
// task and summed in order of the blocks, so its bits depend neither on the batch nor on the number of threads.

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "operands.h"
#include "problem.h"
#include "rows.h"

namespace fastssl {
namespace {

// Number of rows of values that stay in the first-level cache while all queries of a block use them.
constexpr int64_t kValueBlock = 96;
// Gradients of the distance bias are summed over the queries of a chunk, then over the chunks in order.
constexpr int64_t kQueryChunk = 8 * kQueryBlock;
static_assert(kValueBlock % 2 == 0 && kQueryBlock % 2 == 0 && kKeyBlock % 2 == 0, "blocks must not cut pairs");

// Calls `function` with a value of the operand type that products use for elements of scalar_t.
template <typename scalar_t, typename Function>
void dispatch_operand(const Function& function) {
  if constexpr (std::is_same_v<scalar_t, torch::headeronly::BFloat16>) {
    if (multiplies_bfloat16()) {
      return function(BFloat16Pair{});
    }
  }
  function(typename Accumulator<scalar_t>::type{});
}

// C = A B if `first`, else C += A B.
template <typename TransposedA, typename... Args>
void accumulate(bool first, TransposedA transposed, Args... args) {
  if (first) {
    multiply(transposed, Overwrite{}, args...);
  } else {
    multiply(transposed, Add{}, args...);
  }
}

// Where a task finds its rows.
struct Place {
  template <typename scalar_t>
  Place(const Problem<scalar_t>& problem, const Task& task)
      : begin(problem.begins[task.sequence]),
        length(problem.length(task.sequence)),
        origin(begin * problem.stride + task.head * problem.width),
        queries(origin + task.first_query * problem.stride),
        query_count(task.last_query - task.first_query) {}

  int64_t begin;  // the sequence's first frame
  int64_t length;  // length of the sequence
  int64_t origin;  // offset of that frame and the task's head in (N, H, E)
  int64_t queries;  // offset of the task's first query
  int64_t query_count;
};

template <typename Operand, typename T>
struct ForwardScratch {
  template <typename scalar_t>
  explicit ForwardScratch(const Problem<scalar_t>& problem)
      : row_size(round_up(depth_of<Operand>(problem.width), kTileColumns)),
        logits_stride(round_up(problem.longest, kTileColumns) + kTileColumns),
        staging(kKeyBlock * row_size),
        keys(round_up(problem.longest, kKeyBlock) * row_size),
        values(depth_of<Operand>(problem.longest) * problem.padded_width),
        query(kQueryBlock * row_size),
        weights(kIsPair<Operand> ? kQueryBlock * logits_stride / 2 : 0),
        out(kQueryBlock * problem.padded_width),
        logits(kQueryBlock * logits_stride),
        bias(2 * problem.longest + kPadding) {}

  int64_t row_size;  // row size of an operand that is summed over its columns
  int64_t logits_stride;
  Buffer<Operand> staging, keys, values, query, weights;
  Buffer<T> out, logits, bias;
};

template <typename scalar_t, typename Operand, typename T>
void attend(
    const Problem<scalar_t>& problem,
    const Task& task,
    ForwardScratch<Operand, T>& scratch,
    scalar_t* out,
    T* logsumexp) {
  const int64_t width = problem.width;
  const int64_t padded_width = problem.padded_width;
  const int64_t stride = problem.stride;
  const Place place(problem, task);
  const int64_t length = place.length;
  const int64_t row_size = scratch.row_size;
  const int64_t logits_stride = scratch.logits_stride;
  Operand* staging = scratch.staging.data();
  Operand* keys = scratch.keys.data();
  Operand* values = scratch.values.data();
  Operand* query = scratch.query.data();
  T* logits = scratch.logits.data();
  T* block_out = scratch.out.data();

  const T* bias = spread_bias(problem, task.head, length, scratch.bias.data());
  for (int64_t key = 0; key < length; key += kKeyBlock) {  // blocks of (E, kKeyBlock)
    const int64_t rows = std::min(kKeyBlock, length - key);
    load_along_columns(problem.k + place.origin + key * stride, stride, rows, kTileColumns, width, staging);
    transpose(staging, row_size, rows, row_size, keys + key * row_size, kKeyBlock);
  }
  load_along_rows(problem.v + place.origin, stride, length, width, values);

  for (int64_t first = task.first_query; first < task.last_query; first += kQueryBlock) {
    const int64_t queries = std::min(kQueryBlock, task.last_query - first);
    load_along_columns(problem.q + place.origin + first * stride, stride, queries, kTileRows, width, query);
    for (int64_t key = 0; key < length; key += kKeyBlock) {
      multiply(
          RowsOfA{}, Overwrite{}, query, row_size, queries, depth_of<Operand>(width), keys + key * row_size, kKeyBlock,
          std::min(kKeyBlock, length - key), logits + key, logits_stride);
    }
    QueryBlock<scalar_t> block;
    Rows<T> rows = block.rows(problem, task, bias, first, queries);
    rows.keys = length;
    T factors[kQueryBlock];
    softmax(rows, logits, logits_stride, +factors, logsumexp + task.head * problem.total + place.begin + first);
    const Operand* weights = along_columns(logits, logits_stride, queries, length, scratch.weights.data());
    for (int64_t key = 0; key < length; key += kValueBlock) {
      accumulate(
          key == 0, RowsOfA{}, weights + key / kDepth<Operand>, logits_stride / kDepth<Operand>, queries,
          depth_of<Operand>(std::min(kValueBlock, length - key)), values + key / kDepth<Operand> * padded_width,
          padded_width, padded_width, block_out, padded_width);
    }
    store_rows(block_out, queries, width, T(1), +factors, out + place.origin + first * stride, stride);
  }
}

template <typename scalar_t>
std::vector<Task> forward_tasks(const Problem<scalar_t>& problem) {
  std::vector<Task> tasks;
  for (int64_t sequence = 0; sequence < problem.sequences; ++sequence) {
    const int64_t length = problem.length(sequence);
    const int64_t parts = parts_of(problem, length);
    const int64_t step = round_up(divide_up(length, parts), kQueryBlock);
    for (int64_t head = 0; head < problem.heads; ++head) {
      for (int64_t query = 0; query < length; query += step) {
        tasks.push_back({sequence, head, query, std::min(query + step, length), 0, length, true, false});
      }
    }
  }
  return tasks;
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& q,  // (N, H, E)
    const Tensor& k,  // (N, H, E)
    const Tensor& v,  // (N, H, E)
    const Tensor& cu_seqlens,  // (B + 1,)
    int64_t max_length,
    double scale,
    double dropout_p,
    int64_t randomness,
    const std::optional<Tensor>& seed,  // ()
    const std::optional<Tensor>& distance_bias,  // (H, 2R + 1)
    const std::optional<Tensor>& gate) {  // (N, H)
  check_inputs(q, k, v, cu_seqlens, seed, distance_bias, gate);
  Tensor out = torch::stable::empty_like(q);
  Tensor logsumexp = torch::stable::new_empty(q, {q.size(1), q.size(0)}, accumulator_dtype(q.scalar_type()));
  dispatch_floating(q.scalar_type(), "varlen_attention", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const Problem<scalar_t> problem =
        describe<scalar_t>(q, k, v, cu_seqlens, max_length, scale, dropout_p, randomness, seed, distance_bias, gate);
    scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
    acc_t* logsumexp_data = logsumexp.mutable_data_ptr<acc_t>();
    dispatch_operand<scalar_t>([&](auto operand) {
      using Scratch = ForwardScratch<decltype(operand), acc_t>;
      run_tasks<Scratch>(forward_tasks(problem), problem, [&](const Task& task, Scratch& scratch) {
        attend(problem, task, scratch, out_data, logsumexp_data);
      });
    });
  });
  return {out, logsumexp};
}

template <typename Operand, typename T>
struct BackwardScratch {
  template <typename scalar_t>
  explicit BackwardScratch(const Problem<scalar_t>& problem)
      : row_size(round_up(depth_of<Operand>(problem.width), kTileColumns)),
        staging(kKeyBlock * row_size),
        keys_transposed(kKeyBlock * row_size),
        values_transposed(kKeyBlock * row_size),
        keys(depth_of<Operand>(kKeyBlock) * problem.padded_width),
        query(rows(problem) * row_size),
        grad_out(rows(problem) * row_size),
        query_along_rows(kIsPair<Operand> ? rows(problem) / 2 * problem.padded_width : 0),
        grad_out_along_rows(kIsPair<Operand> ? rows(problem) / 2 * problem.padded_width : 0),
        operand(kIsPair<Operand> ? kQueryBlock / 2 * kBlockStride : 0),
        delta(problem.longest),
        grad_query(rows(problem) * problem.padded_width),
        grad_key(kKeyBlock * problem.padded_width),
        grad_value(kKeyBlock * problem.padded_width),
        grad_gate(problem.longest),
        bias(2 * problem.longest + kPadding),
        weights(kQueryBlock * kBlockStride),
        grads_with_gap(kGap + kQueryBlock * kBlockStride) {
    std::fill_n(grads_with_gap.data(), kGap + kQueryBlock * kBlockStride, T(0));
  }

  template <typename scalar_t>
  static int64_t rows(const Problem<scalar_t>& problem) {
    return round_up(problem.longest, kQueryBlock);
  }

  T* grads() const {  // gradients of the logits of a block
    return grads_with_gap.data() + kGap;
  }

  int64_t row_size;  // row size of an operand that is summed over its columns
  Buffer<Operand> staging, keys_transposed, values_transposed, keys, query, grad_out, query_along_rows,
      grad_out_along_rows, operand;
  Buffer<T> delta, grad_query, grad_key, grad_value, grad_gate, bias, weights, grads_with_gap;
};

// Sums of the logits' gradients along diagonals: one row for each sequence, head and chunk of queries.
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
    return divide_up(length, kQueryChunk);
  }

  // Room for every distance between a key and a query of a chunk, and for whole vectors at both ends.
  static int64_t row_size(int64_t length) {
    return length + kQueryChunk + kGap + kPadding;
  }

  // Points to the sum at distance 0 of a chunk.
  double* middle(int64_t sequence, int64_t head, int64_t length, int64_t chunk) {
    const int64_t row = head * chunks(length) + chunk;
    return sums.data() + starts[sequence] + row * row_size(length) + (chunk + 1) * kQueryChunk + kGap;
  }

  std::vector<int64_t> starts;
  std::vector<double> sums;
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

template <typename scalar_t, typename Operand, typename T>
void load_queries(
    const Problem<scalar_t>& problem,
    const Place& place,
    const Gradients<scalar_t>& gradients,
    BackwardScratch<Operand, T>& scratch) {
  const int64_t stride = problem.stride;
  const int64_t width = problem.width;
  const int64_t count = place.query_count;
  const scalar_t* query = problem.q + place.queries;
  const scalar_t* grad_out = gradients.grad_out + place.queries;
  load_along_columns(query, stride, count, kTileRows, width, scratch.query.data());
  load_along_columns(grad_out, stride, count, kTileRows, width, scratch.grad_out.data());
  if constexpr (kIsPair<Operand>) {
    load_along_rows(query, stride, count, width, scratch.query_along_rows.data());
    load_along_rows(grad_out, stride, count, width, scratch.grad_out_along_rows.data());
  }
  row_dots(grad_out, gradients.out + place.queries, count, stride, width, scratch.delta.data());
}

// Loads a block of keys and values, whose first row is at offset `at_key`.
template <typename scalar_t, typename Operand, typename T>
void load_keys(
    const Problem<scalar_t>& problem, int64_t at_key, int64_t keys, BackwardScratch<Operand, T>& scratch) {
  const int64_t row_size = scratch.row_size;
  const auto transposed = [&](const scalar_t* x, Operand* out) {
    load_along_columns(x, problem.stride, keys, kTileColumns, problem.width, scratch.staging.data());
    transpose(scratch.staging.data(), row_size, keys, row_size, out, kKeyBlock);
  };
  transposed(problem.v + at_key, scratch.values_transposed.data());
  transposed(problem.k + at_key, scratch.keys_transposed.data());
  load_along_rows(problem.k + at_key, problem.stride, keys, problem.width, scratch.keys.data());
}

// Computes the attention weights of a block and the gradients of its logits. `row` counts from the task's first query.
template <typename scalar_t, typename Operand, typename T>
void block_gradients(
    const Problem<scalar_t>& problem,
    const Rows<T>& rows,
    int64_t row,
    const T* logsumexp,
    BackwardScratch<Operand, T>& scratch) {
  const int64_t row_size = scratch.row_size;
  const int64_t depth = depth_of<Operand>(problem.width);
  const auto product = [&](const Buffer<Operand>& left, const Buffer<Operand>& right, T* out) {
    multiply(
        RowsOfA{}, Overwrite{}, left.data() + row * row_size, row_size, rows.queries, depth, right.data(), kKeyBlock,
        rows.keys, out, kBlockStride);
  };
  product(scratch.query, scratch.keys_transposed, scratch.weights.data());
  product(scratch.grad_out, scratch.values_transposed, scratch.grads());
  softmax_backward(rows, logsumexp + row, scratch.delta.data() + row, scratch.weights.data(), scratch.grads());
}

// Adds a block to the gradients of its keys and values.
template <typename Operand, typename T>
void add_key_gradients(const Rows<T>& rows, int64_t row, int64_t padded_width, BackwardScratch<Operand, T>& scratch) {
  const int64_t at_row = row / kDepth<Operand> * padded_width;
  const auto add = [&](const T* block, const Buffer<Operand>& right, Buffer<T>& out) {
    accumulate(
        row == 0, ColumnsOfA{}, along_rows(block, kBlockStride, rows.queries, rows.keys, scratch.operand.data()),
        kBlockStride, rows.keys, depth_of<Operand>(rows.queries), right.data() + at_row, padded_width,
        padded_width, out.data(), padded_width);
  };
  add(scratch.weights.data(), kIsPair<Operand> ? scratch.grad_out_along_rows : scratch.grad_out, scratch.grad_value);
  add(scratch.grads(), kIsPair<Operand> ? scratch.query_along_rows : scratch.query, scratch.grad_key);
}

// Adds a block to the gradients of its queries.
template <typename Operand, typename T>
void add_query_gradients(const Rows<T>& rows, int64_t row, int64_t padded_width, BackwardScratch<Operand, T>& scratch) {
  const T* block = scratch.grads();
  const Operand* grads = along_columns(block, kBlockStride, rows.queries, rows.keys, scratch.operand.data());
  accumulate(
      rows.first_key == 0, RowsOfA{}, grads, kBlockStride / kDepth<Operand>, rows.queries, depth_of<Operand>(rows.keys),
      scratch.keys.data(), padded_width, padded_width, scratch.grad_query.data() + row * padded_width, padded_width);
}

template <typename scalar_t, typename Operand, typename T>
void attend_backward(
    const Problem<scalar_t>& problem,
    const Task& task,
    BackwardScratch<Operand, T>& scratch,
    Gradients<scalar_t>& gradients,
    Diagonals& diagonals) {
  const int64_t padded_width = problem.padded_width;
  const Place place(problem, task);
  const T* logsumexp = gradients.logsumexp + task.head * problem.total + place.begin + task.first_query;
  const T* bias = spread_bias(problem, task.head, place.length, scratch.bias.data());
  const auto store = [&](const Buffer<T>& grad, int64_t rows, T factor, scalar_t* out) {
    store_rows(grad.data(), rows, problem.width, factor, static_cast<const T*>(nullptr), out, problem.stride);
  };
  load_queries(problem, place, gradients, scratch);
  std::fill_n(scratch.grad_gate.data(), place.query_count, T(0));

  for (int64_t first_key = task.first_key; first_key < task.last_key; first_key += kKeyBlock) {
    const int64_t keys = std::min(kKeyBlock, task.last_key - first_key);
    const int64_t at_key = place.origin + first_key * problem.stride;
    load_keys(problem, at_key, keys, scratch);
    for (int64_t row = 0; row < place.query_count; row += kQueryBlock) {
      const int64_t first_query = task.first_query + row;
      QueryBlock<scalar_t> block;
      Rows<T> rows = block.rows(problem, task, bias, first_query, std::min(kQueryBlock, place.query_count - row));
      rows.first_key = first_key;
      rows.keys = keys;
      block_gradients(problem, rows, row, logsumexp, scratch);
      if (place.length == 1) {
        scratch.grads()[0] = 0;  // the softmax of one logit is constant, so the gradient is exactly zero
      }
      if (task.for_keys) {
        add_key_gradients(rows, row, padded_width, scratch);
      }
      if (task.for_queries) {
        add_query_gradients(rows, row, padded_width, scratch);
        if (bias != nullptr) {
          double* middle = diagonals.middle(task.sequence, task.head, place.length, first_query / kQueryChunk);
          bias_backward(rows, static_cast<const T*>(scratch.grads()), middle, scratch.grad_gate.data() + row);
        }
      }
    }
    if (task.for_keys) {
      store(scratch.grad_key, keys, problem.scale, gradients.grad_k + at_key);
      store(scratch.grad_value, keys, T(1), gradients.grad_v + at_key);
    }
  }
  if (task.for_queries) {
    store(scratch.grad_query, place.query_count, problem.scale, gradients.grad_q + place.queries);
    for (int64_t row = 0; row < place.query_count && !gradients.grad_gate.empty(); ++row) {
      gradients.grad_gate[(place.begin + task.first_query + row) * problem.heads + task.head] = scratch.grad_gate[row];
    }
  }
}

// Adds the rows of all sequences and chunks, in this order. Distances beyond R count towards the ends of the bias.
template <typename scalar_t>
std::vector<double> sum_diagonals(const Problem<scalar_t>& problem, Diagonals& diagonals) {
  std::vector<double> grad_bias(problem.bias.size());
  for (int64_t sequence = 0; sequence < problem.sequences && !grad_bias.empty(); ++sequence) {
    const int64_t length = problem.length(sequence);
    torch::stable::parallel_for(0, problem.heads, 1, [&](int64_t first_head, int64_t last_head) {
      for (int64_t head = first_head; head < last_head; ++head) {
        double* sums = grad_bias.data() + head * (2 * problem.reach + 1) + problem.reach;
        for (int64_t chunk = 0; chunk < Diagonals::chunks(length); ++chunk) {
          const double* row = diagonals.middle(sequence, head, length, chunk);
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

// Returns the values in the dtype of `argument`; an empty tensor if it was not given, because a schema cannot return
// None.
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

// Each head of a sequence is one task, which computes its logits once. If one sequence dominates the batch, its heads
// are split into parts with separate tasks for keys and for queries, which compute the logits twice.
template <typename scalar_t>
std::vector<Task> backward_tasks(const Problem<scalar_t>& problem) {
  std::vector<Task> tasks;
  for (int64_t sequence = 0; sequence < problem.sequences; ++sequence) {
    const int64_t length = problem.length(sequence);
    const int64_t parts = parts_of(problem, length);
    const int64_t query_step = round_up(divide_up(length, parts), kQueryChunk);
    const int64_t key_step = round_up(divide_up(length, parts), kKeyBlock);
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
    int64_t randomness,
    const std::optional<Tensor>& seed,  // ()
    const std::optional<Tensor>& distance_bias,  // (H, 2R + 1)
    const std::optional<Tensor>& gate) {  // (N, H)
  check_inputs(q, k, v, cu_seqlens, seed, distance_bias, gate);
  check_tensor(grad_out, "grad_out", 3, q.scalar_type());
  check_tensor(out, "out", 3, q.scalar_type());
  check_tensor(logsumexp, "logsumexp", 2, accumulator_dtype(q.scalar_type()));
  Tensor grad_q = torch::stable::empty_like(q);
  Tensor grad_k = torch::stable::empty_like(q);
  Tensor grad_v = torch::stable::empty_like(q);
  Tensor grad_distance_bias, grad_gate;
  dispatch_floating(q.scalar_type(), "varlen_attention", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const Problem<scalar_t> problem =
        describe<scalar_t>(q, k, v, cu_seqlens, max_length, scale, dropout_p, randomness, seed, distance_bias, gate);
    Gradients<scalar_t> gradients{
        grad_out.const_data_ptr<scalar_t>(),
        out.const_data_ptr<scalar_t>(),
        logsumexp.const_data_ptr<acc_t>(),
        grad_q.mutable_data_ptr<scalar_t>(),
        grad_k.mutable_data_ptr<scalar_t>(),
        grad_v.mutable_data_ptr<scalar_t>(),
        std::vector<acc_t>(problem.gate.size())};
    Diagonals diagonals(problem);
    dispatch_operand<scalar_t>([&](auto operand) {
      using Scratch = BackwardScratch<decltype(operand), acc_t>;
      run_tasks<Scratch>(backward_tasks(problem), problem, [&](const Task& task, Scratch& scratch) {
        attend_backward(problem, task, scratch, gradients, diagonals);
      });
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
