// The contrastive loss on the CPU. Derivation and conventions: fastssl/kernels/contrastive_loss/README.md.
//
// Everything is dots with, and weighted sums of, rows of a table, which an utterance keeps in the second-level cache; the
// table is the tensor itself, or a copy in the accumulation type with rows padded to whole vectors. Their lengths go into
// the results and the weights. A frame, and in the backward a target, has one writer and one order of additions, whatever
// the batch and the number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/isa.h"
#include "../common/tensor_checks.h"
#include "../common/vector_math.h"

namespace fastssl {
namespace {

constexpr int64_t kLanes = 16;  // partial sums, because the compiler may not reorder a floating-point sum by itself
constexpr int64_t kFramesPerTask = 16;
constexpr double kEps = 1e-8;  // of the norms, as in torch.nn.functional.cosine_similarity

constexpr std::align_val_t kCacheLine{64};

// Memory for whole vectors, not initialised.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kCacheLine))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    ::operator delete(data_, kCacheLine);
  }
  T* data() const {
    return data_;
  }
  T& operator[](int64_t i) const {
    return data_[i];
  }

 private:
  T* data_;
};

FASTSSL_INLINE int64_t padded_to_lanes(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

// Sums of kLanes numbers side by side. The loop must stay one: unrolled, GCC vectorises the loop around it, with shuffles.
#define FASTSSL_FOR_LANES(lane) _Pragma("GCC unroll 1") for (int64_t lane = 0; lane < kLanes; ++lane)

template <int64_t width = kLanes, typename acc_t>
FASTSSL_INLINE acc_t sum_of_lanes(const acc_t* lanes) {
  if constexpr (width == 1) {
    return lanes[0];
  } else {
    acc_t half[width / 2];
#pragma GCC unroll 1
    for (int64_t i = 0; i < width / 2; ++i) {
      half[i] = lanes[i] + lanes[i + width / 2];
    }
    return sum_of_lanes<width / 2>(half);
  }
}

FASTSSL_INLINE uint32_t bits_of(float x) {
  return __builtin_bit_cast(uint32_t, x);
}

FASTSSL_INLINE uint32_t bits_of(double x) {
  const uint64_t bits = __builtin_bit_cast(uint64_t, x);
  return static_cast<uint32_t>(bits ^ (bits >> 32));
}

template <typename acc_t>
FASTSSL_INLINE acc_t dot_of(const acc_t* a, const acc_t* b, int64_t padded) {
  acc_t sum[kLanes] = {};
  for (int64_t d = 0; d < padded; d += kLanes) {
    FASTSSL_FOR_LANES(lane) sum[lane] += a[d + lane] * b[d + lane];
  }
  return sum_of_lanes(sum);
}

// Writes x, padded with zeros.
template <Isa isa, typename scalar_t, typename acc_t>
FASTSSL_INLINE void widen_body(acc_t* wide, const scalar_t* x, int64_t width) {
  for (int64_t d = 0; d < width; ++d) {
    wide[d] = static_cast<acc_t>(x[d]);
  }
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
    out[i] = sum_of_lanes(sum_0);
    out[i + 1] = sum_of_lanes(sum_1);
    out[i + 2] = sum_of_lanes(sum_2);
    out[i + 3] = sum_of_lanes(sum_3);
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

// log sum exp(logits) - logits[0]; `padded` logits, -inf where there is none.
template <Isa isa, typename acc_t>
FASTSSL_INLINE acc_t cross_entropy_body(const acc_t* logits, int64_t padded) {
  acc_t lanes[kLanes];
  std::fill(lanes, lanes + kLanes, logits[0]);
  for (int64_t k = 0; k < padded; k += kLanes) {
    FASTSSL_FOR_LANES(lane) lanes[lane] = logits[k + lane] > lanes[lane] ? logits[k + lane] : lanes[lane];
  }
  acc_t highest = lanes[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    highest = lanes[lane] > highest ? lanes[lane] : highest;
  }
  std::fill(lanes, lanes + kLanes, acc_t(0));
  for (int64_t k = 0; k < padded; k += kLanes) {
    FASTSSL_FOR_LANES(lane) lanes[lane] += vector_exp(logits[k + lane] - highest);
  }
  return std::log(sum_of_lanes(lanes)) + (highest - logits[0]);
}
FASTSSL_ISA_VARIANTS(cross_entropy)

// No negative scores higher, and one scores lower.
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

// Takes the gradient of x * scale, with scale = 1 / max(|x|, eps), to that of x.
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

// Calls `function` with the rows of targets as int32_t or int64_t, whichever the tensor holds.
template <typename Function>
void dispatch_index(const Tensor& negatives, const Function& function) {
  if (negatives.scalar_type() == ScalarType::Int) {
    return function(negatives.const_data_ptr<int32_t>());
  }
  STD_TORCH_CHECK(negatives.scalar_type() == ScalarType::Long, "negatives: must be int32 or int64");
  return function(negatives.const_data_ptr<int64_t>());
}

// The rows of a matrix in the accumulation type, each a whole number of vectors, and what brings them to length 1. Every
// row is to be prepared before it is read.
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
  bool is_copied_;  // the matrix itself does not do
  Buffer<acc_t> copy_;  // (N, padded)
  Buffer<acc_t> scales_;  // (N,)
};

void check_inputs(const Tensor& context, const Tensor& targets, const Tensor& negatives) {
  check_tensor(context, "context", 2, context.scalar_type());
  check_tensor(targets, "targets", 2, context.scalar_type());
  check_tensor(negatives, "negatives", 2, negatives.scalar_type());
  STD_TORCH_CHECK(
      targets.size(0) == context.size(0) && targets.size(1) == context.size(1) && negatives.size(0) == context.size(0),
      "context, targets and negatives: shapes do not fit");
  STD_TORCH_CHECK(context.size(0) <= std::numeric_limits<int32_t>::max(), "context: too many frames");
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
  const ScalarType dtype = context.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor loss = torch::stable::new_empty(context, {frames}, dtype);
  Tensor correct = torch::stable::new_empty(context, {frames}, ScalarType::Bool);
  Tensor logits = torch::stable::new_empty(context, {frames, count + 1}, dtype);
  bool* correct_data = correct.mutable_data_ptr<bool>();
  std::atomic<bool> out_of_range = false;

  dispatch_floating(context.scalar_type(), "contrastive_loss", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const scalar_t* context_data = context.const_data_ptr<scalar_t>();
    const scalar_t* target_data = targets.const_data_ptr<scalar_t>();
    acc_t* loss_data = loss.mutable_data_ptr<acc_t>();
    acc_t* logits_data = logits.mutable_data_ptr<acc_t>();
    const acc_t inverse_temperature = static_cast<acc_t>(1 / temperature);
    const Table<scalar_t, acc_t> target_table(target_data, frames, width);
    const Table<scalar_t, acc_t> context_table(context_data, frames, width);
    const Buffer<uint32_t> hashes(frames);
    torch::stable::parallel_for(0, frames, 4 * kFramesPerTask, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        target_table.prepare(n);
        context_table.prepare(n);
        hashes[n] = hash_row(target_data + n * width, acc_t(0), width);
      }
    });
    dispatch_index(negatives, [&](const auto* negative_data) {
      torch::stable::parallel_for(0, frames, kFramesPerTask, [&](int64_t first, int64_t last) {
        // The logits that are left, the positive in front, and where they came from.
        const Buffer<int32_t> rows(count + 1);
        const Buffer<int64_t> places(count + 1);
        const Buffer<acc_t> left(padded_to_lanes(count + 1));
        constexpr acc_t kNone = -std::numeric_limits<acc_t>::infinity();
        for (int64_t n = first; n < last; ++n) {
          rows[0] = static_cast<int32_t>(n);
          places[0] = 0;
          int64_t many = 1;
          for (int64_t k = 0; k < count; ++k) {
            const int64_t m = negative_data[n * count + k];
            if (m >= frames || m < -1) {
              out_of_range = true;
            } else if (m >= 0 && m != n &&
                       (hashes[m] != hashes[n] || !equal_rows(target_data + m * width, target_data + n * width, width))) {
              rows[many] = static_cast<int32_t>(m);
              places[many] = k + 1;
              ++many;
            }
          }
          dots(left.data(), context_table.row(n), target_table.row(0), static_cast<const int32_t*>(rows.data()), many,
               target_table.padded());
          const acc_t scale = context_table.scale(n) * inverse_temperature;
          acc_t* row = logits_data + n * (count + 1);
          std::fill(row, row + count + 1, kNone);
          for (int64_t i = 0; i < many; ++i) {
            left[i] *= scale * target_table.scale(rows[i]);
            row[places[i]] = left[i];
          }
          std::fill(left.data() + many, left.data() + padded_to_lanes(many), kNone);
          const acc_t* scores = left.data();
          loss_data[n] = cross_entropy(scores, padded_to_lanes(many));
          correct_data[n] = told_apart(scores[0], scores + 1, many - 1);
        }
      });
    });
  });
  STD_TORCH_CHECK(!out_of_range, "negatives: must be -1 to ", frames - 1);
  return {loss, correct, logits};
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
  const ScalarType dtype = context.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_tensor(grad_loss, "grad_loss", 1, dtype);
  check_tensor(loss, "loss", 1, dtype);
  check_tensor(logits, "logits", 2, dtype);
  Tensor grad_context = torch::stable::empty_like(context);
  Tensor grad_targets = torch::stable::empty_like(targets);
  // The pairs of a frame and a negative are sorted by the negative, in the order of the frames: each of a few workers
  // counts its share of the frames, and knows from all counts where in the result its pairs belong.
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), frames));
  const auto first_frame_of = [&](int64_t worker) { return frames * worker / workers; };

  dispatch_floating(context.scalar_type(), "contrastive_loss", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const acc_t* grad_data = grad_loss.const_data_ptr<acc_t>();
    const acc_t* loss_data = loss.const_data_ptr<acc_t>();
    const acc_t* logits_data = logits.const_data_ptr<acc_t>();
    scalar_t* grad_context_data = grad_context.mutable_data_ptr<scalar_t>();
    scalar_t* grad_targets_data = grad_targets.mutable_data_ptr<scalar_t>();
    const Table<scalar_t, acc_t> target_table(targets.const_data_ptr<scalar_t>(), frames, width);
    const Table<scalar_t, acc_t> context_table(context.const_data_ptr<scalar_t>(), frames, width);
    const int64_t padded = target_table.padded();
    constexpr acc_t kNone = -std::numeric_limits<acc_t>::infinity();

    dispatch_index(negatives, [&](const auto* negative_data) {
      std::vector<int64_t> next(workers * frames);  // (workers, N): counts, then where the next pair goes
      torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
        for (int64_t worker = first; worker < last; ++worker) {
          int64_t* counts = next.data() + worker * frames;
          for (int64_t n = first_frame_of(worker); n < first_frame_of(worker + 1); ++n) {
            target_table.prepare(n);
            context_table.prepare(n);
            for (int64_t k = 0; k < count; ++k) {
              if (logits_data[n * (count + 1) + k + 1] > kNone) {
                ++counts[negative_data[n * count + k]];
              }
            }
          }
        }
      });
      const Buffer<int64_t> begins(frames + 1);
      int64_t pairs = 0;
      for (int64_t m = 0; m < frames; ++m) {
        begins[m] = pairs;
        for (int64_t worker = 0; worker < workers; ++worker) {
          const int64_t found = next[worker * frames + m];
          next[worker * frames + m] = pairs;
          pairs += found;
        }
      }
      begins[frames] = pairs;

      const Buffer<int32_t> pair_frames(pairs);
      const Buffer<acc_t> pair_weights(pairs);
      const Buffer<acc_t> positive_weights(frames);
      torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
        const Buffer<int32_t> rows(count + 1);
        const Buffer<acc_t> weights(count + 1);
        const Buffer<acc_t> sum(padded);
        for (int64_t worker = first; worker < last; ++worker) {
          int64_t* place = next.data() + worker * frames;
          for (int64_t n = first_frame_of(worker); n < first_frame_of(worker + 1); ++n) {
            const acc_t* row = logits_data + n * (count + 1);
            const acc_t scale = grad_data[n] * static_cast<acc_t>(1 / temperature);
            rows[0] = static_cast<int32_t>(n);
            weights[0] = row[0];
            int64_t many = 1;
            for (int64_t k = 0; k < count; ++k) {
              rows[many] = static_cast<int32_t>(negative_data[n * count + k]);
              weights[many] = row[k + 1];
              many += row[k + 1] > kNone;
            }
            softmax(weights.data(), static_cast<const acc_t*>(weights.data()), row[0] + loss_data[n], scale, many);
            weights[0] -= scale;
            const acc_t context_scale = context_table.scale(n);
            positive_weights[n] = weights[0] * context_scale;
            for (int64_t i = 1; i < many; ++i) {
              const int64_t to = place[rows[i]]++;
              pair_frames[to] = static_cast<int32_t>(n);
              pair_weights[to] = weights[i] * context_scale;
            }
            for (int64_t i = 0; i < many; ++i) {
              weights[i] *= target_table.scale(rows[i]);
            }
            std::fill(sum.data(), sum.data() + padded, acc_t(0));
            add_weighted_rows(sum.data(), target_table.row(0), static_cast<const int32_t*>(rows.data()),
                              static_cast<const acc_t*>(weights.data()), many, padded);
            store_gradient(grad_context_data + n * width, static_cast<const acc_t*>(sum.data()), context_table.row(n),
                           context_scale, width);
          }
        }
      });
      torch::stable::parallel_for(0, frames, kFramesPerTask, [&](int64_t first, int64_t last) {
        const Buffer<acc_t> sum(padded);
        for (int64_t m = first; m < last; ++m) {
          for (int64_t d = 0; d < padded; ++d) {
            sum[d] = positive_weights[m] * context_table.row(m)[d];
          }
          add_weighted_rows(sum.data(), context_table.row(0), static_cast<const int32_t*>(pair_frames.data() + begins[m]),
                            static_cast<const acc_t*>(pair_weights.data() + begins[m]), begins[m + 1] - begins[m],
                            padded);
          store_gradient(grad_targets_data + m * width, static_cast<const acc_t*>(sum.data()), target_table.row(m),
                         target_table.scale(m), width);
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
