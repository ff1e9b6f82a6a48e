"""The Conformer (arXiv 2005.08100) over packed frames, with rotary positions, and layer norm in place of batch norm."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.nn import functional
from fastssl.nn.activation import glu, silu
from fastssl.nn.linear import PackedLinear
from fastssl.nn.rotary import Rotation, rotate, rotation
from fastssl.packing import Layout, Packed


class RotarySelfAttention(nn.Module):
    """Self-attention within each sequence with rotary positions (RoFormer, arXiv 2104.09864).

    Queries and keys are rotated by their positions, so the logit of two frames depends on their distance.

    Args:
        width: D, the number of channels of a frame, split evenly over the heads.
        heads: H, the number of heads; D / H must be even.
        dropout: Dropout probability of the attention weights in training.

    Raises:
        ValueError: `width` is not a multiple of 2 * `heads`.
    """

    def __init__(self, width: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"heads: width / heads must be an even whole number, got {width} / {heads}")
        self.num_heads = heads
        self.dropout = dropout
        self.qkv_proj = PackedLinear(width, 3 * width)
        self.out_proj = PackedLinear(width, width)

    def forward(self, x: Tensor, layout: Layout, turn: Rotation) -> Tensor:
        """Let each frame attend to all frames of its own sequence.

        Args:
            x: (N, D) packed frames.
            layout: Where each sequence begins.
            turn: The rotation of `layout` for heads of width D / H, from `nn.rotary.rotation`.

        Returns:
            (N, D) in the dtype of `x`, or in autocast's dtype under autocast.
        """
        q, k, v = functional.linear(self.qkv_proj, x).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        attended = functional.attend(self, (rotate(q, turn), rotate(k, turn), v), layout)
        return functional.linear(self.out_proj, attended)


class ConvolutionModule(nn.Module):
    """The convolution module of the Conformer (arXiv 2005.08100, section 2.2), with layer norm in place of batch norm.

    It consists of a pointwise convolution with a gate, a depthwise convolution, layer norm, SiLU and a pointwise
    convolution. The depthwise convolution sees zeros beyond the ends of each utterance.

    Args:
        width: D, the number of channels of a frame.
        kernel: Kernel width of the depthwise convolution in frames, odd.
        eps: Added to the variance in the layer norm.
    """

    def __init__(self, width: int, *, kernel: int, eps: float) -> None:
        super().__init__()
        self.gated_proj = PackedLinear(width, 2 * width)
        # This module only holds parameters; `forward` calls an op.
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.layer_norm = nn.LayerNorm(width, eps=eps)
        self.out_proj = PackedLinear(width, width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Mix neighbouring frames within each utterance.

        Args:
            x: (N, D) packed frames.
            layout: Where each utterance begins.

        Returns:
            (N, D) in the dtype of `x`, or in autocast's dtype under autocast.
        """
        conv = self.depthwise_conv
        mixed = ops.positional_conv(glu(self.gated_proj(x)), conv.weight, layout, bias=conv.bias)
        out: Tensor = self.out_proj(silu(self.layer_norm(mixed)))
        return out


class _HalfFeedForward(nn.Module):
    """Two linear layers with SiLU and dropout between them; the output is multiplied by 0.5 (section 2.3)."""

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
    """A Conformer layer (arXiv 2005.08100, section 2.4).

    Its blocks are a half feed-forward, attention, a convolution, and another half feed-forward. Each block has a layer
    norm in front and a residual connection around it; a final layer norm follows. Layer norm replaces the paper's batch
    norm, so that no frame depends on another utterance.

    Example:
        >>> import torch
        >>> from fastssl import Layout
        >>> from fastssl.nn import ConformerLayer
        >>> layer = ConformerLayer(64, 256, 4, kernel=31, dropout=0.1)
        >>> layout = Layout.from_lengths([300, 40])
        >>> layer(torch.randn(340, 64), layout).shape
        torch.Size([340, 64])

    Args:
        width: D, the number of channels of a frame.
        inner_width: Number of channels between the two linear layers of a feed-forward block.
        heads: H, the number of heads; D / H must be even.
        kernel: Kernel width of the depthwise convolution in frames, odd.
        dropout: Dropout probability after each block.
        attention_dropout: Dropout probability of the attention weights.
        activation_dropout: Dropout probability inside the feed-forward blocks.
        eps: Added to the variance in the layer norms.

    Raises:
        ValueError: `width` is not a multiple of 2 * `heads`, or `kernel` is even.
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
            raise ValueError(f"kernel: must be odd, so that it is centred on a frame, got {kernel}")
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
        """Run the layer.

        Args:
            x: (N, D) packed frames.
            layout: Where each utterance begins.
            turn: The rotation of `layout` for heads of width D / H; None computes it. Compute it once for a stack of
                layers with `nn.rotary.rotation`.

        Returns:
            (N, D) in the dtype of `x`; in autocast's dtype under CPU autocast, and in fp32 under CUDA autocast.
        """
        turn = rotation(layout, x.shape[1] // self.attention.num_heads) if turn is None else turn
        join = functional.sum_and_norm
        x, normalised = join(self.first_feed_forward(self.first_norm(x)), x, self.attention_norm, self.dropout)
        x, normalised = join(self.attention(normalised, layout, turn), x, self.convolution_norm, self.dropout)
        x, normalised = join(self.convolution(normalised, layout), x, self.second_norm, self.dropout)
        x = functional.wide(x)  # the norm of the sum is the next layer's residual
        return join(self.second_feed_forward(normalised), x, self.final_norm, self.dropout)[1]


class Conformer(nn.Module):
    """A stack of Conformer layers.

    Args:
        layers: The layers, all with the same width D and number of heads H.
        head_width: D / H, the width of a head.
        layer_drop: Probability of skipping a layer in training (LayerDrop, arXiv 1909.11556).
    """

    def __init__(self, layers: Iterable[ConformerLayer], *, head_width: int, layer_drop: float) -> None:
        super().__init__()
        self.head_width = head_width
        self.layer_drop = layer_drop
        self.layers = nn.ModuleList(layers)

    def ask(self, layout: Layout) -> None:
        """Ask a layout for all that training computes with it, for `Layout.plan`.

        Args:
            layout: Layout of the frames that `forward` gets.
        """
        layout.ask_for_indices()
        for layer in cast(list[ConformerLayer], list(self.layers)):
            layout.rows_with_gaps(0, layer.convolution.depthwise_conv.kernel_size[0] // 2)

    def forward(self, frames: Packed, *, layer_drop: torch.Generator | None = None) -> list[Packed]:
        """Run all layers.

        Args:
            frames: (N, D) packed frames.
            layer_drop: CPU generator that decides which layers are skipped in training; None uses PyTorch's global one.

        Returns:
            The input of each layer, then the output of the last layer, (N, D) each. These are one more than there are
            layers.
        """
        x, layout = frames
        turn = rotation(layout, self.head_width)
        states = [x]
        for layer, kept in zip(self.layers, functional.kept_layers(self, layer_drop), strict=True):
            states.append(layer(states[-1], layout, turn) if kept else states[-1])
        return [Packed(state, layout) for state in states]
