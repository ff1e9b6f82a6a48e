// The parts of a strided convolution on the CPU that are not matrix products: the first layer, whose single input
// channel is too narrow for one, and norm and activation after each layer. fastssl/kernels/strided_conv/blocks.py
// computes the matrix products and calls these functions. Derivation: fastssl/kernels/strided_conv/README.md.
//
// Rows are addressed through a grid: sequence b has rows grid[b] to grid[b + 1] - 1. It has at least as many rows as
// frames; the remaining rows count as zeros. A call works on a block of grid rows. A tensor holds either that block or
// all frames, packed.

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../common/isa.h"
#include "../common/tensor_checks.h"
#include "rows.h"

namespace fastssl {
namespace {

using namespace strided_conv;

// Rows of the first layer's gradient that stay in the L1 cache until they are multiplied by their windows.
constexpr int64_t kStripRows = 8;

std::vector<Segment> cut_into_segments(
    const Tensor& grid, const Tensor& cu_seqlens, int64_t first_row, int64_t rows) {
  check_tensor(grid, "grid", 1, ScalarType::Int);
  check_tensor(cu_seqlens, "cu_seqlens", 1, ScalarType::Int);
  const int32_t* begins = grid.const_data_ptr<int32_t>();
  const int32_t* packed_begins = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t sequences = grid.size(0) - 1;
  const int64_t last_row = first_row + rows;
  std::vector<Segment> segments;
  int64_t row = first_row;
  int64_t sequence = std::upper_bound(begins, begins + sequences + 1, row) - begins - 1;
  while (row < last_row) {
    // Rows after the last sequence have no frames.
    const bool nobody = sequence >= sequences;
    const int64_t end = nobody ? last_row : std::min<int64_t>(last_row, begins[sequence + 1]);
    const int64_t stop = std::min(end, row + kSegmentRows);
    if (stop > row) {
      const int64_t first_frame = nobody ? 0 : row - begins[sequence];
      const int64_t length = nobody ? 0 : packed_begins[sequence + 1] - packed_begins[sequence];
      const int64_t frames = std::clamp<int64_t>(length - first_frame, 0, stop - row);
      segments.push_back({sequence, first_frame, frames, stop - row, row - first_row});
    }
    row = stop;
    sequence += !nobody && row == begins[sequence + 1];
  }
  return segments;
}

Norm parse_norm(const std::string& norm) {
  STD_TORCH_CHECK(norm == "none" || norm == "group" || norm == "layer", "norm: must be none, group or layer");
  return norm == "none" ? Norm::kNone : norm == "group" ? Norm::kGroup : Norm::kLayer;
}

template <typename acc_t>
Layer<acc_t> make_layer(
    const Tensor& parameters,  // (3, C)
    const Tensor& statistics,  // (2, B, C)
    const std::string& norm,
    double eps,
    const std::string& activation) {
  STD_TORCH_CHECK(activation == "gelu" || activation == "none", "activation: must be gelu or none");
  const int64_t channels = parameters.size(1);
  const acc_t* rows = parameters.const_data_ptr<acc_t>();
  const Norm kind = parse_norm(norm);
  const bool group = kind == Norm::kGroup;
  if (group) {
    check_tensor(statistics, "statistics", 3, parameters.scalar_type());
  }
  const acc_t* mean = group ? statistics.const_data_ptr<acc_t>() : nullptr;
  const acc_t* rstd = group ? mean + statistics.size(1) * channels : nullptr;
  const bool gelu = activation == "gelu";
  return {channels, kind, gelu, static_cast<acc_t>(eps), rows, rows + channels, rows + 2 * channels, mean, rstd};
}

template <typename scalar_t, typename acc_t>
Source<scalar_t, acc_t> make_source(
    const Tensor& source, const std::optional<Tensor>& begins, const Tensor& taps, int64_t stride) {
  check_tensor(source, "source", 2, source.scalar_type());
  const acc_t* taps_data = taps.const_data_ptr<acc_t>();
  return {source.const_data_ptr<scalar_t>(), data_or_null<int32_t>(begins), taps_data, taps.size(0), stride};
}

template <Isa isa, typename scalar_t, typename acc_t, typename out_t>
FASTSSL_INLINE void forward_segment_body(
    const Source<scalar_t, acc_t>* source,
    const Layer<acc_t>* layer,
    const Segment* segment,
    const Windows<out_t>* out,
    int64_t first_row,  // first row of the result
    int64_t rows,  // rows after the last frame become zero
    acc_t* scratch) {
  // Rounding float to bfloat16 hides the error of the faster GELU.
  constexpr bool kCoarse = std::is_same_v<scalar_t, float> && !std::is_same_v<out_t, float>;
  const int64_t channels = layer->channels;
  acc_t* standard = scratch;
  acc_t* windows = scratch + channels;
  if (source->kernel > 0 && segment->frames > 0) {
    load_windows(*source, *segment, windows);
  }
  for (int64_t frame = 0; frame < rows; ++frame) {
    const int64_t row = first_row + frame;
    const int64_t last = row / out->stride < out->count ? row / out->stride : out->count - 1;
    const int64_t first = row < out->kernel ? 0 : (row - out->kernel) / out->stride + 1;
    if (first > last) {
      continue;  // no window contains this row
    }
    const auto place = [=](int64_t window) {
      return out->data + (window * out->kernel + row - window * out->stride) * channels;
    };
    if (frame < segment->frames) {
      standardise_frame(*source, *layer, *segment, frame, windows, standard);
      activate<kCoarse>(*layer, standard, place(last));
    } else {
      std::fill(place(last), place(last) + channels, out_t(0));
    }
    for (int64_t window = first; window < last; ++window) {
      std::copy(place(last), place(last) + channels, place(window));
    }
  }
}
FASTSSL_ISA_VARIANTS(forward_segment)

template <typename scalar_t, typename acc_t, typename out_t>
void write_segments(
    const std::vector<Segment>& segments,
    const int32_t* packed_begins,
    const Source<scalar_t, acc_t>& source,
    const Layer<acc_t>& layer,
    const Windows<out_t>& out,
    bool out_is_packed) {
  torch::stable::parallel_for(0, segments.size(), 1, [&](int64_t first, int64_t last) {
    std::vector<acc_t> scratch(layer.channels + source.window_numbers());
    for (int64_t index = first; index < last; ++index) {
      const Segment& segment = segments[index];
      if (!out_is_packed) {
        forward_segment(&source, &layer, &segment, &out, segment.block_row, segment.rows, scratch.data());
      } else if (segment.frames > 0) {
        const int64_t row = packed_begins[segment.sequence] + segment.first_frame;
        forward_segment(&source, &layer, &segment, &out, row, segment.frames, scratch.data());
      }
    }
  });
}

// activation(norm(source + bias)) for the rows of a block, written as the windows that the next layer multiplies.
void epilogue_forward(
    const Tensor& source,  // rows (R or N, C), or the waveform (N_in, 1)
    const std::optional<Tensor>& source_begins,  // (B + 1,) if the source is packed; none if it is the block
    const Tensor& taps,  // (K, C) of the first layer, else (0, C)
    const Tensor& parameters,  // (3, C): bias, norm_weight, norm_bias
    const Tensor& statistics,  // (2, B, C): mean and rstd, group norm only
    const Tensor& cu_seqlens,  // (B + 1,)
    const Tensor& grid,  // (B + 1,)
    int64_t first_row,
    int64_t rows,
    Tensor out,  // (windows, kernel * C), or packed (N, C); bfloat16 is possible if the source is float32
    bool out_is_packed,
    int64_t out_kernel,
    int64_t out_stride,
    int64_t stride,
    const std::string& norm,
    double eps,
    const std::string& activation) {
  const bool narrows = source.scalar_type() == ScalarType::Float && out.scalar_type() == ScalarType::BFloat16;
  check_tensor(out, "out", 2, narrows ? ScalarType::BFloat16 : source.scalar_type());
  const std::vector<Segment> segments = cut_into_segments(grid, cu_seqlens, first_row, rows);
  const int32_t* packed_begins = cu_seqlens.const_data_ptr<int32_t>();
  dispatch_floating(source.scalar_type(), "strided_conv", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const auto layer = make_layer<acc_t>(parameters, statistics, norm, eps, activation);
    const auto rows_in = make_source<scalar_t, acc_t>(source, source_begins, taps, stride);
    const auto write = [&](auto* data) {
      const Windows<std::remove_pointer_t<decltype(data)>> windows{data, out.size(0), out_kernel, out_stride};
      write_segments(segments, packed_begins, rows_in, layer, windows, out_is_packed);
    };
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (narrows) {
        return write(out.mutable_data_ptr<torch::headeronly::BFloat16>());
      }
    }
    write(out.mutable_data_ptr<scalar_t>());
  });
}

