"""The transformer over packed frames: positional convolution, layers, and the encoder that stacks them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import ops
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
        return F.gelu(ops.positional_conv(x, self.conv.weight, layout, bias=self.conv.bias))


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
        for layer in self.layers:
            x = layer(x, layout)
        return x


class PositionalConvLayer(nn.Module):
    """One convolution of `StackedPositionalEmbedding`."""

    def __init__(self, width: int, *, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        self.layer_norm = nn.LayerNorm(width, elementwise_affine=False)
        nn.init.kaiming_normal_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(N, D) to (N, D)."""
        return F.gelu(self.layer_norm(ops.positional_conv(x, self.conv.weight, layout, bias=self.conv.bias)))


class RelativePositions(NamedTuple):
    """WavLM's buckets of distance, see `RelativePositionEmbedding`."""

    buckets: int
    max_distance: int


class FeedForward(nn.Module):
    """Two linear layers with GELU and dropout between them."""

    def __init__(self, width: int, inner_width: int, *, activation_dropout: float) -> None:
        super().__init__()
        self.intermediate_dense = PackedLinear(width, inner_width)
        self.output_dense = PackedLinear(inner_width, width)
        self.activation_dropout = activation_dropout

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) to (N, D), frame by frame."""
        dropout_p = self.activation_dropout if self.training else 0.0
        dense = self.intermediate_dense
        if dropout_p == 0 and isinstance(dense, PackedLinear):
            activated = dense.with_gelu(x)
        else:
            activated = ops.bias_gelu_dropout(dense(x), None, dropout_p=dropout_p)
        out: Tensor = self.output_dense(activated)
        return out


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward, each with a residual.

    Args:
        width: D.
        inner_width: Width of the feed-forward layer.
        heads: H.
        pre_norm: Norm before each block ("stable layer norm") instead of after its residual.
        dropout: After each block.
        attention_dropout: On attention probabilities.
        activation_dropout: Inside the feed-forward layer.
        eps: Of the layer norms.
        attention: Replaces the plain self-attention.
    """

    def __init__(
        self,
        width: int,
        inner_width: int,
        heads: int,
        *,
        pre_norm: bool,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        eps: float,
        attention: SelfAttention | None = None,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.dropout = dropout
        self.attention = attention or SelfAttention(width, heads, dropout=attention_dropout)
        self.layer_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward = FeedForward(width, inner_width, activation_dropout=activation_dropout)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, layout: Layout, distance_bias: Tensor | None = None) -> Tensor:
        """(N, D) to (N, D); `distance_bias` (H, 2R + 1) is the attention's."""
        if self.pre_norm:
            return self.chain(x, self.layer_norm(x), layout, self.layer_norm, distance_bias)[0]
        dropout_p = self.dropout if self.training else 0.0
        x = _add_and_norm(self.attention(x, layout, distance_bias), x, self.layer_norm, dropout_p=dropout_p)
        return _add_and_norm(self.feed_forward(x), x, self.final_layer_norm, dropout_p=dropout_p)

    def chain(
        self,
        x: Tensor,
        normalised: Tensor,
        layout: Layout,
        following: nn.LayerNorm,
        distance_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A layer with its norm before each block, in a stack: the last residual and the next layer's norm are one op.

        Args:
            x: (N, D) input.
            normalised: (N, D) what the layer's first norm makes of it.
            layout: Where each sequence begins.
            following: The norm that comes next.
            distance_bias: (H, 2R + 1) of the attention.

        Returns:
            The output (N, D), and what `following` makes of it.
        """
        dropout_p = self.dropout if self.training else 0.0
        attended = self.attention(normalised, layout, distance_bias)
        normalised, x = _norm_and_sum(attended, x, self.final_layer_norm, dropout_p=dropout_p)
        normalised, x = _norm_and_sum(self.feed_forward(normalised), x, following, dropout_p=dropout_p)
        return x, normalised


def _add_and_norm(branch: Tensor, residual: Tensor, norm: nn.LayerNorm, *, dropout_p: float = 0.0) -> Tensor:
    # The modules hold the parameters under the names that Transformers gives them; the op computes.
    return ops.dropout_add_layer_norm(
        branch, residual, weight=norm.weight, bias=norm.bias, eps=norm.eps, dropout_p=dropout_p
    )


def _norm_and_sum(branch: Tensor, residual: Tensor, norm: nn.LayerNorm, *, dropout_p: float) -> tuple[Tensor, Tensor]:
    return ops.dropout_add_layer_norm(
        branch, residual, weight=norm.weight, bias=norm.bias, eps=norm.eps, dropout_p=dropout_p, prenorm=True
    )


def _gated_attention(
    width: int, heads: int, dropout: float, positions: RelativePositions | None, *, first: bool
) -> SelfAttention | None:
    if positions is None:
        return None
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
                width,
                inner_width,
                heads,
                pre_norm=pre_norm,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation_dropout=activation_dropout,
                eps=eps,
                attention=_gated_attention(width, heads, attention_dropout, relative_positions, first=index == 0),
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
        x = self.dropout(x + position if self.pre_norm else _add_and_norm(position, x, self.layer_norm))
        keep = [True] * len(self.layers)
        if self.training and self.layer_drop > 0:
            keep = (torch.rand(len(keep), generator=layer_drop) >= self.layer_drop).tolist()
        bias = self._distance_bias()
        if bias is not None:
            keep[0] = True
        if self.pre_norm:
            return [Packed(state, layout) for state in self._pre_norm_states(x, layout, keep, bias)]
        states = [x]
        for layer, kept in zip(self.layers, keep, strict=True):
            states.append(layer(states[-1], layout, bias) if kept else states[-1])
        return [Packed(state, layout) for state in states]

    def _distance_bias(self) -> Tensor | None:  # (H, 2R + 1)
        """The first layer's, which every layer takes."""
        for layer in self.layers:
            embedding = getattr(layer.attention, "rel_attn_embed", None)
            return embedding.by_distance() if isinstance(embedding, RelativePositionEmbedding) else None
        return None

    def _pre_norm_states(self, x: Tensor, layout: Layout, keep: list[bool], bias: Tensor | None) -> list[Tensor]:
        layers = [layer for layer in self.layers if isinstance(layer, TransformerLayer)]
        norms = [layer.layer_norm for layer, kept in zip(layers, keep, strict=True) if kept]
        following = iter([*norms, self.layer_norm])
        normalised = next(following)(x)
        states = [x]
        for layer, kept in zip(layers, keep, strict=True):
            if kept:
                x, normalised = layer.chain(x, normalised, layout, next(following), bias)
            states.append(x)
        states[-1] = normalised
        return states
