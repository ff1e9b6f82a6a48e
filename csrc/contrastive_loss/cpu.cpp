// The contrastive loss on the CPU. Derivation and conventions: fastssl/kernels/contrastive_loss/README.md.
//
// The kernels compute dot products with rows of a table, and weighted sums of its rows. The rows that an utterance
// needs stay in the second-level cache. The table is the tensor itself, or a copy in the accumulation type with rows
// padded to whole vectors. Rows are not normalised: the results and the weights are scaled by their lengths instead.
// One thread writes each frame, and in the backward each target. The order of its additions depends neither on the
// batch nor on the number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>

#include "../common/buffer.h"
#include "../common/convert.h"
#include "../common/counting_sort.h"
#include "../common/integers.h"
#include "../common/isa.h"
#include "../common/lanes.h"
#include "../common/simd.h"
#include "../common/tensor_checks.h"
#include "../common/vector_math.h"

namespace fastssl {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kFramesPerTask = 16;
constexpr double kEps = 1e-8;  // lower bound of the norms, as in torch.nn.functional.cosine_similarity

FASTSSL_INLINE int64_t padded_to_lanes(int64_t n) {
  return round_up(n, kLanes);
}

// A loop over lanes, for several groups of kLanes sums side by side. The pragma keeps the loop. If GCC unrolled it, it
// would vectorise the surrounding loop instead, with shuffles.
#define FASTSSL_FOR_LANES(lane) _Pragma("GCC unroll 1") for (int64_t lane = 0; lane < kLanes; ++lane)

FASTSSL_INLINE uint32_t bits_of(float x) {
  return __builtin_bit_cast(uint32_t, x);
}

FASTSSL_INLINE uint32_t bits_of(double x) {
  const uint64_t bits = __builtin_bit_cast(uint64_t, x);
  return static_cast<uint32_t>(bits ^ (bits >> 32));
}

template <typename acc_t>
FASTSSL_INLINE acc_t dot_of(const acc_t* a, const acc_t* b, int64_t padded) {
  return sum_by_halves<kLanes, acc_t>(padded, [=](int64_t d) { return a[d] * b[d]; });
}

// Copies x and pads it with zeros.
template <Isa isa, typename scalar_t, typename acc_t>
FASTSSL_INLINE void widen_body(acc_t* wide, const scalar_t* x, int64_t width) {
  convert(wide, x, width);
  std::fill(wide + width, wide + padded_to_lanes(width), acc_t(0));
}
FASTSSL_ISA_VARIANTS(widen)

template <Isa isa, typename acc_t>
FASTSSL_INLINE acc_t norm_body(const acc_t* x, int64_t padded) {
  return std::sqrt(dot_of(x, x, padded));
}
FASTSSL_ISA_VARIANTS(norm)

// Equal rows have equal hashes; 0.0 and -0.0 are equal.
template <Isa isa, typename acc_t, typename scalar_t>
FASTSSL_INLINE uint32_t hash_row_body(const scalar_t* x, acc_t zero, int64_t width) {
  uint32_t hash = 0;
  for (int64_t d = 0; d < width; ++d) {
    const uint32_t bits = bits_of(static_cast<acc_t>(x[d]) + zero);
    hash += (bits ^ (bits >> 15)) * (static_cast<uint32_t>(d) * 0x9E3779B0u + 0x85EBCA6Bu);
  }
  return hash;
}
FASTSSL_ISA_VARIANTS(hash_row)

template <Isa isa, typename scalar_t>
FASTSSL_INLINE bool equal_rows_body(const scalar_t* a, const scalar_t* b, int64_t width) {
  using acc_t = typename Accumulator<scalar_t>::type;
  uint32_t differences = 0;
  for (int64_t d = 0; d < width; ++d) {
    differences += static_cast<acc_t>(a[d]) != static_cast<acc_t>(b[d]);
  }
  return differences == 0;
}
FASTSSL_ISA_VARIANTS(equal_rows)

// out[i] = x . table[rows[i]]
template <Isa isa, typename acc_t>
FASTSSL_INLINE void dots_body(
    acc_t* out, const acc_t* x, const acc_t* table, const int32_t* rows, int64_t count, int64_t padded) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const acc_t* row_0 = table + rows[i] * padded;
    const acc_t* row_1 = table + rows[i + 1] * padded;
    const acc_t* row_2 = table + rows[i + 2] * padded;
    const acc_t* row_3 = table + rows[i + 3] * padded;
    acc_t sum_0[kLanes] = {}, sum_1[kLanes] = {}, sum_2[kLanes] = {}, sum_3[kLanes] = {};
    for (int64_t d = 0; d < padded; d += kLanes) {
      FASTSSL_FOR_LANES(lane) sum_0[lane] += x[d + lane] * row_0[d + lane];
      FASTSSL_FOR_LANES(lane) sum_1[lane] += x[d + lane] * row_1[d + lane];
      FASTSSL_FOR_LANES(lane) sum_2[lane] += x[d + lane] * row_2[d + lane];
      FASTSSL_FOR_LANES(lane) sum_3[lane] += x[d + lane] * row_3[d + lane];
    }
    out[i] = add_halves<kLanes>(sum_0);
    out[i + 1] = add_halves<kLanes>(sum_1);
    out[i + 2] = add_halves<kLanes>(sum_2);
    out[i + 3] = add_halves<kLanes>(sum_3);
  }
  for (; i < count; ++i) {
    out[i] = dot_of(x, table + rows[i] * padded, padded);
  }
}
FASTSSL_ISA_VARIANTS(dots)

