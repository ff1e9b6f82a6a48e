"""Adapters of fine-tuned encoders: small blocks inside the layers (MMS), and strided convolutions after the layers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.nn import functional
from fastssl.nn.activation import sigmoid
from fastssl.nn.linear import PackedLinear
from fastssl.packing import Layout, Packed, kept_by_plan


class AttentionAdapter(nn.Module):
    """Adapter of a transformer layer, whose output is added to the layer's (MMS, arXiv 2305.13516).

    A layer norm and two linear layers with ReLU between them, with the parameter names of Transformers. Only the
    adapters differ between the languages of a model.

    Args:
        width: D, the number of input and output channels.
        inner_width: Number of channels between the two linear layers.
    """

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear_1 = PackedLinear(width, inner_width)
        self.linear_2 = PackedLinear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:  # (N, D) -> (N, D)
        """Compute what is added to the frames (N, D) of a layer."""
        return in_layer(self, x)


def in_layer(adapter: Any, x: Tensor) -> Tensor:
    """Compute what an adapter adds to the frames (N, D) of a layer; the same bits for a frame in any batch.

    Args:
        adapter: Adapter of this package or of Transformers, with `norm`, `linear_1` and `linear_2`.
        x: (N, D) packed frames.

    Returns:
        (N, D).
    """
    inner = functional.linear(adapter.linear_1, adapter.norm(x))
    return functional.linear(adapter.linear_2, getattr(adapter, "act_fn", torch.relu)(inner))


class AdapterConv(nn.Module):
    """One layer of `ConvolutionalAdapter`; it holds the parameters, and its parent computes the output.

    Args:
        width: Number of input and output channels.
        kernel: Kernel width in frames.
        stride: Stride in frames.
    """

    def __init__(self, width: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, 2 * width, kernel, stride=stride, padding=1)


class ConvolutionalAdapter(nn.Module):
    """Adapter after the layers of an encoder: strided convolutions with a gated linear unit, which leave fewer frames.

    Models with `add_adapter` in Transformers have one, such as the encoders of speech translation.

    Args:
        width: D, the number of input channels.
        out_width: Number of output channels; if it is not D, a linear layer and a layer norm come first.
        depth: Number of convolutions.
        kernel: Kernel width of each convolution in frames.
        stride: Stride of each convolution in frames.
        layer_drop: Probability of skipping a convolution in training, which leaves the number of frames as it is.
    """

    proj: nn.Module | None
    proj_layer_norm: nn.Module | None

    def __init__(self, width: int, out_width: int, *, depth: int, kernel: int, stride: int, layer_drop: float) -> None:
        super().__init__()
        self.layer_drop = layer_drop
        self.proj = PackedLinear(width, out_width) if out_width != width else None
        self.proj_layer_norm = nn.LayerNorm(out_width) if out_width != width else None
        self.layers = nn.ModuleList(AdapterConv(out_width, kernel=kernel, stride=stride) for _ in range(depth))

    def forward(self, frames: Packed) -> Packed:
        """Apply the adapter to each utterance alone: (N, D) to (N_out, out_width)."""
        kept = functional.kept_layers(self, None)
        return adapted(self, frames, [layer for layer, keep in zip(self.layers, kept, strict=True) if keep])

    def ask(self, layout: Layout) -> None:
        """Ask the layout of the input frames for all that `forward` computes with it, for `Layout.plan`."""
        for layer in self.layers:
            layout = ask_for_conv(layer.conv, layout)


def adapted(adapter: Any, frames: Packed, layers: Iterable[Any]) -> Packed:
    """Apply a convolutional adapter, this package's or that of Transformers.

    Args:
        adapter: Module with `proj` and `proj_layer_norm`, which may be None.
        frames: (N, D) packed frames.
        layers: The layers to run, each with `conv`. If it is an iterator, the next layer is requested after the
            previous one has run.

    Returns:
        (N_out, C) packed frames.
    """
    values, layout = frames
    if adapter.proj is not None:
        values = adapter.proj_layer_norm(functional.linear(adapter.proj, values))
    x = Packed(values, layout)
    for layer in layers:
        x = _convolved(layer.conv, x)
    return x


def ask_for_conv(conv: Any, layout: Layout) -> Layout:
    """Ask a layout for what a convolution of an adapter computes with it; return the layout of the output frames."""
    padding = int(conv.padding[0])
    _framed_rows(layout, padding)
    return _framed(layout, padding).after_conv(conv.kernel_size[0], conv.stride[0])


def _convolved(conv: Any, x: Packed) -> Packed:
    """Pad each utterance with zeros at both ends, then apply a strided convolution and a gated linear unit."""
    padding = int(conv.padding[0])
    framed = _framed(x.layout, padding)
    values = x.values.new_zeros(framed.total, x.values.shape[1])
    values = values.index_copy_(0, _framed_rows(x.layout, padding), x.values)
    out, layout = ops.strided_conv(
        values,
        functional.convolution_weight(conv),
        framed,
        stride=conv.stride[0],
        bias=conv.bias,
        norm="none",
        activation="none",
    )
    kept, gate = out.chunk(2, dim=1)
    return Packed(kept * sigmoid(gate), layout)


@kept_by_plan
def _framed(layout: Layout, padding: int) -> Layout:
    """Return the layout with `padding` rows at both ends of each utterance that has frames."""
    return layout.map_lengths(
        lambda length: length + 2 * padding if length else 0, lambda lengths: (lengths + 2 * padding) * (lengths > 0)
    )


@kept_by_plan
def _framed_rows(layout: Layout, padding: int) -> Tensor:  # (N,)
    return _framed(layout, padding).rows(layout.sequence_ids, layout.positions + padding)
