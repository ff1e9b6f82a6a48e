// Straight-through Gumbel softmax on the CPU. Formulas and figures: fastssl/kernels/gumbel_quantize/README.md.
//
// A row is the V logits of one frame and group. Rows are copied to a buffer that stays in the first-level cache and
// padded to whole vectors with minus infinity, whose exp is 0. The forward does not need the temperature; the backward
// draws the noise again. No two threads write the same element, and the order of additions does not depend on the
// number of threads.

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/convert.h"
#include "../common/counting_sort.h"
#include "../common/integers.h"
#include "../common/isa.h"
#include "../common/row_chunks.h"
#include "../common/simd.h"
#include "../common/split_mix.h"
#include "../common/tensor_checks.h"
#include "../common/vector_math.h"

namespace fastssl {
namespace {

constexpr int kLanes = 16;  // partial results, as in lanes.h
constexpr int64_t kPadding = 32;  // rows in buffers are padded to a multiple of this
constexpr int64_t kFramesPerTask = 16;

// The elements of a tensor whose type is known only at run time.
struct Elements {
  const void* data;
  ScalarType dtype;
};

template <typename acc_t>
FASTSSL_INLINE void load(acc_t* to, Elements from, int64_t offset, int64_t count) {
  switch (from.dtype) {
    case ScalarType::Float:
      return convert(to, static_cast<const float*>(from.data) + offset, count);
    case ScalarType::Double:
      return convert(to, static_cast<const double*>(from.data) + offset, count);
    case ScalarType::BFloat16:
      return convert(to, static_cast<const torch::headeronly::BFloat16*>(from.data) + offset, count);
    default:
      return convert(to, static_cast<const torch::headeronly::Half*>(from.data) + offset, count);
  }
}

template <typename acc_t>
FASTSSL_INLINE void store(void* to, ScalarType dtype, int64_t offset, const acc_t* from, int64_t count) {
  switch (dtype) {
    case ScalarType::Float:
      return convert(static_cast<float*>(to) + offset, from, count);
    case ScalarType::Double:
      return convert(static_cast<double*>(to) + offset, from, count);
    case ScalarType::BFloat16:
      return convert(static_cast<torch::headeronly::BFloat16*>(to) + offset, from, count);
    default:
      return convert(static_cast<torch::headeronly::Half*>(to) + offset, from, count);
  }
}

// The index of the largest element; the first one if several are equal.
template <Isa isa, typename T>
FASTSSL_INLINE int64_t first_maximum(const T* x, int64_t count) {
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  using Vector = typename Simd<isa, T>::Vector;
  using Indices = typename Simd<isa, Index>::Vector;
  constexpr int kVector = Simd<isa, T>::kLanes;
  constexpr int kCount = kLanes / kVector;
  Index index[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    index[lane] = lane;
  }
  Vector best[kCount];
  Indices current[kCount];
  Indices found[kCount];
  std::memcpy(best, x, sizeof(best));
  std::memcpy(current, index, sizeof(current));
  std::memcpy(found, index, sizeof(found));
  for (int64_t i = kLanes; i < count; i += kLanes) {
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) {
      Vector value;
      std::memcpy(&value, x + i + j * kVector, sizeof(value));
      current[j] += static_cast<Index>(kLanes);
      found[j] = value > best[j] ? current[j] : found[j];
      best[j] = value > best[j] ? value : best[j];
    }
  }
  T lanes[kLanes];
  std::memcpy(lanes, best, sizeof(best));
  std::memcpy(index, found, sizeof(found));
  int result = 0;
  for (int lane = 1; lane < kLanes; ++lane) {
    if (lanes[lane] > lanes[result] || (lanes[lane] == lanes[result] && index[lane] < index[result])) {
      result = lane;
    }
  }
  return index[result];
}

// The index of the first NaN, which torch.argmax counts as the largest element, or -1. Not inlined, because it is rarely
// called and would slow down its caller.
template <typename T>
[[gnu::noinline]] int64_t first_nan(const T* x, int64_t count) {
  const T* found = std::find_if(x, x + count, [](T value) { return value != value; });
  return found == x + count ? -1 : found - x;
}

template <typename Vector, typename T>
FASTSSL_INLINE void multiply_by(Vector& product, const T* factor) {
  Vector value;
  std::memcpy(&value, factor, sizeof(value));
  product *= value;
}

// The sum over x, or over x times the factors, for whole vectors, in the same order as `sum_in_order` of lanes.h.
// Written with vector types, because in double the plain loop makes the op 5 % slower.
template <Isa isa, typename T, typename... Factors>
FASTSSL_INLINE T sum_of(int64_t count, const T* x, const Factors*... factors) {
  using Vector = typename Simd<isa, T>::Vector;
  constexpr int kVector = Simd<isa, T>::kLanes;
  Vector sums[kLanes / kVector] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
#pragma GCC unroll 8
    for (int j = 0; j < kLanes / kVector; ++j) {
      Vector product;
      std::memcpy(&product, x + i + j * kVector, sizeof(product));
      (multiply_by(product, factors + i + j * kVector), ...);
      sums[j] += product;
    }
  }
  T lanes[kLanes];
  std::memcpy(lanes, sums, sizeof(sums));
  return std::accumulate(lanes, lanes + kLanes, T(0));
}