// sum += sum over i of weights[i] * table[rows[i]], in the order of i
template <Isa isa, typename acc_t>
FASTSSL_INLINE void add_weighted_rows_body(
    acc_t* sum, const acc_t* table, const int32_t* rows, const acc_t* weights, int64_t count, int64_t padded) {
  int64_t begin = 0;
  for (; begin + 4 * kLanes <= padded; begin += 4 * kLanes) {
    acc_t sum_0[kLanes], sum_1[kLanes], sum_2[kLanes], sum_3[kLanes];
    FASTSSL_FOR_LANES(lane) sum_0[lane] = sum[begin + lane];
    FASTSSL_FOR_LANES(lane) sum_1[lane] = sum[begin + lane + kLanes];
    FASTSSL_FOR_LANES(lane) sum_2[lane] = sum[begin + lane + 2 * kLanes];
    FASTSSL_FOR_LANES(lane) sum_3[lane] = sum[begin + lane + 3 * kLanes];
    for (int64_t i = 0; i < count; ++i) {
      const acc_t* row = table + rows[i] * padded + begin;
      FASTSSL_FOR_LANES(lane) sum_0[lane] += weights[i] * row[lane];
      FASTSSL_FOR_LANES(lane) sum_1[lane] += weights[i] * row[lane + kLanes];
      FASTSSL_FOR_LANES(lane) sum_2[lane] += weights[i] * row[lane + 2 * kLanes];
      FASTSSL_FOR_LANES(lane) sum_3[lane] += weights[i] * row[lane + 3 * kLanes];
    }
    FASTSSL_FOR_LANES(lane) sum[begin + lane] = sum_0[lane];
    FASTSSL_FOR_LANES(lane) sum[begin + lane + kLanes] = sum_1[lane];
    FASTSSL_FOR_LANES(lane) sum[begin + lane + 2 * kLanes] = sum_2[lane];
    FASTSSL_FOR_LANES(lane) sum[begin + lane + 3 * kLanes] = sum_3[lane];
  }
  for (; begin < padded; begin += kLanes) {
    acc_t sum_0[kLanes];
    FASTSSL_FOR_LANES(lane) sum_0[lane] = sum[begin + lane];
    for (int64_t i = 0; i < count; ++i) {
      const acc_t* row = table + rows[i] * padded + begin;
      FASTSSL_FOR_LANES(lane) sum_0[lane] += weights[i] * row[lane];
    }
    FASTSSL_FOR_LANES(lane) sum[begin + lane] = sum_0[lane];
  }
}
FASTSSL_ISA_VARIANTS(add_weighted_rows)

// log sum exp(logits) - logits[0]. The logits are padded with -inf.
template <Isa isa, typename acc_t>
FASTSSL_INLINE acc_t cross_entropy_body(const acc_t* logits, int64_t padded) {
  const acc_t highest = largest<isa, kLanes>(logits, padded);
  const acc_t sum = sum_by_halves<kLanes, acc_t>(padded, [=](int64_t k) { return vector_exp(logits[k] - highest); });
  return std::log(sum) + (highest - logits[0]);
}
FASTSSL_ISA_VARIANTS(cross_entropy)