// Runs the backward of one segment. Writes the gradient of the convolution to `grad_conv`, and sums over the segment to
// `sums` (K + 3, C). Either may be nullptr. The sums are K rows of gradient times window, then the gradients of the
// bias and of the norm's weight and bias. For group norm, whose backward needs these sums first, the gradient is that
// of the activation's input.
template <Isa isa, typename scalar_t, typename acc_t>
FASTSSL_INLINE void backward_segment_body(
    const Source<scalar_t, acc_t>* source,
    const Layer<acc_t>* layer,
    const Gradients<scalar_t>* grads,
    const Segment* segment,
    int64_t first_grad_row,
    acc_t* scratch,
    scalar_t* grad_conv,
    acc_t* sums) {
  const int64_t channels = layer->channels;
  const int64_t kernel = source->kernel;
  acc_t* standard = scratch;
  acc_t* strip = scratch + channels;
  acc_t* windows = strip + kStripRows * channels;
  if (sums != nullptr) {
    std::fill(sums, sums + (kernel + 3) * channels, acc_t(0));
  }
  if (kernel > 0 && segment->frames > 0) {
    load_windows(*source, *segment, windows);
  }
  acc_t* tail_sums = sums + kernel * channels;
  for (int64_t begin = 0; begin < segment->frames; begin += kStripRows) {
    const int64_t rows = segment->frames - begin < kStripRows ? segment->frames - begin : kStripRows;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t frame = begin + r;
      acc_t* grad = strip + r * channels;
      const acc_t rstd = standardise_frame(*source, *layer, *segment, frame, windows, standard);
      activate_backward(*layer, standard, gradient_row(*grads, first_grad_row + frame), grad);
      if (layer->norm == Norm::kLayer) {
        layer_norm_backward(*layer, standard, rstd, grad, tail_sums);
      }
      if (sums != nullptr) {
        for (int64_t c = 0; c < channels; ++c) {
          tail_sums[c] += grad[c];
        }
      }
      if (grad_conv != nullptr) {
        convert(grad_conv + frame * channels, grad, channels);
      }
    }
    if (kernel > 0) {
      add_window_gradients(strip, windows + begin * source->stride, rows, kernel, source->stride, channels, sums);
    }
  }
}
FASTSSL_ISA_VARIANTS(backward_segment)

