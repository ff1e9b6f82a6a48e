"""The transformer over packed frames: positional convolution, layers, and the encoder that stacks them."""

from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastssl.nn import functional
from fastssl.nn.attention import GatedSelfAttention, RelativePositionEmbedding, SelfAttention
from fastssl.nn.linear import PackedLinear
from fastssl.packing import Layout, Packed


class ConvolutionalPositionalEmbedding(nn.Module):
    """Grouped convolution over time with weight norm and GELU, which tells the transformer where a frame is.

    wav2vec 2.0 (arXiv 2006.11477, section 2). Each utterance is convolved on its own, with zeros beyond its ends.

    Example:
        >>> import torch
        >>> from fastssl import Layout
        >>> from fastssl.nn import ConvolutionalPositionalEmbedding
        >>> embedding = ConvolutionalPositionalEmbedding(64, kernel=32, groups=8)
        >>> layout = Layout.from_lengths([300, 40])
        >>> x = torch.randn(340, 64)
        >>> (x + embedding(x, layout)).shape
        torch.Size([340, 64])

    Args:
        width: D, channels in and out.
        kernel: Frames; an even kernel drops the last output frame.
        groups: Channel groups.
    """

    def __init__(self, width: int, *, kernel: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(conv.weight, std=2 * (kernel * width) ** -0.5)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """The embedding (N, D) of frames (N, D)."""
        return functional.positional_embedding(self, x, layout)


class StackedPositionalEmbedding(nn.Module):
    """data2vec's positional embedding (arXiv 2202.03555): short grouped convolutions, each with layer norm and GELU.

    Args:
        width: D, channels in and out.
        depth: Convolutions.
        kernel: Frames of each; an even kernel drops the last output frame.
        groups: Channel groups.
    """

    def __init__(self, width: int, *, depth: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PositionalConvLayer(width, kernel=kernel, groups=groups) for _ in range(depth))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """The embedding (N, D) of frames (N, D)."""
        return functional.positional_embedding(self, x, layout)


class PositionalConvLayer(nn.Module):
    """The parameters of one convolution of `StackedPositionalEmbedding`."""

    def __init__(self, width: int, *, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        self.layer_norm = nn.LayerNorm(width, elementwise_affine=False)
        nn.init.kaiming_normal_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]


class RelativePositions(NamedTuple):
    """WavLM's buckets of distance, see `RelativePositionEmbedding`."""

    buckets: int
    max_distance: int


class FeedForward(nn.Module):
    """Two linear layers with GELU and dropout between them."""

    def __init__(self, width: int, inner_width: int, *, activation_dropout: float) -> None:
        super().__init__()
        self.intermediate_dense = PackedLinear(width, inner_width)
        self.intermediate_dropout = nn.Dropout(activation_dropout)
        self.output_dense = PackedLinear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) to (N, D), frame by frame."""
        return functional.feed_forward(self, x)


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward, each with a residual.

    Args:
        attention: The self-attention.
        width: D.
        inner_width: Width of the feed-forward layer.
        pre_norm: Norm before each block ("stable layer norm") instead of after its residual.
        dropout: After each block.
        activation_dropout: Inside the feed-forward layer.
        eps: Of the layer norms.
    """

    def __init__(
        self,
        attention: SelfAttention,
        width: int,
        inner_width: int,
        *,
        pre_norm: bool,
        dropout: float,
        activation_dropout: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.dropout = nn.Dropout(dropout)
        self.attention = attention
        self.layer_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward = FeedForward(width, inner_width, activation_dropout=activation_dropout)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, layout: Layout, distance_bias: Tensor | None = None) -> Tensor:
        """(N, D) to (N, D); `distance_bias` (H, 2R + 1) is the attention's."""
        return self.chain(x, layout, distance_bias, self.layer_norm)[0]

    def chain(
        self,
        x: Tensor,
        layout: Layout,
        distance_bias: Tensor | None,
        following: nn.LayerNorm,
        normalised: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The layer in a stack whose norms come before the blocks: the last residual and the next norm are one op.

        Args:
            x: (N, D) input.
            layout: Where each sequence begins.
            distance_bias: (H, 2R + 1) of the attention.
            following: The norm that comes next.
            normalised: (N, D) what the layer's first norm makes of `x`; None computes it.

        Returns:
            The output (N, D), and what `following` makes of it.
        """
        return functional.transformer_layer(
            self,
            x,
            partial(self.attention, layout=layout, distance_bias=distance_bias),
            self.feed_forward,
            self.dropout,
            pre_norm=self.pre_norm,
            normalised=normalised,
            following=following,
        )


def _attention(
    width: int, heads: int, dropout: float, positions: RelativePositions | None, *, first: bool
) -> SelfAttention:
    if positions is None:
        return SelfAttention(width, heads, dropout=dropout)
    embedding = None
    if first:
        embedding = RelativePositionEmbedding(positions.buckets, heads, max_distance=positions.max_distance)
    return GatedSelfAttention(width, heads, dropout=dropout, embedding=embedding)


class Transformer(nn.Module):
    """Positional convolution and a stack of layers.

    Args:
        depth: Number of layers.
        width: D.
        inner_width: Width of the feed-forward layers.
        heads: H.
        positional_kernel: Frames of the positional convolution.
        positional_groups: Its channel groups.
        pre_norm: Norm before each block, and once at the end ("stable layer norm"), instead of after each block.
        dropout: After each block and after the positional embedding.
        attention_dropout: On attention probabilities.
        activation_dropout: Inside feed-forward layers.
        layer_drop: Probability of skipping a layer in training (LayerDrop, arXiv 1909.11556).
        eps: Of the layer norms.
        positional_depth: So many positional convolutions, each with a norm (data2vec); None is one with weight norm.
        relative_positions: Gated attention with a bias by distance (WavLM); the first layer has the bias of all layers,
            and is never skipped.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        inner_width: int,
        heads: int,
        *,
        positional_kernel: int,
        positional_groups: int,
        pre_norm: bool,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        layer_drop: float,
        eps: float,
        positional_depth: int | None = None,
        relative_positions: RelativePositions | None = None,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.layer_drop = layer_drop
        self.pos_conv_embed: ConvolutionalPositionalEmbedding | StackedPositionalEmbedding
        if positional_depth is None:
            self.pos_conv_embed = ConvolutionalPositionalEmbedding(
                width, kernel=positional_kernel, groups=positional_groups
            )
        else:
            self.pos_conv_embed = StackedPositionalEmbedding(
                width, depth=positional_depth, kernel=positional_kernel, groups=positional_groups
            )
        self.layer_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(
                _attention(width, heads, attention_dropout, relative_positions, first=index == 0),
                width,
                inner_width,
                pre_norm=pre_norm,
                dropout=dropout,
                activation_dropout=activation_dropout,
                eps=eps,
            )
            for index in range(depth)
        )

    def forward(self, frames: Packed, *, layer_drop: torch.Generator | None = None) -> list[Packed]:
        """The input of each layer, then the output of the last, as Transformers orders its hidden states.

        Args:
            frames: (N, D).
            layer_drop: CPU generator from which the layers to skip are drawn in training; None takes torch's own.
        """
        x, layout = frames
        position = self.pos_conv_embed(x, layout)
        x = self.dropout(x + position if self.pre_norm else functional.add_and_norm(position, x, self.layer_norm))
        keep = functional.kept_layers(self, layer_drop)
        embedding = getattr(self.layers[0].attention, "rel_attn_embed", None) if len(self.layers) else None
        bias = None
        if embedding is not None:
            bias, keep[0] = embedding.by_distance(), True
        layers = cast(list[TransformerLayer], list(self.layers))
        norms = [layer.layer_norm for layer, kept in zip(layers, keep, strict=True) if kept]
        following = iter([*norms[1:], self.layer_norm])
        states, normalised = [x], None
        for layer, kept in zip(layers, keep, strict=True):
            if kept and self.pre_norm:
                x, normalised = layer.chain(x, layout, bias, next(following), normalised)
            elif kept:
                x = layer(x, layout, bias)
            states.append(x)
        if self.pre_norm:
            states[-1] = self.layer_norm(x) if normalised is None else normalised
        return [Packed(state, layout) for state in states]