// x = exp((x - highest) * factor).
template <typename T>
FASTSSL_INLINE void exponentiate(T* x, T highest, T factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    x[i] = vector_exp((x[i] - highest) * factor);
  }
}

// The logits and their noise, as forward and backward read them.
template <typename acc_t>
struct Logits {
  Elements values;  // (M, G, V)
  const acc_t* noise;  // (M, G, V) or null
  const int64_t* seeds;  // (M,) or null
  int64_t groups;
  int64_t codes;
  int64_t padded_codes;
};

// Loads one row of logits into `plain`, and with noise added into `noisy`.
template <typename acc_t>
FASTSSL_INLINE void load_row(const Logits<acc_t>& logits, int64_t frame, int64_t group, acc_t* plain, acc_t* noisy) {
  const int64_t offset = (frame * logits.groups + group) * logits.codes;
  load(plain, logits.values, offset, logits.codes);
  for (int64_t v = logits.codes; v < logits.padded_codes; ++v) {
    plain[v] = -std::numeric_limits<acc_t>::infinity();
  }
  if (logits.seeds != nullptr) {
    const uint64_t first_code = static_cast<uint64_t>(group * logits.codes);
    const uint64_t seed = static_cast<uint64_t>(logits.seeds[frame]) + first_code * kGolden;
    for (int64_t v = 0; v < logits.padded_codes; ++v) {
      noisy[v] = plain[v] + split_mix_gumbel<acc_t>(seed, static_cast<uint64_t>(v));
    }
  } else {
    std::copy(plain, plain + logits.padded_codes, noisy);
    if (logits.noise != nullptr) {
      for (int64_t v = 0; v < logits.codes; ++v) {
        noisy[v] += logits.noise[offset + v];
      }
    }
  }
}

template <typename acc_t>
struct Forward {
  Logits<acc_t> logits;
  const char* codevectors;  // (G, V, E)
  char* values;  // (M, G, E)
  int64_t vector_bytes;
  int64_t* codes;  // (M, G)
  acc_t* probability_sums;  // (tasks, G, padded V)
  int64_t frames;
};