// Whether no negative scores higher than the positive and at least one scores lower.
template <Isa isa, typename acc_t>
FASTSSL_INLINE bool told_apart_body(acc_t positive, const acc_t* negatives, int64_t count) {
  int32_t not_below = 0;
  int32_t lower = 0;
  for (int64_t k = 0; k < count; ++k) {
    not_below += !(positive >= negatives[k]);
    lower += positive > negatives[k];
  }
  return not_below == 0 && lower > 0;
}
FASTSSL_ISA_VARIANTS(told_apart)

// weights[k] = scale * exp(logits[k] - log_sum)
template <Isa isa, typename acc_t>
FASTSSL_INLINE void softmax_body(acc_t* weights, const acc_t* logits, acc_t log_sum, acc_t scale, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    weights[k] = scale * vector_exp(logits[k] - log_sum);
  }
}
FASTSSL_ISA_VARIANTS(softmax)

// Turns the gradient of x * scale, where scale = 1 / max(|x|, eps), into the gradient of x.
template <Isa isa, typename scalar_t, typename acc_t>
FASTSSL_INLINE void store_gradient_body(
    scalar_t* grad, const acc_t* grad_unit, const acc_t* x, acc_t scale, int64_t width) {
  const bool has_direction = scale < static_cast<acc_t>(1 / kEps);
  const acc_t along = has_direction ? dot_of(grad_unit, x, padded_to_lanes(width)) * scale * scale : acc_t(0);
  for (int64_t d = 0; d < width; ++d) {
    grad[d] = static_cast<scalar_t>((grad_unit[d] - x[d] * along) * scale);
  }
}
FASTSSL_ISA_VARIANTS(store_gradient)

// Calls `function` with a pointer to the negatives, as int32_t or int64_t depending on the tensor.
template <typename Function>
void dispatch_index(const Tensor& negatives, const Function& function) {
  if (negatives.scalar_type() == ScalarType::Int) {
    return function(negatives.const_data_ptr<int32_t>());
  }
  STD_TORCH_CHECK(negatives.scalar_type() == ScalarType::Long, "negatives: must be int32 or int64");
  return function(negatives.const_data_ptr<int64_t>());
}

// The rows of a matrix in the accumulation type, padded to whole vectors, and the factors that scale them to length 1.
// Call `prepare` for a row before reading it.
template <typename scalar_t, typename acc_t>
class Table {
 public:
  Table(const scalar_t* x, int64_t frames, int64_t width)
      : x_(x),
        width_(width),
        padded_(padded_to_lanes(width)),
        is_copied_(!std::is_same_v<scalar_t, acc_t> || width != padded_),
        copy_(is_copied_ ? frames * padded_ : 0),
        scales_(frames) {}

  void prepare(int64_t n) const {
    if (is_copied_) {
      widen(copy_.data() + n * padded_, x_ + n * width_, width_);
    }
    scales_[n] = 1 / std::max(norm(row(n), padded_), static_cast<acc_t>(kEps));
  }

  const acc_t* row(int64_t n) const {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      return (is_copied_ ? copy_.data() : x_) + n * padded_;
    } else {
      return copy_.data() + n * padded_;
    }
  }

  acc_t scale(int64_t n) const {
    return scales_[n];
  }

  int64_t padded() const {
    return padded_;
  }

 private:
  const scalar_t* x_;
  int64_t width_;
  int64_t padded_;
  bool is_copied_;  // whether the matrix has another type or unpadded rows
  Buffer<acc_t> copy_;  // (N, padded)
  Buffer<acc_t> scales_;  // (N,)
};

void check_inputs(const Tensor& context, const Tensor& targets, const Tensor& negatives) {
  check_tensor(context, "context", 2, context.scalar_type());
  check_tensor(targets, "targets", 2, context.scalar_type());
  check_tensor(negatives, "negatives", 2, negatives.scalar_type());
  STD_TORCH_CHECK(
      targets.size(0) == context.size(0) && targets.size(1) == context.size(1) && negatives.size(0) == context.size(0),
      "context (N, D), targets (N, D) and negatives (N, K): shapes do not match");
  STD_TORCH_CHECK(context.size(0) <= std::numeric_limits<int32_t>::max(), "context: too many frames");
}

template <typename acc_t>
constexpr acc_t kNone = -std::numeric_limits<acc_t>::infinity();  // the logit of an ignored negative

