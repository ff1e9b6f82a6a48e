"""From waveforms to frames: the convolutional front end and the projection to the model's width."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from fastssl.nn import functional
from fastssl.nn.linear import PackedLinear
from fastssl.packing import Packed


class ConvLayer(nn.Module):
    """The parameters of one strided convolution and its norm; `FeatureExtractor` runs all layers as one op.

    Args:
        c_in: Input channels.
        c_out: Output channels.
        kernel: Kernel width in input frames.
        stride: Stride in input frames.
        bias: Whether the convolution has a bias.
        norm: "none", "group" (over time, per utterance and channel) or "layer" (over channels).
    """

    def __init__(
        self, c_in: int, c_out: int, *, kernel: int, stride: int, bias: bool, norm: Literal["none", "group", "layer"]
    ) -> None:
        super().__init__()
        # The modules hold the parameters under the names that Transformers gives them; the op computes.
        self.conv = nn.Conv1d(c_in, c_out, kernel, stride=stride, bias=bias)
        self.layer_norm: nn.GroupNorm | nn.LayerNorm | None = None
        if norm == "group":
            self.layer_norm = nn.GroupNorm(c_out, c_out)
        elif norm == "layer":
            self.layer_norm = nn.LayerNorm(c_out)
        nn.init.kaiming_normal_(self.conv.weight)


class FeatureExtractor(nn.Module):
    """The convolution stack of wav2vec 2.0 (arXiv 2006.11477, section 2): 16 kHz samples to frames of 20 ms.

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
        channels: Output channels of each layer.
        kernels: Kernel width of each layer.
        strides: Stride of each layer.
        bias: Whether convolutions have a bias.
        norm: "group" (first layer only, over time per utterance) or "layer" (every layer).
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
        """(N samples, 1) to (N frames, C). An utterance shorter than the receptive field leaves no frame."""
        return functional.front_end(self.conv_layers, waveforms)


class FeatureProjection(nn.Module):
    """Layer norm of the front end's frames, then a linear map to the model's width.

    Args:
        c_in: Channels of the front end.
        width: D, width of the transformer.
        eps: Of the layer norm.
        dropout: After the projection.
        norm: Whether there is the layer norm.
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
        """The projected frames, and the normalised ones that the quantiser takes."""
        normalised = self.normalise(features)
        return self.project(normalised), normalised

    def normalise(self, features: Tensor) -> Tensor:  # (N, C) -> (N, C)
        """The layer norm, if there is one."""
        return functional.normalise(self, features)

    def project(self, normalised: Tensor) -> Tensor:  # (N, C) -> (N, D)
        """The linear map, then dropout."""
        return functional.project(self, normalised)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x` itself, with its gradient multiplied by `factor`; 0 stops the gradient."""
    if factor == 0.0:
        return x.detach()
    if factor != 1.0 and x.requires_grad:
        x = x.view_as(x)
        x.register_hook(lambda grad: grad * factor)
    return x