template <Isa isa, typename acc_t>
FASTSSL_INLINE void add_to_body(double* total, const acc_t* part, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    total[i] += static_cast<double>(part[i]);
  }
}
FASTSSL_ISA_VARIANTS(add_to)

// Adds the sums of each segment to those of its sequence, or to one total. Segments are added in order, so the bits do
// not depend on the number of threads.
template <typename acc_t>
void add_segment_sums(
    double* total,  // (B or 1, width)
    const std::vector<acc_t>& partial,  // (segments, width)
    const std::vector<Segment>& segments,
    bool per_sequence) {
  constexpr int64_t kColumns = 1024;
  if (segments.empty()) {
    return;
  }
  const int64_t width = partial.size() / segments.size();
  torch::stable::parallel_for(0, divide_up(width, kColumns), 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kColumns;
    const int64_t count = std::min(last * kColumns, width) - begin;
    for (size_t index = 0; index < segments.size(); ++index) {
      if (segments[index].frames > 0) {
        const int64_t row = per_sequence ? segments[index].sequence : 0;
        add_to(total + row * width + begin, partial.data() + index * width + begin, count);
      }
    }
  });
}

// Computes the gradient of a layer's convolution for the rows of a block, and the sums over rows that give the
// gradients of its parameters. Handles group norm only if `source` is a waveform; `epilogue_group_backward` does the
// rest.
void epilogue_backward(
    const Tensor& grad_first,  // (U, first_phases * C), or packed (N, C)
    const Tensor& grad_second,  // (U, second_phases * C)
    int64_t phases,
    bool grad_is_packed,
    const Tensor& source,  // packed rows (N, C), or the waveform (N_in, 1)
    const Tensor& source_begins,  // (B + 1,)
    const Tensor& taps,  // (K, C) of the first layer, else (0, C)
    const Tensor& parameters,  // (3, C)
    const Tensor& statistics,  // (2, B, C)
    const Tensor& cu_seqlens,  // (B + 1,)
    const Tensor& grid,  // (B + 1,)
    int64_t first_row,
    int64_t rows,
    std::optional<Tensor> grad_conv,  // (rows, C), or packed; none if the source is a waveform
    bool grad_conv_is_packed,
    std::optional<Tensor> sums,  // (B for group norm, else 1, K + 3, C) float64 to add to; none if not needed
    int64_t stride,
    const std::string& norm,
    double eps,
    const std::string& activation) {
  const std::vector<Segment> segments = cut_into_segments(grid, cu_seqlens, first_row, rows);
  const int32_t* packed_begins = cu_seqlens.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(grad_conv || sums, "grad_conv and sums: nothing to compute");
  STD_TORCH_CHECK(sums || (taps.size(0) == 0 && norm == "none"), "sums: needed for the first layer and for layer norm");
  STD_TORCH_CHECK(norm != "group" || !grad_conv, "norm: use strided_conv_group_bwd for group norm over stored rows");
  check_tensor(grad_first, "grad_first", 2, source.scalar_type());
  check_tensor(grad_second, "grad_second", 2, source.scalar_type());
  dispatch_floating(source.scalar_type(), "strided_conv", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const auto layer = make_layer<acc_t>(parameters, statistics, norm, eps, activation);
    const auto rows_in = make_source<scalar_t, acc_t>(source, source_begins, taps, stride);
    const int64_t channels = layer.channels;
    const std::vector<scalar_t> zeros(channels, scalar_t(0));
    const auto grads = make_gradients(grad_first, grad_second, phases, zeros);
    scalar_t* grad_conv_data = grad_conv ? grad_conv->template mutable_data_ptr<scalar_t>() : nullptr;
    const int64_t width = (rows_in.kernel + 3) * channels;
    std::vector<acc_t> partial(sums ? segments.size() * width : 0);
    torch::stable::parallel_for(0, segments.size(), 1, [&](int64_t first, int64_t last) {
      std::vector<acc_t> scratch((1 + kStripRows) * channels + rows_in.window_numbers());
      for (int64_t index = first; index < last; ++index) {
        const Segment& segment = segments[index];
        const int64_t packed_row =
            segment.frames > 0 ? packed_begins[segment.sequence] + segment.first_frame : 0;
        scalar_t* out = grad_conv_data == nullptr
            ? nullptr
            : grad_conv_data + (grad_conv_is_packed ? packed_row : segment.block_row) * channels;
        backward_segment(
            &rows_in,
            &layer,
            &grads,
            &segment,
            grad_is_packed ? packed_row : segment.block_row,
            scratch.data(),
            out,
            sums ? partial.data() + index * width : nullptr);
        if (out != nullptr && !grad_conv_is_packed) {
          std::fill(out + segment.frames * channels, out + segment.rows * channels, scalar_t(0));
        }
      }
    });
    if (sums) {
      const bool per_sequence = layer.norm == Norm::kGroup;
      add_segment_sums(sums->template mutable_data_ptr<double>(), partial, segments, per_sequence);
    }
  });
}