template <Isa isa, typename acc_t>
FASTSSL_INLINE void forward_tasks_body(const Forward<acc_t>* forward, int64_t first_task, int64_t last_task) {
  const Logits<acc_t> logits = forward->logits;
  const int64_t width = logits.padded_codes;
  std::vector<acc_t> buffer(2 * width);
  acc_t* plain = buffer.data();
  acc_t* noisy = plain + width;
  for (int64_t task = first_task; task < last_task; ++task) {
    acc_t* sums = forward->probability_sums + task * logits.groups * width;
    std::fill(sums, sums + logits.groups * width, acc_t(0));
    const int64_t last_frame = std::min(forward->frames, (task + 1) * kFramesPerTask);
    for (int64_t frame = task * kFramesPerTask; frame < last_frame; ++frame) {
      for (int64_t group = 0; group < logits.groups; ++group) {
        load_row(logits, frame, group, plain, noisy);
        const int64_t row = frame * logits.groups + group;
        const auto choose = [&](int64_t code) {
          forward->codes[row] = code;
          std::memcpy(
              forward->values + row * forward->vector_bytes,
              forward->codevectors + (group * logits.codes + code) * forward->vector_bytes,
              forward->vector_bytes);
        };
        choose(first_maximum<isa>(noisy, width));

        exponentiate(plain, largest<isa, kLanes>(plain, width), acc_t(1), width);
        const acc_t scale = acc_t(1) / sum_of<isa>(width, plain);
        for (int64_t v = 0; v < width; ++v) {
          sums[group * width + v] += plain[v] * scale;
        }
        if (scale != scale || logits.noise != nullptr) {
          if (const int64_t code = first_nan(noisy, logits.codes); code >= 0) {
            choose(code);
          }
        }
      }
    }
  }
}
FASTSSL_ISA_VARIANTS(forward_tasks)

// The largest tile of a matrix product whose sums fit in the registers of an instruction set.
template <Isa isa, typename acc_t>
struct Tile {
  using Vector = typename Simd<isa, acc_t>::Vector;
  static constexpr int kRows = isa == Isa::kAvx512 ? 12 : 6;
  static constexpr int kVector = Simd<isa, acc_t>::kLanes;
  static constexpr int kColumns = 2 * kVector;
};

template <typename acc_t>
struct Backward {
  Logits<acc_t> logits;
  Elements grad_values;  // (M, G, E)
  const acc_t* codevectors;  // (G, padded V / columns, E, columns)
  const acc_t* grad_sums;  // (G, padded V)
  void* grad_logits;  // (M, G, V), in the type of the logits
  int64_t width;  // E
  acc_t temperature;
};

// out = rows @ panels, for all panels of a group. The `rows` (kRows, E) are stored transposed, as (E, kRows).
template <Isa isa, typename acc_t>
FASTSSL_INLINE void multiply(const acc_t* rows, const acc_t* panels, int64_t width, int64_t columns, acc_t* out) {
  using T = Tile<isa, acc_t>;
  using Vector = typename T::Vector;
  for (int64_t first = 0; first < columns; first += T::kColumns) {
    const acc_t* panel = panels + first * width;
    Vector sums[T::kRows][2] = {};
    for (int64_t k = 0; k < width; ++k) {
      Vector left, right;
      std::memcpy(&left, panel + k * T::kColumns, sizeof(Vector));
      std::memcpy(&right, panel + k * T::kColumns + T::kVector, sizeof(Vector));
#pragma GCC unroll 12
      for (int row = 0; row < T::kRows; ++row) {
        sums[row][0] += rows[k * T::kRows + row] * left;
        sums[row][1] += rows[k * T::kRows + row] * right;
      }
    }
#pragma GCC unroll 12
    for (int row = 0; row < T::kRows; ++row) {
      std::memcpy(out + row * columns + first, &sums[row], 2 * sizeof(Vector));
    }
  }
}