// Pointers to the arguments and results of the forward; index_t is the type of the negatives.
template <typename scalar_t, typename index_t>
struct Forward {
  using acc_t = typename Accumulator<scalar_t>::type;
  const Table<scalar_t, acc_t>& context;
  const Table<scalar_t, acc_t>& targets;
  const scalar_t* target_rows;  // (N, D)
  const uint32_t* hashes;  // (N,) hashes of the target rows
  const index_t* negatives;  // (N, K)
  int64_t frames;
  int64_t width;
  int64_t count;  // K
  acc_t inverse_temperature;
  acc_t* loss;  // (N,)
  bool* correct;  // (N,)
  acc_t* logits;  // (N, K + 1)
  std::atomic<bool>& out_of_range;

  bool equals_target(int64_t m, int64_t n) const {
    return hashes[m] == hashes[n] && equal_rows(target_rows + m * width, target_rows + n * width, width);
  }
};

// The logits of one frame without those of ignored negatives, the positive first.
template <typename acc_t>
struct Candidates {
  explicit Candidates(int64_t count) : rows(count + 1), places(count + 1), logits(padded_to_lanes(count + 1)) {}

  Buffer<int32_t> rows;  // row numbers in targets
  Buffer<int64_t> places;  // indices among all logits of the frame
  Buffer<acc_t> logits;
};

// Fills in the rows and places of frame n; returns their number.
template <typename scalar_t, typename index_t, typename acc_t>
int64_t find_candidates(const Forward<scalar_t, index_t>& call, int64_t n, const Candidates<acc_t>& candidates) {
  candidates.rows[0] = static_cast<int32_t>(n);
  candidates.places[0] = 0;
  int64_t many = 1;
  for (int64_t k = 0; k < call.count; ++k) {
    const int64_t m = call.negatives[n * call.count + k];
    if (m >= call.frames || m < -1) {
      call.out_of_range = true;
    } else if (m >= 0 && m != n && !call.equals_target(m, n)) {
      candidates.rows[many] = static_cast<int32_t>(m);
      candidates.places[many] = k + 1;
      ++many;
    }
  }
  return many;
}

template <typename scalar_t, typename index_t, typename acc_t>
void forward_frame(const Forward<scalar_t, index_t>& call, int64_t n, const Candidates<acc_t>& candidates) {
  const int64_t many = find_candidates(call, n, candidates);
  const int32_t* rows = candidates.rows.data();
  acc_t* scores = candidates.logits.data();
  dots(scores, call.context.row(n), call.targets.row(0), rows, many, call.targets.padded());
  const acc_t scale = call.context.scale(n) * call.inverse_temperature;
  acc_t* logits = call.logits + n * (call.count + 1);
  std::fill(logits, logits + call.count + 1, kNone<acc_t>);
  for (int64_t i = 0; i < many; ++i) {
    scores[i] *= scale * call.targets.scale(rows[i]);
    logits[candidates.places[i]] = scores[i];
  }
  std::fill(scores + many, scores + padded_to_lanes(many), kNone<acc_t>);
  const acc_t* finished = scores;
  call.loss[n] = cross_entropy(finished, padded_to_lanes(many));
  call.correct[n] = told_apart(finished[0], finished + 1, many - 1);
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& context,  // (N, D)
    const Tensor& targets,  // (N, D)
    const Tensor& negatives,  // (N, K)
    double temperature) {
  check_inputs(context, targets, negatives);
  const int64_t frames = context.size(0);
  const int64_t width = context.size(1);
  const int64_t count = negatives.size(1);
  const ScalarType dtype = accumulator_dtype(context.scalar_type());
  Tensor loss = torch::stable::new_empty(context, {frames}, dtype);
  Tensor correct = torch::stable::new_empty(context, {frames}, ScalarType::Bool);
  Tensor logits = torch::stable::new_empty(context, {frames, count + 1}, dtype);
  std::atomic<bool> out_of_range = false;

  dispatch_floating(context.scalar_type(), "contrastive_loss", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const scalar_t* target_rows = targets.const_data_ptr<scalar_t>();
    const Table<scalar_t, acc_t> target_table(target_rows, frames, width);
    const Table<scalar_t, acc_t> context_table(context.const_data_ptr<scalar_t>(), frames, width);
    const Buffer<uint32_t> hashes(frames);
    torch::stable::parallel_for(0, frames, 4 * kFramesPerTask, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        target_table.prepare(n);
        context_table.prepare(n);
        hashes[n] = hash_row(target_rows + n * width, acc_t(0), width);
      }
    });
    dispatch_index(negatives, [&](const auto* negative_rows) {
      const Forward<scalar_t, std::remove_cvref_t<decltype(*negative_rows)>> call{
          context_table,
          target_table,
          target_rows,
          hashes.data(),
          negative_rows,
          frames,
          width,
          count,
          static_cast<acc_t>(1 / temperature),
          loss.mutable_data_ptr<acc_t>(),
          correct.mutable_data_ptr<bool>(),
          logits.mutable_data_ptr<acc_t>(),
          out_of_range};
      torch::stable::parallel_for(0, frames, kFramesPerTask, [&](int64_t first, int64_t last) {
        const Candidates<acc_t> candidates(count);
        for (int64_t n = first; n < last; ++n) {
          forward_frame(call, n, candidates);
        }
      });
    });
  });
  STD_TORCH_CHECK(!out_of_range, "negatives: must be -1 to ", frames - 1);
  return {loss, correct, logits};
}