// Side of the squares that are transposed at a time.
constexpr int64_t kSquare = 16;

// out = x.T, which products over frames need. PyTorch would transpose on a single thread.
void transpose(const Tensor& x, Tensor out) {
  check_tensor(x, "x", 2, x.scalar_type());
  check_tensor(out, "out", 2, x.scalar_type());
  const int64_t rows = x.size(0);
  const int64_t columns = x.size(1);
  dispatch_floating(x.scalar_type(), "strided_conv", [&](auto tag) {
    using scalar_t = decltype(tag);
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, divide_up(columns, kSquare), 1, [&](int64_t first, int64_t last) {
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t column = strip * kSquare;
        const int64_t column_end = std::min(column + kSquare, columns);
        for (int64_t row = 0; row < rows; row += kSquare) {
          const int64_t row_end = std::min(row + kSquare, rows);
          for (int64_t c = column; c < column_end; ++c) {
            for (int64_t r = row; r < row_end; ++r) {
              to[c * rows + r] = from[r * columns + c];
            }
          }
        }
      }
    });
  });
}

// Runs the backward of activation and group norm for one tile: one pass for the sums, one for the result.
template <Isa isa, typename scalar_t, typename acc_t>
FASTSSL_INLINE void group_norm_backward_body(
    const Layer<acc_t>* layer,
    const Gradients<scalar_t>* grads,
    const GroupTile* tile,
    const scalar_t* conv_out,
    int64_t first_grad_row,
    scalar_t* grad_conv,
    double* sums) {
  const int64_t sequence = tile->sequence;
  const int64_t first_channel = tile->first_channel;
  const int64_t channels = tile->channels;
  const int64_t frames = tile->frames;
  const acc_t* bias = layer->bias + first_channel;
  const acc_t* weight = layer->norm_weight + first_channel;
  const acc_t* shift = layer->norm_bias + first_channel;
  const acc_t* mean = layer->mean + sequence * layer->channels + first_channel;
  const acc_t* rstd = layer->rstd + sequence * layer->channels + first_channel;
  double sum[kGroupChannels] = {};
  double slope[kGroupChannels] = {};
  acc_t standard[kGroupChannels];
  acc_t grad[kGroupChannels];
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t t = 0; t < frames; ++t) {
      const scalar_t* z = conv_out + t * layer->channels;
      const scalar_t* grad_out = gradient_row(*grads, first_grad_row + t) + first_channel;
      for (int64_t c = 0; c < channels; ++c) {
        standard[c] = (static_cast<acc_t>(z[c]) + bias[c] - mean[c]) * rstd[c];
        const acc_t outer = layer->gelu ? gelu_derivative(standard[c] * weight[c] + shift[c]) : acc_t(1);
        grad[c] = static_cast<acc_t>(grad_out[c]) * outer;
      }
      if (pass == 0) {
        for (int64_t c = 0; c < channels; ++c) {
          sum[c] += static_cast<double>(grad[c]);
          slope[c] += static_cast<double>(grad[c]) * static_cast<double>(standard[c]);
        }
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          const acc_t centred =
              grad[c] - static_cast<acc_t>(sum[c] / frames) - standard[c] * static_cast<acc_t>(slope[c] / frames);
          grad_conv[t * layer->channels + c] = static_cast<scalar_t>(centred * rstd[c] * weight[c]);
        }
      }
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    sums[layer->channels + c] = slope[c];
    sums[2 * layer->channels + c] = sum[c];
  }
}
FASTSSL_ISA_VARIANTS(group_norm_backward)