// Replaces `plain` by one row of grad_logits, the sum of the gradients through both softmaxes. `grad_soft` is the
// gradient of the softmax with noise.
template <Isa isa, typename acc_t>
FASTSSL_INLINE void jacobian_row(
    acc_t* plain, acc_t* noisy, const acc_t* grad_soft, const acc_t* grad_sums, acc_t temperature, int64_t width) {
  const acc_t coldness = acc_t(1) / temperature;
  exponentiate(plain, largest<isa, kLanes>(plain, width), acc_t(1), width);
  exponentiate(noisy, largest<isa, kLanes>(noisy, width), coldness, width);
  const acc_t scale = acc_t(1) / sum_of<isa>(width, plain);
  const acc_t scale_noisy = acc_t(1) / sum_of<isa>(width, noisy);
  const acc_t mean = sum_of<isa>(width, plain, grad_sums) * scale;
  const acc_t mean_noisy = sum_of<isa>(width, noisy, grad_soft) * scale_noisy;
  for (int64_t i = 0; i < width; ++i) {
    plain[i] = plain[i] * scale * (grad_sums[i] - mean) +
        noisy[i] * (scale_noisy * coldness) * (grad_soft[i] - mean_noisy);
  }
}

template <Isa isa, typename acc_t>
FASTSSL_INLINE void backward_frames_body(const Backward<acc_t>* backward, int64_t first_frame, int64_t last_frame) {
  constexpr int64_t kRows = Tile<isa, acc_t>::kRows;
  const Logits<acc_t> logits = backward->logits;
  const int64_t columns = logits.padded_codes;
  const int64_t width = backward->width;
  std::vector<acc_t> buffer((kRows + 2) * columns + (kRows + 1) * width);
  acc_t* grad_soft = buffer.data();
  acc_t* plain = grad_soft + kRows * columns;
  acc_t* noisy = plain + columns;
  acc_t* rows = noisy + columns;
  acc_t* row = rows + kRows * width;
  for (int64_t block = first_frame; block < last_frame; block += kRows) {
    const int64_t frames = std::min(kRows, last_frame - block);
    for (int64_t group = 0; group < logits.groups; ++group) {
      std::fill(rows, rows + kRows * width, acc_t(0));
      for (int64_t i = 0; i < frames; ++i) {
        load(row, backward->grad_values, ((block + i) * logits.groups + group) * width, width);
        for (int64_t k = 0; k < width; ++k) {
          rows[k * kRows + i] = row[k];
        }
      }
      multiply<isa>(rows, backward->codevectors + group * columns * width, width, columns, grad_soft);
      for (int64_t i = 0; i < frames; ++i) {
        load_row(logits, block + i, group, plain, noisy);
        jacobian_row<isa>(
            plain,
            noisy,
            grad_soft + i * columns,
            backward->grad_sums + group * columns,
            backward->temperature,
            columns);
        const int64_t offset = ((block + i) * logits.groups + group) * logits.codes;
        store(backward->grad_logits, logits.values.dtype, offset, plain, logits.codes);
      }
    }
  }
}
FASTSSL_ISA_VARIANTS(backward_frames)

// Returns the codevectors as `multiply` reads them: transposed, in panels as wide as a tile, with zeros after the last
// code.
template <Isa isa, typename acc_t>
FASTSSL_INLINE void pack_panels_body(
    acc_t* panels, Elements codevectors, int64_t groups, int64_t codes, int64_t width) {
  constexpr int64_t kColumns = Tile<isa, acc_t>::kColumns;
  const int64_t columns = round_up(codes, kPadding);
  std::vector<acc_t> row(width);
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t v = 0; v < codes; ++v) {
      load(row.data(), codevectors, (group * codes + v) * width, width);
      acc_t* panel = panels + (group * columns + v / kColumns * kColumns) * width + v % kColumns;
      for (int64_t k = 0; k < width; ++k) {
        panel[k * kColumns] = row[k];
      }
    }
  }
}
FASTSSL_ISA_VARIANTS(pack_panels)

