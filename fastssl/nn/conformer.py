"""The Conformer over packed frames (arXiv 2005.08100), with rotary positions and without batch norm."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.nn import functional
from fastssl.nn.activation import glu, silu
from fastssl.nn.linear import PackedLinear
from fastssl.nn.rotary import Rotation, rotate, rotation
from fastssl.packing import Layout, Packed


class RotarySelfAttention(nn.Module):
    """Self-attention within each sequence whose logits see how far apart frames are, not where (arXiv 2104.09864).

    Args:
        width: D, split evenly over the heads.
        heads: H; D / H must be even.
        dropout: On the attention probabilities, in training.

    Raises:
        ValueError: The heads do not divide the width into even ones.
    """

    def __init__(self, width: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"heads: {heads} do not divide a width of {width} into even widths")
        self.num_heads = heads
        self.dropout = dropout
        self.qkv_proj = PackedLinear(width, 3 * width)
        self.out_proj = PackedLinear(width, width)

    def forward(self, x: Tensor, layout: Layout, turn: Rotation) -> Tensor:
        """(N, D) to (N, D); `turn` is the rotation of `layout` for heads of width D / H."""
        q, k, v = functional.linear(self.qkv_proj, x).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        attended = functional.attend(self, (rotate(q, turn), rotate(k, turn), v), layout)
        return functional.linear(self.out_proj, attended)


class ConvolutionModule(nn.Module):
    """Gated pointwise, depthwise and pointwise convolution; the depthwise one sees zeros beyond an utterance's ends.

    Args:
        width: D.
        kernel: Frames of the depthwise convolution, odd.
        eps: Of the layer norm.
    """

    def __init__(self, width: int, *, kernel: int, eps: float) -> None:
        super().__init__()
        self.gated_proj = PackedLinear(width, 2 * width)
        # The module holds the parameters; the op computes.
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.layer_norm = nn.LayerNorm(width, eps=eps)
        self.out_proj = PackedLinear(width, width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(N, D) to (N, D)."""
        conv = self.depthwise_conv
        mixed = ops.positional_conv(glu(self.gated_proj(x)), conv.weight, layout, bias=conv.bias)
        out: Tensor = self.out_proj(silu(self.layer_norm(mixed)))
        return out


class _HalfFeedForward(nn.Module):
    """Half of two linear layers with SiLU and dropout between them."""

    def __init__(self, width: int, inner_width: int, *, dropout: float) -> None:
        super().__init__()
        self.intermediate_dense = PackedLinear(width, inner_width)
        self.output_dense = PackedLinear(inner_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (N, D) -> (N, D)
        inner = functional.dropout(self.dropout, silu(self.intermediate_dense(x)))
        out: Tensor = 0.5 * self.output_dense(inner)
        return out


class ConformerLayer(nn.Module):
    """Half a feed-forward layer, self-attention, convolution, and the other half, each normalised before (section 2).

    Layer norm stands where the paper has batch norm, so no frame sees another utterance.

    Example:
        >>> import torch
        >>> from fastssl import Layout
        >>> from fastssl.nn import ConformerLayer
        >>> layer = ConformerLayer(64, 256, 4, kernel=31, dropout=0.1)
        >>> layout = Layout.from_lengths([300, 40])
        >>> layer(torch.randn(340, 64), layout).shape
        torch.Size([340, 64])

    Args:
        width: D.
        inner_width: Width of the feed-forward layers.
        heads: H; D / H must be even.
        kernel: Frames of the depthwise convolution, odd.
        dropout: After each block.
        attention_dropout: On attention probabilities.
        activation_dropout: Inside the feed-forward layers.
        eps: Of the layer norms.

    Raises:
        ValueError: The heads do not divide the width into even ones, or the kernel is even.
    """

    def __init__(
        self,
        width: int,
        inner_width: int,
        heads: int,
        *,
        kernel: int,
        dropout: float,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel: must be odd, so that a frame is in its middle, got {kernel}")
        self.dropout = nn.Dropout(dropout)
        self.first_norm = nn.LayerNorm(width, eps=eps)
        self.first_feed_forward = _HalfFeedForward(width, inner_width, dropout=activation_dropout)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = RotarySelfAttention(width, heads, dropout=attention_dropout)
        self.convolution_norm = nn.LayerNorm(width, eps=eps)
        self.convolution = ConvolutionModule(width, kernel=kernel, eps=eps)
        self.second_norm = nn.LayerNorm(width, eps=eps)
        self.second_feed_forward = _HalfFeedForward(width, inner_width, dropout=activation_dropout)
        self.final_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, layout: Layout, turn: Rotation | None = None) -> Tensor:
        """(N, D) to (N, D); `turn` is the rotation of `layout`, from a caller who has it."""
        turn = rotation(layout, x.shape[1] // self.attention.num_heads) if turn is None else turn
        join = functional.sum_and_norm
        x, normalised = join(self.first_feed_forward(self.first_norm(x)), x, self.attention_norm, self.dropout)
        x, normalised = join(self.attention(normalised, layout, turn), x, self.convolution_norm, self.dropout)
        x, normalised = join(self.convolution(normalised, layout), x, self.second_norm, self.dropout)
        return join(self.second_feed_forward(normalised), x, self.final_norm, self.dropout)[1]


class Conformer(nn.Module):
    """A stack of layers.

    Args:
        layers: The layers, of one shape.
        head_width: D / H.
        layer_drop: Probability of skipping a layer in training (LayerDrop, arXiv 1909.11556).
    """

    def __init__(self, layers: Iterable[ConformerLayer], *, head_width: int, layer_drop: float) -> None:
        super().__init__()
        self.head_width = head_width
        self.layer_drop = layer_drop
        self.layers = nn.ModuleList(layers)

    def forward(self, frames: Packed, *, layer_drop: torch.Generator | None = None) -> list[Packed]:
        """The input of each layer, then the output of the last.

        Args:
            frames: (N, D).
            layer_drop: CPU generator from which the layers to skip are drawn in training; None takes torch's own.
        """
        x, layout = frames
        turn = rotation(layout, self.head_width)
        states = [x]
        for layer, kept in zip(self.layers, functional.kept_layers(self, layer_drop), strict=True):
            states.append(layer(states[-1], layout, turn) if kept else states[-1])
        return [Packed(state, layout) for state in states]