// Like `epilogue_backward`, for group norm over stored rows; the block is the whole grid.
void epilogue_group_backward(
    const Tensor& grad_first,  // (U, first_phases * C), or packed (N, C)
    const Tensor& grad_second,  // (U, second_phases * C)
    int64_t phases,
    bool grad_is_packed,
    const Tensor& conv_out,  // (N, C)
    const Tensor& parameters,  // (3, C)
    const Tensor& statistics,  // (2, B, C)
    const Tensor& cu_seqlens,  // (B + 1,)
    const Tensor& grid,  // (B + 1,)
    Tensor grad_conv,  // (R, C), initially zero: rows without a frame are not written
    Tensor sums,  // (B, 3, C) float64; the first row stays as it is, because the bias has no gradient
    double eps,
    const std::string& activation) {
  check_tensor(grad_first, "grad_first", 2, conv_out.scalar_type());
  check_tensor(grad_second, "grad_second", 2, conv_out.scalar_type());
  check_tensor(grid, "grid", 1, ScalarType::Int);
  check_tensor(cu_seqlens, "cu_seqlens", 1, ScalarType::Int);
  const int32_t* begins = cu_seqlens.const_data_ptr<int32_t>();
  const int32_t* grid_begins = grid.const_data_ptr<int32_t>();
  dispatch_floating(conv_out.scalar_type(), "strided_conv", [&](auto tag) {
    using scalar_t = decltype(tag);
    using acc_t = typename Accumulator<scalar_t>::type;
    const auto layer = make_layer<acc_t>(parameters, statistics, "group", eps, activation);
    const int64_t channels = layer.channels;
    const std::vector<scalar_t> zeros(channels, scalar_t(0));
    const auto grads = make_gradients(grad_first, grad_second, phases, zeros);
    const scalar_t* conv_data = conv_out.const_data_ptr<scalar_t>();
    scalar_t* grad_conv_data = grad_conv.mutable_data_ptr<scalar_t>();
    double* sums_data = sums.mutable_data_ptr<double>();
    for_each_group_tile(cu_seqlens, channels, [&](const GroupTile& tile) {
      const int64_t sequence = tile.sequence;
      const int64_t c = tile.first_channel;
      group_norm_backward(
          &layer,
          &grads,
          &tile,
          conv_data + begins[sequence] * channels + c,
          static_cast<int64_t>(grad_is_packed ? begins[sequence] : grid_begins[sequence]),
          grad_conv_data + grid_begins[sequence] * channels + c,
          sums_data + sequence * 3 * channels + c);
    });
  });
}

}  // namespace
}  // namespace fastssl

STABLE_TORCH_LIBRARY_IMPL(fastssl_native, CPU, m) {
  m.impl("strided_conv_epilogue_fwd", TORCH_BOX(&fastssl::epilogue_forward));
  m.impl("strided_conv_epilogue_bwd", TORCH_BOX(&fastssl::epilogue_backward));
  m.impl("strided_conv_group_bwd", TORCH_BOX(&fastssl::epilogue_group_backward));
  m.impl("strided_conv_transpose", TORCH_BOX(&fastssl::transpose));
}