// Pointers to the arguments and results of the backward; index_t is the type of the negatives.
template <typename scalar_t, typename index_t>
struct Backward {
  using acc_t = typename Accumulator<scalar_t>::type;
  const Table<scalar_t, acc_t>& context;
  const Table<scalar_t, acc_t>& targets;
  const index_t* negatives;  // (N, K)
  const acc_t* grad_loss;  // (N,)
  const acc_t* loss;  // (N,)
  const acc_t* logits;  // (N, K + 1)
  int64_t width;
  int64_t count;  // K
  acc_t inverse_temperature;
  scalar_t* grad_context;  // (N, D)
  scalar_t* grad_targets;  // (N, D)
};

// Pairs of a frame and one of its negatives, sorted by the negative and then by the frame.
template <typename acc_t>
struct Pairs {
  Pairs(const CountingSort& sort, int64_t frames)
      : begins(sort.begins()), frames(sort.size()), weights(sort.size()), positive_weights(frames) {}

  const int64_t* begins;  // (N + 1,) where the pairs of each negative begin
  Buffer<int32_t> frames;
  Buffer<acc_t> weights;  // weight of the frame's context row, scaled to length 1, in the gradient of the negative
  Buffer<acc_t> positive_weights;  // (N,) the same for each frame and its own target
};

template <typename acc_t>
struct BackwardScratch {
  BackwardScratch(int64_t count, int64_t padded) : rows(count + 1), weights(count + 1), sum(padded) {}

  Buffer<int32_t> rows;
  Buffer<acc_t> weights;
  Buffer<acc_t> sum;
};

template <typename scalar_t, typename index_t>
void count_pairs(const Backward<scalar_t, index_t>& call, int64_t n, int64_t* counts) {
  using acc_t = typename Accumulator<scalar_t>::type;
  for (int64_t k = 0; k < call.count; ++k) {
    if (call.logits[n * (call.count + 1) + k + 1] > kNone<acc_t>) {
      ++counts[call.negatives[n * call.count + k]];
    }
  }
}

// Writes the gradient of context row n, and the frame's pairs to the places in `next`, which it advances.
template <typename scalar_t, typename index_t, typename acc_t>
void context_gradient(
    const Backward<scalar_t, index_t>& call,
    int64_t n,
    const BackwardScratch<acc_t>& scratch,
    const Pairs<acc_t>& pairs,
    int64_t* next) {
  const int32_t* rows = scratch.rows.data();
  const acc_t* weights = scratch.weights.data();
  const acc_t* sum = scratch.sum.data();
  const int64_t padded = call.targets.padded();
  const acc_t* logits = call.logits + n * (call.count + 1);
  const acc_t scale = call.grad_loss[n] * call.inverse_temperature;
  scratch.rows[0] = static_cast<int32_t>(n);
  scratch.weights[0] = logits[0];
  int64_t many = 1;
  for (int64_t k = 0; k < call.count; ++k) {
    scratch.rows[many] = static_cast<int32_t>(call.negatives[n * call.count + k]);
    scratch.weights[many] = logits[k + 1];
    many += logits[k + 1] > kNone<acc_t>;
  }
  softmax(scratch.weights.data(), weights, logits[0] + call.loss[n], scale, many);
  scratch.weights[0] -= scale;
  const acc_t context_scale = call.context.scale(n);
  pairs.positive_weights[n] = weights[0] * context_scale;
  for (int64_t i = 1; i < many; ++i) {
    const int64_t to = next[rows[i]]++;
    pairs.frames[to] = static_cast<int32_t>(n);
    pairs.weights[to] = weights[i] * context_scale;
  }
  for (int64_t i = 0; i < many; ++i) {
    scratch.weights[i] *= call.targets.scale(rows[i]);
  }
  std::fill_n(scratch.sum.data(), padded, acc_t(0));
  add_weighted_rows(scratch.sum.data(), call.targets.row(0), rows, weights, many, padded);
  store_gradient(call.grad_context + n * call.width, sum, call.context.row(n), context_scale, call.width);
}

