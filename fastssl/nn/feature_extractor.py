"""The convolutional front end, which turns waveforms into frames, and the projection to the model's width."""

import warnings
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from fastssl.nn import functional
from fastssl.nn.linear import PackedLinear
from fastssl.nn.waveforms import as_samples
from fastssl.packing import Packed


class ConvLayer(nn.Module):
    """One strided convolution with its norm and GELU. `FeatureExtractor` calls it only if it has a hook.

    Args:
        c_in: Number of input channels.
        c_out: Number of output channels.
        kernel: Kernel width in input frames.
        stride: Stride in input frames.
        bias: Whether the convolution has a bias.
        norm: "none", "group" (over time, per utterance and channel) or "layer" (over channels).
    """

    def __init__(
        self, c_in: int, c_out: int, *, kernel: int, stride: int, bias: bool, norm: Literal["none", "group", "layer"]
    ) -> None:
        super().__init__()
        # These modules only hold parameters, under the names that Transformers uses; an op does the computation.
        self.conv = nn.Conv1d(c_in, c_out, kernel, stride=stride, bias=bias)
        self.layer_norm: nn.GroupNorm | nn.LayerNorm | None = None
        if norm == "group":
            self.layer_norm = nn.GroupNorm(c_out, c_out)
        elif norm == "layer":
            self.layer_norm = nn.LayerNorm(c_out)
        nn.init.kaiming_normal_(self.conv.weight)

    def forward(self, x: Packed) -> Packed:
        """Run the layer: packed frames (N, C_in) to (N_out, C_out)."""
        return functional.front_end([self], x)


class FeatureExtractor(nn.Module):
    """The convolution stack of wav2vec 2.0 (arXiv 2006.11477, section 2): turns 16 kHz samples into frames of 20 ms.

    Example:
        >>> import torch
        >>> from fastssl import Packed
        >>> from fastssl.nn import FeatureExtractor
        >>> kernels, strides = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
        >>> extractor = FeatureExtractor([64] * 7, kernels, strides, bias=False, norm="group")
        >>> waveforms = Packed.pack([torch.randn(16_000, 1), torch.randn(52_000, 1)])
        >>> frames = extractor(waveforms)
        >>> frames.layout.lengths, frames.values.shape
        ((49, 162), torch.Size([211, 64]))

    Args:
        channels: Number of output channels of each layer.
        kernels: Kernel width of each layer, in input frames.
        strides: Stride of each layer, in input frames.
        bias: Whether the convolutions have a bias.
        norm: "group" normalises each channel over the frames of its utterance, in the first layer only. "layer"
            normalises each frame over its channels, in every layer.

    Raises:
        ValueError: `norm` is unknown, or `channels`, `kernels` and `strides` differ in length.
    """

    def __init__(
        self,
        channels: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
        *,
        bias: bool,
        norm: Literal["group", "layer"],
    ) -> None:
        super().__init__()
        if norm not in ("group", "layer"):
            raise ValueError(f"norm: must be 'group' or 'layer', got {norm!r}")
        later: Literal["none", "layer"] = "layer" if norm == "layer" else "none"
        shapes = zip([1, *channels[:-1]], channels, kernels, strides, strict=True)
        self.conv_layers = nn.ModuleList(
            ConvLayer(c_in, c_out, kernel=kernel, stride=stride, bias=bias, norm=later if index else norm)
            for index, (c_in, c_out, kernel, stride) in enumerate(shapes)
        )

    def forward(self, waveforms: Packed) -> Packed:
        """Turn waveforms into frames.

        Args:
            waveforms: (N samples,) or (N samples, 1) packed 16 kHz waveforms.

        Returns:
            (N frames, C), C being the width of the last layer. Utterances shorter than the receptive field have none.
        """
        waveforms = as_samples(waveforms)
        watched = False
        for layer in self.conv_layers:
            watched = watched or functional.is_watched(layer)
            for name, part in layer.named_children():
                if functional.is_watched(part):
                    warnings.warn(
                        f"a hook or a replaced `forward` on the `{name}` of a ConvLayer never runs, because one op "
                        "computes the whole layer; put it on the ConvLayer",
                        stacklevel=2,
                    )
        if not watched:
            return functional.front_end(self.conv_layers, waveforms)
        for layer in self.conv_layers:
            waveforms = layer(waveforms)
        return waveforms


class FeatureProjection(nn.Module):
    """Layer norm of the front end's frames, then a linear map to the model's width.

    Args:
        c_in: C, the number of channels of the front end's frames.
        width: D, the number of channels of the transformer.
        eps: Added to the variance in the layer norm.
        dropout: Dropout probability after the projection.
        norm: Whether to normalise before the projection.
    """

    def __init__(self, c_in: int, width: int, *, eps: float, dropout: float, norm: bool = True) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(c_in, eps=eps) if norm else None
        self.projection = PackedLinear(c_in, width)
        self.dropout = nn.Dropout(dropout)
        bound = c_in**-0.5
        nn.init.uniform_(self.projection.weight, -bound, bound)
        nn.init.uniform_(self.projection.bias, -bound, bound)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:  # (N, C) -> (N, D), (N, C)
        """Normalise and project frames.

        Args:
            features: (N, C) frames of the front end.

        Returns:
            The projected frames (N, D), and the normalised frames (N, C), which a quantiser needs.
        """
        normalised = self.normalise(features)
        return self.project(normalised), normalised

    def normalise(self, features: Tensor) -> Tensor:  # (N, C) -> (N, C)
        """Apply the layer norm; return `features` unchanged if the module has none."""
        return functional.normalise(self, features)

    def project(self, normalised: Tensor) -> Tensor:  # (N, C) -> (N, D)
        """Apply the linear map, then dropout."""
        return functional.project(self, normalised)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x` unchanged, but multiply its gradient by `factor` in the backward pass.

    Args:
        x: Tensor of any shape.
        factor: Factor of the gradient; 0 detaches `x`.
    """
    if factor == 0.0:
        return x.detach()
    if factor != 1.0 and x.requires_grad:
        x = x.view_as(x)
        x.register_hook(lambda grad: grad * factor)
    return x
