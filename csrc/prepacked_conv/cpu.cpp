// Convolutions and linear layers with prepacked weights, for inference on the CPU. Derivation:
// fastssl/kernels/prepacked_conv/README.md.

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/block_gemm.h"
#include "../common/tensor_checks.h"
#include "multiply.h"
#include "rows.h"

namespace fastssl {
namespace {

using namespace prepacked;

constexpr int64_t kBlockRows = 256;  // most rows that a thread multiplies by a panel before the next one
constexpr int64_t kChunkSteps = 384;  // most steps of a panel, which stay in the L2 cache, to multiply at a time

// One of the weights that multiply the same rows.
struct Weight {
  const uint32_t* panels;  // (groups, panels of a group, steps of a window, 64)
  const float* scale;  // (groups, panels of a group, 64), bytes only
  const float* sums;  // (kernel, groups, panels of a group, 64): sums over the bytes of a tap
  const float* bias;  // (groups, panels of a group, 64)
  int64_t panels_per_group;
  int64_t channels_per_group;
  int64_t channels;
  void* out;  // (N_out, channels)
  bool out_is_bfloat16;
};

struct Call {
  const void* x;  // (N, groups * channels)
  bool x_is_bfloat16;
  int64_t channels;  // input channels of a group
  int64_t groups;
  int64_t steps;  // units of an input row, of one group
  int64_t kernel;
  int64_t stride;
  int64_t padding;  // rows of zeros before and after a sequence
  const int32_t* begins_in;
  const int32_t* begins_out;
  int64_t sequences;
  bool in_place;  // the rows of x are units already
  const float* norm_weight;  // nullptr if there is no layer norm
  const float* norm_bias;
  float eps;
  bool gelu;
  std::vector<Weight> weights;
};

// Rows of the output to compute, of one group, and which part of the panels of each weight.
struct Block {
  int64_t group;
  int64_t first_row;
  int64_t rows;
  int64_t part;
  int64_t parts;
};

// Memory that a thread needs for one block.
struct Scratch {
  std::vector<uint32_t> units;  // input rows as units
  std::vector<ByteRow> bytes;  // how to read them, bytes only
  std::vector<const uint32_t*> begins;  // where the window of each output row begins
  std::vector<int64_t> first_bytes;  // number of the first input row of each window
  std::vector<float> sums;  // (rows, 64)
  std::vector<float> wide;  // an input row, or output rows before their norm
};

template <Isa isa, Format format, typename scalar_t>
FASTSSL_INLINE void gather(const Call* call, const Block* block, Scratch* scratch) {
  const int64_t pitch = call->groups * call->channels;
  const auto* x = static_cast<const scalar_t*>(call->x) + block->group * call->channels;
  const int64_t last_row = block->first_row + block->rows;
  int64_t sequence =
      std::upper_bound(call->begins_out, call->begins_out + call->sequences + 1, block->first_row) -
      call->begins_out - 1;
  int64_t used = 0;
  for (int64_t row = block->first_row; row < last_row;) {
    while (call->begins_out[sequence + 1] <= row) {
      ++sequence;
    }
    const int64_t stop = std::min<int64_t>(last_row, call->begins_out[sequence + 1]);
    // The first row of the window; with padding, it may be before the first row of the sequence.
    const int64_t first = (row - call->begins_out[sequence]) * call->stride - call->padding;
    const int64_t count = (stop - row - 1) * call->stride + call->kernel;
    const int64_t length = call->begins_in[sequence + 1] - call->begins_in[sequence];
    const scalar_t* source = x + call->begins_in[sequence] * pitch;
    for (int64_t i = 0; i < stop - row; ++i) {
      const int64_t slot = row - block->first_row + i;
      scratch->first_bytes[slot] = used + i * call->stride;
      scratch->begins[slot] = call->in_place
          ? reinterpret_cast<const uint32_t*>(source + (first + i * call->stride) * pitch)
          : scratch->units.data() + (used + i * call->stride) * call->steps;
    }
    for (int64_t i = 0; i < count && !call->in_place; ++i) {
      uint32_t* out = scratch->units.data() + (used + i) * call->steps;
      const int64_t frame = first + i;
      if (frame < 0 || frame >= length) {
        std::fill(out, out + call->steps, 0u);
        scratch->bytes[used + i] = {0.0f, 0.0f};
      } else {
        scratch->bytes[used + i] =
            convert_row<isa, format>(source + frame * pitch, call->channels, call->steps, scratch->wide.data(), out);
      }
    }
    used += count;
    row = stop;
  }
}

// Part of the depth of one panel, and the sums of a block that it contributes to.
struct Chunk {
  int64_t rows;
  int64_t first_step;
  int64_t steps;
  int64_t tap;
  const uint32_t* panel;
  const float* column_sums;  // (64,), bytes only
  float* sums;  // (rows, 64)
  bool first;  // overwrite the sums instead of adding to them
};

template <Isa isa, Format format, int kRows, int kVectors>
FASTSSL_INLINE void run_tile(const Scratch* scratch, const Chunk& chunk, int64_t row, int64_t column) {
  using Floats = typename Simd<isa, float>::Vector;
  using SumVector = typename Multiplier<isa, format>::SumVector;
  constexpr int kLanes = Simd<isa, float>::kLanes;
  SumVector tile[kRows][kVectors];
  const uint32_t* panel = chunk.panel + chunk.first_step * kPanelColumns + column;
  multiply_tile<isa, format, kRows>(scratch->begins.data() + row, chunk.first_step, chunk.steps, panel, tile);
  for (int i = 0; i < kRows; ++i) {
    float* out = chunk.sums + (row + i) * kPanelColumns + column;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      Floats before{};
      if (!chunk.first) {
        __builtin_memcpy(&before, out + j * kLanes, sizeof(Floats));
      }
      if constexpr (format == Format::kInt8Dot) {
        const ByteRow bytes = scratch->bytes[scratch->first_bytes[row + i] + chunk.tap];
        Floats offsets;
        __builtin_memcpy(&offsets, chunk.column_sums + column + j * kLanes, sizeof(Floats));
        before += bytes.scale * (__builtin_convertvector(tile[i][j], Floats) - bytes.zero * offsets);
      } else {
        before += tile[i][j];
      }
      __builtin_memcpy(out + j * kLanes, &before, sizeof(Floats));
    }
  }
}

template <Isa isa, Format format, int kVectors>
FASTSSL_INLINE void run_rows(const Scratch* scratch, const Chunk& chunk, int64_t column) {
  int64_t row = 0;
  for (; row + kTallestTile <= chunk.rows; row += kTallestTile) {
    run_tile<isa, format, kTallestTile, kVectors>(scratch, chunk, row, column);
  }
  for (; row + 4 <= chunk.rows; row += 4) {
    run_tile<isa, format, 4, kVectors>(scratch, chunk, row, column);
  }
  for (; row + 2 <= chunk.rows; row += 2) {
    run_tile<isa, format, 2, kVectors>(scratch, chunk, row, column);
  }
  for (; row < chunk.rows; ++row) {
    run_tile<isa, format, 1, kVectors>(scratch, chunk, row, column);
  }
}

template <Isa isa, Format format>
FASTSSL_INLINE void run_columns(const Scratch* scratch, const Chunk& chunk, int64_t columns) {
  constexpr int kLanes = Simd<isa, float>::kLanes;
  constexpr int kMost = isa == Isa::kAvx512 ? 4 : 2;
  for (int64_t column = 0; column < columns;) {
    const int64_t vectors = std::min<int64_t>(kMost, divide_up(columns - column, kLanes));
    if constexpr (kMost == 4) {
      if (vectors == 4) {
        run_rows<isa, format, 4>(scratch, chunk, column);
      } else if (vectors == 3) {
        run_rows<isa, format, 3>(scratch, chunk, column);
      }
    }
    if (vectors == 2) {
      run_rows<isa, format, 2>(scratch, chunk, column);
    } else if (vectors == 1) {
      run_rows<isa, format, 1>(scratch, chunk, column);
    }
    column += vectors * kLanes;
  }
}

template <Isa isa>
FASTSSL_INLINE void store_row(const Weight& weight, int64_t row, int64_t channel, const float* x, int64_t count) {
  const int64_t place = row * weight.channels + channel;
  if (weight.out_is_bfloat16) {
    convert(static_cast<BFloat16*>(weight.out) + place, x, count);
  } else {
    std::memcpy(static_cast<float*>(weight.out) + place, x, count * sizeof(float));
  }
}

template <Isa isa, Format format>
FASTSSL_INLINE void run_block_body(FormatTag<format>, const Call* call, const Block* block, Scratch* scratch) {
  constexpr bool kCoarse = format != Format::kFloat;
  if (call->x_is_bfloat16) {
    gather<isa, format, BFloat16>(call, block, scratch);
  } else {
    gather<isa, format, float>(call, block, scratch);
  }
  const int64_t window = call->kernel * call->steps;
  // Bytes have one scale per row, so their sums end with the row. Others are summed over any part of the window.
  const int64_t chunk = format == Format::kInt8Dot ? call->steps : kChunkSteps;
  float* sums = scratch->sums.data();
  for (const Weight& weight : call->weights) {
    const int64_t panels = weight.panels_per_group;
    const int64_t last_panel = (block->part + 1) * panels / block->parts;
    for (int64_t panel = block->part * panels / block->parts; panel < last_panel; ++panel) {
      const int64_t number = block->group * panels + panel;
      const int64_t all_panels = call->groups * panels;
      const int64_t channel = panel * kPanelColumns;
      const int64_t columns = std::min(kPanelColumns, weight.channels_per_group - channel);
      const uint32_t* units = weight.panels + number * window * kPanelColumns;
      int64_t tap = 0;
      for (int64_t step = 0; step < window; step += chunk, ++tap) {
        const float* column_sums =
            format == Format::kInt8Dot ? weight.sums + (tap * all_panels + number) * kPanelColumns : nullptr;
        const Chunk part{
            block->rows, step, std::min(chunk, window - step), tap, units, column_sums, sums, step == 0};
        run_columns<isa, format>(scratch, part, columns);
      }
      const float* bias = weight.bias + number * kPanelColumns;
      const float* scale = format == Format::kInt8Dot ? weight.scale + number * kPanelColumns : nullptr;
      for (int64_t row = 0; row < block->rows; ++row) {
        float* __restrict x = sums + row * kPanelColumns;
        for (int64_t c = 0; c < kPanelColumns; ++c) {
          x[c] = (format == Format::kInt8Dot ? x[c] * scale[c] : x[c]) + bias[c];
        }
        if (call->norm_weight != nullptr) {
          std::memcpy(scratch->wide.data() + row * weight.channels + channel, x, columns * sizeof(float));
          continue;
        }
        if (call->gelu) {
          gelu_row<isa, kCoarse>(x, kPanelColumns);
        }
        const int64_t place = block->group * weight.channels_per_group + channel;
        store_row<isa>(weight, block->first_row + row, place, x, columns);
      }
    }
    for (int64_t row = 0; row < block->rows && call->norm_weight != nullptr; ++row) {
      float* x = scratch->wide.data() + row * weight.channels;
      normalize_row<isa>(x, weight.channels, call->norm_weight, call->norm_bias, call->eps);
      if (call->gelu) {
        gelu_row<isa, kCoarse>(x, weight.channels);
      }
      store_row<isa>(weight, block->first_row + row, 0, x, weight.channels);
    }
  }
}
FASTSSL_ISA_VARIANTS(run_block)

// Whether the processor multiplies bytes: products of the format "int8" need that.
bool multiplies_bytes() {
#if FASTSSL_HAS_ISA_VARIANTS
  return current_isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

void run(Format format, const Call& call, const Block& block, Scratch& scratch) {
  switch (format) {
    case Format::kFloat:
      return run_block(FormatTag<Format::kFloat>{}, &call, &block, &scratch);
    case Format::kBFloat16:
      return run_block(FormatTag<Format::kBFloat16>{}, &call, &block, &scratch);
#if FASTSSL_HAS_ISA_VARIANTS
    case Format::kBFloat16Dot:
      return run_block_avx512(FormatTag<Format::kBFloat16Dot>{}, &call, &block, &scratch);
    case Format::kInt8Dot:
      return run_block_avx512(FormatTag<Format::kInt8Dot>{}, &call, &block, &scratch);
#endif
    default:
      STD_TORCH_CHECK(false, "panels: this processor has no instructions for products of bytes");
  }
}

Format format_of(ScalarType dtype) {
  if (dtype == ScalarType::Float) {
    return Format::kFloat;
  }
  if (dtype == ScalarType::BFloat16) {
    return multiplies_bfloat16() ? Format::kBFloat16Dot : Format::kBFloat16;
  }
  STD_TORCH_CHECK(dtype == ScalarType::Char, "panels: must be float32, bfloat16 or int8");
  STD_TORCH_CHECK(multiplies_bytes(), "panels: this processor has no instructions for products of bytes");
  return Format::kInt8Dot;
}

void run_blocks(Format format, const Call& call, int64_t rows) {
  const int64_t groups = call.groups;
  int64_t most_channels = call.channels;
  for (const Weight& weight : call.weights) {
    most_channels = std::max(most_channels, weight.channels);
  }
  // As many blocks for each thread as for the others, of about as many rows. If there are fewer blocks than threads,
  // threads share the panels of a block, so that each reads only its part of the weights. A norm needs whole rows.
  const int64_t threads = torch::stable::get_num_threads();
  const bool whole_rows = call.norm_weight != nullptr;
  int64_t wanted = divide_up(rows, kBlockRows);
  if (groups == 1 && (whole_rows || wanted >= threads)) {
    wanted = std::min(rows, round_up(wanted, threads));
  }
  const int64_t parts = whole_rows ? 1 : std::max<int64_t>(1, divide_up(threads, groups * wanted));
  const int64_t block_rows = divide_up(rows, wanted);
  const int64_t blocks = divide_up(rows, block_rows);
  torch::stable::parallel_for(0, groups * blocks * parts, 1, [&](int64_t first, int64_t last) {
    // A sequence of n rows of a block has (n - 1) * stride + kernel rows of input.
    const int64_t input_rows =
        call.in_place ? 0 : block_rows * call.stride + std::min(block_rows, call.sequences) * call.kernel;
    Scratch scratch;
    scratch.units.resize(input_rows * call.steps);
    scratch.bytes.resize(input_rows);
    scratch.begins.resize(block_rows);
    scratch.first_bytes.resize(block_rows);
    scratch.sums.resize(block_rows * kPanelColumns);
    scratch.wide.resize((whole_rows ? block_rows : 1) * most_channels);
    for (int64_t index = first; index < last; ++index) {
      const int64_t number = index / parts;
      const int64_t first_row = number % blocks * block_rows;
      const Block block{number / blocks, first_row, std::min(block_rows, rows - first_row), index % parts, parts};
      run(format, call, block, scratch);
    }
  });
}

Weight describe_weight(
    const Tensor& panels,
    const Tensor* scales,
    const Tensor* sums,
    const Tensor& biases,
    int64_t groups,
    int64_t channels,
    Tensor& out) {
  check_tensor(biases, "biases", 2, ScalarType::Float);
  Weight weight{};
  weight.panels = static_cast<const uint32_t*>(panels.const_data_ptr());
  if (scales != nullptr) {
    check_tensor(*scales, "scales", 2, ScalarType::Float);
    check_tensor(*sums, "sums", 3, ScalarType::Float);
    weight.scale = scales->const_data_ptr<float>();
    weight.sums = sums->const_data_ptr<float>();
  }
  weight.bias = biases.const_data_ptr<float>();
  weight.panels_per_group = panels.size(0) / groups;
  weight.channels = channels;
  weight.channels_per_group = channels / groups;
  weight.out = out.mutable_data_ptr();
  weight.out_is_bfloat16 = out.scalar_type() == ScalarType::BFloat16;
  return weight;
}

std::vector<Tensor> conv(
    const Tensor& x,  // (N, groups * C_in), float32 or bfloat16
    const std::optional<Tensor>& cu_in,  // (B + 1,); none for a single sequence
    const std::optional<Tensor>& cu_out,  // (B + 1,); none for a single sequence
    int64_t total,
    int64_t kernel,
    int64_t stride,
    int64_t padding,
    int64_t groups,
    std::vector<Tensor> panels,  // (groups * P, kernel * steps, 64, values of a unit)
    std::vector<Tensor> scales,  // (groups * P, 64), empty if not bytes
    std::vector<Tensor> sums,  // (kernel, groups * P, 64), empty if not bytes
    std::vector<Tensor> biases,  // (groups * P, 64)
    std::vector<int64_t> channels,
    std::optional<Tensor> norm_weight,  // (C_out,)
    std::optional<Tensor> norm_bias,  // (C_out,)
    double eps,
    bool gelu,
    ScalarType dtype) {  // of the results (total, C_out), float32 or bfloat16
  check_tensor(x, "x", 2, x.scalar_type());
  check_tensor(cu_in, "cu_in", 1, ScalarType::Int);
  check_tensor(cu_out, "cu_out", 1, ScalarType::Int);
  check_tensor(norm_weight, "norm_weight", 1, ScalarType::Float);
  check_tensor(norm_bias, "norm_bias", 1, ScalarType::Float);
  const Format format = format_of(panels[0].scalar_type());
  Call call{};
  call.x = x.const_data_ptr();
  call.x_is_bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(call.x_is_bfloat16 || x.scalar_type() == ScalarType::Float, "x: must be float32 or bfloat16");
  call.groups = groups;
  call.channels = x.size(1) / groups;
  call.steps = divide_up(call.channels, values_per_unit(format));
  call.kernel = kernel;
  call.stride = stride;
  call.padding = padding;
  const int32_t all_in[2] = {0, static_cast<int32_t>(x.size(0))};
  const int32_t all_out[2] = {0, static_cast<int32_t>(total)};
  call.begins_in = cu_in ? cu_in->const_data_ptr<int32_t>() : all_in;
  call.begins_out = cu_out ? cu_out->const_data_ptr<int32_t>() : all_out;
  call.sequences = cu_in ? cu_in->size(0) - 1 : 1;
  STD_TORCH_CHECK(
      cu_in || total == 0 || (total - 1) * stride + kernel <= x.size(0), "total: more rows than the input has windows");
  call.in_place = x.scalar_type() == panels[0].scalar_type() && groups == 1 && padding == 0 && call.channels % values_per_unit(format) == 0;
  call.norm_weight = data_or_null<float>(norm_weight);
  call.norm_bias = data_or_null<float>(norm_bias);
  call.eps = static_cast<float>(eps);
  call.gelu = gelu;
  std::vector<Tensor> outs;
  for (size_t i = 0; i < panels.size(); ++i) {
    check_tensor(panels[i], "panels", 4, panels[0].scalar_type());
    STD_TORCH_CHECK(panels[i].size(1) == kernel * call.steps, "panels: do not fit the input's channels");
    outs.push_back(torch::stable::new_empty(x, {total, channels[i]}, dtype));
    const bool bytes = format == Format::kInt8Dot;
    call.weights.push_back(describe_weight(
        panels[i], bytes ? &scales[i] : nullptr, bytes ? &sums[i] : nullptr, biases[i], groups, channels[i], outs[i]));
  }
  if (total == 0) {
    return outs;
  }
  run_blocks(format, call, total);
  return outs;
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl_native, CPU, m) {
  m.impl("prepacked_conv_fwd", TORCH_BOX(&fastssl::conv));
}

STABLE_TORCH_LIBRARY_IMPL(fastssl_native, CompositeExplicitAutograd, m) {
  m.impl("prepacked_conv_multiplies_bytes", TORCH_BOX(&fastssl::multiplies_bytes));
}