// Writes the gradient of target row m. `sum` is scratch memory for one row.
template <typename scalar_t, typename index_t, typename acc_t>
void target_gradient(const Backward<scalar_t, index_t>& call, int64_t m, const Pairs<acc_t>& pairs, acc_t* sum) {
  const int64_t padded = call.context.padded();
  const acc_t* context = call.context.row(m);
  for (int64_t d = 0; d < padded; ++d) {
    sum[d] = pairs.positive_weights[m] * context[d];
  }
  const int64_t begin = pairs.begins[m];
  const int32_t* frames = pairs.frames.data() + begin;
  const acc_t* weights = pairs.weights.data() + begin;
  add_weighted_rows(sum, call.context.row(0), frames, weights, pairs.begins[m + 1] - begin, padded);
  const acc_t* finished = sum;
  store_gradient(call.grad_targets + m * call.width, finished, call.targets.row(m), call.targets.scale(m), call.width);
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& grad_loss,  // (N,)
    const Tensor& context,  // (N, D)
    const Tensor& targets,  // (N, D)
    const Tensor& negatives,  // (N, K)
    const Tensor& loss,  // (N,)
    const Tensor& logits,  // (N, K + 1)
    double temperature) {
  check_inputs(context, targets, negatives);
  const int64_t frames = context.size(0);
  const int64_t width = context.size(1);
  const int64_t count = negatives.size(1);
  const ScalarType dtype = accumulator_dtype(context.scalar_type());
  check_tensor(grad_loss, "grad_loss", 1, dtype);
  check_tensor(loss, "loss", 1, dtype);
  check_tensor(logits, "logits", 2, dtype);
  Tensor grad_context = torch::stable::empty_like(context);
  Tensor grad_targets = torch::stable::empty_like(targets);

  dispatch_floating(context.scalar_type(), "contrastive_loss", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const Table<scalar_t, acc_t> target_table(targets.const_data_ptr<scalar_t>(), frames, width);
    const Table<scalar_t, acc_t> context_table(context.const_data_ptr<scalar_t>(), frames, width);
    dispatch_index(negatives, [&](const auto* negative_rows) {
      const Backward<scalar_t, std::remove_cvref_t<decltype(*negative_rows)>> call{
          context_table,
          target_table,
          negative_rows,
          grad_loss.const_data_ptr<acc_t>(),
          loss.const_data_ptr<acc_t>(),
          logits.const_data_ptr<acc_t>(),
          width,
          count,
          static_cast<acc_t>(1 / temperature),
          grad_context.mutable_data_ptr<scalar_t>(),
          grad_targets.mutable_data_ptr<scalar_t>()};
      const int64_t workers = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(frames, 1));
      CountingSort sort(frames, frames, workers);
      sort.for_each_worker([&](int64_t* counts, int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n) {
          target_table.prepare(n);
          context_table.prepare(n);
          count_pairs(call, n, counts);
        }
      });
      sort.finish_counting();
      const Pairs<acc_t> pairs(sort, frames);
      sort.for_each_worker([&](int64_t* next, int64_t first, int64_t last) {
        const BackwardScratch<acc_t> scratch(count, target_table.padded());
        for (int64_t n = first; n < last; ++n) {
          context_gradient(call, n, scratch, pairs, next);
        }
      });
      torch::stable::parallel_for(0, frames, kFramesPerTask, [&](int64_t first, int64_t last) {
        const Buffer<acc_t> sum(context_table.padded());
        for (int64_t m = first; m < last; ++m) {
          target_gradient(call, m, pairs, sum.data());
        }
      });
    });
  });
  return {grad_context, grad_targets};
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl_native, CPU, m) {
  m.impl("contrastive_loss_fwd", TORCH_BOX(&fastssl::forward));
  m.impl("contrastive_loss_bwd", TORCH_BOX(&fastssl::backward));
}