// The gradient of each codevector: the sum over the rows that chose it, in order of their frames.
template <Isa isa, typename acc_t>
FASTSSL_INLINE void sum_rows_body(
    void* grad_codevectors,
    Elements grad_values,
    const int64_t* rows,
    const int64_t* begins,
    int64_t width,
    int64_t first_code,
    int64_t last_code,
    acc_t) {
  std::vector<acc_t> buffer(2 * width);
  acc_t* sum = buffer.data();
  acc_t* row = sum + width;
  for (int64_t code = first_code; code < last_code; ++code) {
    std::fill(sum, sum + width, acc_t(0));
    for (int64_t i = begins[code]; i < begins[code + 1]; ++i) {
      load(row, grad_values, rows[i] * width, width);
      for (int64_t k = 0; k < width; ++k) {
        sum[k] += row[k];
      }
    }
    store(grad_codevectors, grad_values.dtype, code * width, sum, width);
  }
}
FASTSSL_ISA_VARIANTS(sum_rows)

Elements elements_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.scalar_type()};
}

ScalarType accumulator_of(const Tensor& logits, const Tensor& codevectors) {
  const bool wide = logits.scalar_type() == ScalarType::Double || codevectors.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

void check(
    const Tensor& logits,
    const Tensor& codevectors,
    const std::optional<Tensor>& noise,
    const std::optional<Tensor>& seeds) {
  check_tensor(logits, "logits", 3, logits.scalar_type());
  check_tensor(codevectors, "codevectors", 3, codevectors.scalar_type());
  for (const Tensor* tensor : {&logits, &codevectors}) {
    dispatch_floating(tensor->scalar_type(), "gumbel_quantize", [](auto) {});
  }
  check_tensor(noise, "noise", 3, accumulator_of(logits, codevectors));
  check_tensor(seeds, "seeds", 1, ScalarType::Long);
}

template <typename acc_t>
Logits<acc_t> logits_of(
    const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& seeds) {
  return {
      elements_of(logits),
      data_or_null<acc_t>(noise),
      data_or_null<int64_t>(seeds),
      logits.size(1),
      logits.size(2),
      round_up(logits.size(2), kPadding)};
}

template <typename Function>
void dispatch_accumulator(ScalarType dtype, const Function& function) {
  if (dtype == ScalarType::Double) {
    return function(double{});
  }
  return function(float{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& logits,  // (M, G, V)
    const Tensor& codevectors,  // (G, V, E)
    std::optional<Tensor> noise,  // (M, G, V)
    std::optional<Tensor> seeds) {  // (M,)
  check(logits, codevectors, noise, seeds);
  const int64_t frames = logits.size(0);
  const int64_t groups = logits.size(1);
  const int64_t code_count = logits.size(2);
  const int64_t width = codevectors.size(2);
  const ScalarType accumulator = accumulator_of(logits, codevectors);
  Tensor values = torch::stable::new_empty(codevectors, {frames, groups * width});
  Tensor codes = torch::stable::new_empty(logits, {frames, groups}, ScalarType::Long);
  Tensor probability_sums = torch::stable::new_empty(logits, {groups, code_count}, accumulator);
  Tensor counts = torch::stable::new_zeros(logits, {groups, code_count}, ScalarType::Long);
  dispatch_accumulator(accumulator, [&](auto tag) {
    using acc_t = decltype(tag);
    const int64_t tasks = divide_up(frames, kFramesPerTask);
    const int64_t padded_codes = round_up(code_count, kPadding);
    std::vector<acc_t> partial_sums(tasks * groups * padded_codes);
    const Forward<acc_t> arguments{
        logits_of<acc_t>(logits, noise, seeds),
        static_cast<const char*>(codevectors.const_data_ptr()),
        static_cast<char*>(values.mutable_data_ptr()),
        width * static_cast<int64_t>(codevectors.element_size()),
        codes.mutable_data_ptr<int64_t>(),
        partial_sums.data(),
        frames};
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t first_task, int64_t last_task) {
      forward_tasks(&arguments, first_task, last_task);
    });
    acc_t* sums = probability_sums.mutable_data_ptr<acc_t>();
    for (int64_t group = 0; group < groups; ++group) {
      const acc_t* partial = partial_sums.data() + group * padded_codes;
      add_chunks(sums + group * code_count, partial, tasks, groups * padded_codes, code_count);
    }
  });
  const int64_t* code = codes.const_data_ptr<int64_t>();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < frames * groups; ++row) {
    ++count[row % groups * code_count + code[row]];
  }
  return {values, codes, probability_sums, counts};
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& grad_values,  // (M, G * E)
    const Tensor& grad_probability_sums,  // (G, V)
    const Tensor& logits,  // (M, G, V)
    const Tensor& codevectors,  // (G, V, E)
    std::optional<Tensor> noise,  // (M, G, V)
    std::optional<Tensor> seeds,  // (M,)
    const Tensor& codes,  // (M, G)
    double temperature) {
  check(logits, codevectors, noise, seeds);
  const ScalarType accumulator = accumulator_of(logits, codevectors);
  check_tensor(grad_values, "grad_values", 2, codevectors.scalar_type());
  check_tensor(grad_probability_sums, "grad_probability_sums", 2, accumulator);
  check_tensor(codes, "codes", 2, ScalarType::Long);
  const int64_t frames = logits.size(0);
  const int64_t groups = logits.size(1);
  const int64_t code_count = logits.size(2);
  const int64_t width = codevectors.size(2);
  const int64_t padded_codes = round_up(code_count, kPadding);
  Tensor grad_logits = torch::stable::empty_like(logits);
  Tensor grad_codevectors = torch::stable::empty_like(codevectors);

  // Sort the rows of grad_values by the code they chose. The rows are few, so one worker is enough.
  const int64_t* code = codes.const_data_ptr<int64_t>();
  CountingSort sort(frames * groups, groups * code_count, 1);
  sort.for_each_worker([&](int64_t* counts, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      ++counts[row % groups * code_count + code[row]];
    }
  });
  sort.finish_counting();
  const Buffer<int64_t> rows(sort.size());
  sort.for_each_worker([&](int64_t* next, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      rows[next[row % groups * code_count + code[row]]++] = row;
    }
  });

  dispatch_accumulator(accumulator, [&](auto tag) {
    using acc_t = decltype(tag);
    const acc_t* grad_sums = grad_probability_sums.const_data_ptr<acc_t>();
    std::vector<acc_t> panels(groups * padded_codes * width);
    std::vector<acc_t> padded_grad_sums(groups * padded_codes);
    pack_panels(panels.data(), elements_of(codevectors), groups, code_count, width);
    for (int64_t group = 0; group < groups; ++group) {
      std::copy_n(grad_sums + group * code_count, code_count, padded_grad_sums.data() + group * padded_codes);
    }
    const Backward<acc_t> arguments{
        logits_of<acc_t>(logits, noise, seeds),
        elements_of(grad_values),
        panels.data(),
        padded_grad_sums.data(),
        grad_logits.mutable_data_ptr(),
        width,
        static_cast<acc_t>(temperature)};
    torch::stable::parallel_for(0, frames, kFramesPerTask, [&](int64_t first_frame, int64_t last_frame) {
      backward_frames(&arguments, first_frame, last_frame);
    });
    void* grad_codevectors_data = grad_codevectors.mutable_data_ptr();
    torch::stable::parallel_for(0, groups * code_count, 32, [&](int64_t first_code, int64_t last_code) {
      sum_rows(
          grad_codevectors_data,
          elements_of(grad_values),
          static_cast<const int64_t*>(rows.data()),
          sort.begins(),
          width,
          first_code,
          last_code,
          acc_t(0));
    });
  });
  return {grad_logits, grad_codevectors};
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl_native, CPU, m) {
  m.impl("gumbel_quantize_fwd", TORCH_BOX(&fastssl::forward));
  m.impl("gumbel_quantize_bwd", TORCH_BOX(&fastssl::backward));
}
