"""The transformer over packed frames: positional embeddings, the layer, and the stack of layers."""

from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastssl.nn import functional
from fastssl.nn.adapter import AttentionAdapter
from fastssl.nn.attention import GatedSelfAttention, RelativePositionEmbedding, SelfAttention
from fastssl.nn.linear import PackedLinear
from fastssl.packing import Layout, Packed


class ConvolutionalPositionalEmbedding(nn.Module):
    """Positional embedding of wav2vec 2.0 (arXiv 2006.11477, section 2): a grouped convolution over time, then GELU.

    The weight is parametrised by weight norm. Each utterance is convolved on its own, with zeros beyond its ends.

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
        width: D, the number of input and output channels.
        kernel: Kernel width in frames. With an even kernel, the extra output frame at the end is dropped.
        groups: Number of channel groups; must divide `width`.
    """

    def __init__(self, width: int, *, kernel: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(conv.weight, std=2 * (kernel * width) ** -0.5)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Compute the positional embedding, without adding it to the frames.

        Args:
            x: (N, D) packed frames.
            layout: Where each utterance begins.

        Returns:
            (N, D) embedding.
        """
        return functional.positional_embedding(self, x, layout)


class StackedPositionalEmbedding(nn.Module):
    """Positional embedding of data2vec (arXiv 2202.03555): short grouped convolutions, each with layer norm and GELU.

    Args:
        width: D, the number of input and output channels.
        depth: Number of convolutions.
        kernel: Kernel width of each convolution in frames. With an even kernel, the extra output frame at the end is
            dropped.
        groups: Number of channel groups; must divide `width`.
    """

    def __init__(self, width: int, *, depth: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PositionalConvLayer(width, kernel=kernel, groups=groups) for _ in range(depth))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Compute the positional embedding, without adding it to the frames.

        Args:
            x: (N, D) packed frames.
            layout: Where each utterance begins.

        Returns:
            (N, D) embedding.
        """
        return functional.positional_embedding(self, x, layout)


class PositionalConvLayer(nn.Module):
    """One layer of `StackedPositionalEmbedding`: it holds the parameters, and its parent computes the output.

    The layer norm has no parameters.

    Args:
        width: D, the number of input and output channels.
        kernel: Kernel width in frames.
        groups: Number of channel groups; must divide `width`.
    """

    def __init__(self, width: int, *, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        self.layer_norm = nn.LayerNorm(width, elementwise_affine=False)
        nn.init.kaiming_normal_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]


class RelativePositions(NamedTuple):
    """Settings of WavLM's relative position bias, the arguments of `RelativePositionEmbedding`.

    Attributes:
        buckets: Number of distance buckets.
        max_distance: R, in frames. All distances of R or more share a bucket.
    """

    buckets: int
    max_distance: int


class FeedForward(nn.Module):
    """Two linear layers with GELU and dropout between them (arXiv 1706.03762, section 3.3; GELU replaces ReLU).

    Args:
        width: D, the number of input and output channels.
        inner_width: Number of channels between the two layers.
        activation_dropout: Dropout probability after GELU.
    """

    def __init__(self, width: int, inner_width: int, *, activation_dropout: float) -> None:
        super().__init__()
        self.intermediate_dense = PackedLinear(width, inner_width)
        self.intermediate_dropout = nn.Dropout(activation_dropout)
        self.output_dense = PackedLinear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to each frame: (N, D) to (N, D)."""
        return functional.feed_forward(self, x)


class TransformerLayer(nn.Module):
    """A transformer layer: self-attention and feed-forward, each with dropout, a residual connection and a layer norm.

    Args:
        attention: Self-attention module for frames of width D.
        width: D, the number of channels of a frame.
        inner_width: Number of channels between the two linear layers of the feed-forward block.
        pre_norm: Whether to normalise the input of each block ("stable layer norm" in Transformers), instead of the sum
            of block and residual.
        dropout: Dropout probability after each block.
        activation_dropout: Dropout probability inside the feed-forward block.
        eps: Added to the variance in the layer norms.
        adapter_width: Inner width of an adapter (`nn.adapter.AttentionAdapter`) after the layer, which must have
            `pre_norm`; None has no adapter.
    """

    adapter_layer: AttentionAdapter | None

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
        adapter_width: int | None = None,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.dropout = nn.Dropout(dropout)
        self.attention = attention
        self.layer_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward = FeedForward(width, inner_width, activation_dropout=activation_dropout)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)
        self.adapter_layer = None if adapter_width is None else AttentionAdapter(width, adapter_width)

    def forward(self, x: Tensor, layout: Layout, distance_bias: Tensor | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: (N, D) packed frames.
            layout: Where each sequence begins.
            distance_bias: (H, 2R + 1) bias of the attention logits by distance, see `ops.varlen_attention`.

        Returns:
            (N, D) frames.
        """
        return self.chain(x, layout, distance_bias, self.layer_norm)[0]

    def chain(
        self,
        x: Tensor,
        layout: Layout,
        distance_bias: Tensor | None,
        following: nn.LayerNorm,
        normalised: Tensor | None = None,
        *,
        last: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer within a `pre_norm` stack, and fuse the last residual sum with the norm that follows.

        Args:
            x: (N, D) packed frames.
            layout: Where each sequence begins.
            distance_bias: (H, 2R + 1) bias of the attention logits by distance, or None.
            following: The norm that comes next, such as the first norm of the next layer.
            normalised: (N, D) result of this layer's first norm on `x`; None computes it.
            last: Whether `following` is the norm of the stack's output.

        Returns:
            The output (N, D), and the result of `following` on it (N, D).
        """
        adapter = self.adapter_layer
        x, normalised = functional.transformer_layer(
            self,
            x,
            partial(self.attention, layout=layout, distance_bias=distance_bias),
            self.feed_forward,
            self.dropout,
            pre_norm=self.pre_norm,
            normalised=normalised,
            following=following if adapter is None else None,
            last=last,
        )
        if adapter is None:
            return x, normalised
        x = x + adapter(x)
        return x, following(x)


def _attention(
    width: int, heads: int, dropout: float, positions: RelativePositions | None, *, first: bool
) -> SelfAttention:
    """Create a layer's attention. With `positions` it is gated, and that of the `first` layer owns the bias table."""
    if positions is None:
        return SelfAttention(width, heads, dropout=dropout)
    embedding = None
    if first:
        embedding = RelativePositionEmbedding(positions.buckets, heads, max_distance=positions.max_distance)
    return GatedSelfAttention(width, heads, dropout=dropout, embedding=embedding)


class Transformer(nn.Module):
    """The transformer of a speech encoder: a convolutional positional embedding and a stack of layers.

    Args:
        depth: Number of layers.
        width: D, the number of channels of a frame.
        inner_width: Number of channels between the two linear layers of a feed-forward block.
        heads: H, the number of attention heads; must divide `width`.
        positional_kernel: Kernel width of the positional convolution, in frames.
        positional_groups: Number of channel groups of the positional convolution.
        pre_norm: Whether to normalise the input of each block and the output of the last layer ("stable layer norm" in
            Transformers), instead of the sum of block and residual.
        dropout: Dropout probability after each block and after the positional embedding.
        attention_dropout: Dropout probability of the attention weights.
        activation_dropout: Dropout probability inside the feed-forward blocks.
        layer_drop: Probability of skipping a layer in training (LayerDrop, arXiv 1909.11556).
        eps: Added to the variance in the layer norms.
        positional_depth: Number of positional convolutions, each with a layer norm, as in data2vec. None uses one
            convolution with weight norm, as in wav2vec 2.0.
        relative_positions: Settings of WavLM's gated attention with a bias by distance; None uses ordinary attention.
            The first layer owns the bias table of all layers and is never skipped.
        adapter_width: Inner width of the adapter after each layer, which needs `pre_norm`; None has no adapters.

    Raises:
        ValueError: `heads` does not divide `width`.
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
        adapter_width: int | None = None,
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
                adapter_width=adapter_width,
            )
            for index in range(depth)
        )

    def ask(self, layout: Layout) -> None:
        """Ask a layout for all that training computes with it, for `Layout.plan`.

        Args:
            layout: Layout of the frames that `forward` gets.
        """
        layout.ask_for_indices()
        for block in getattr(self.pos_conv_embed, "layers", [self.pos_conv_embed]):
            layout.rows_with_gaps(0, block.conv.kernel_size[0] // 2)

    def forward(self, frames: Packed, *, layer_drop: torch.Generator | None = None) -> list[Packed]:
        """Run all layers.

        Args:
            frames: (N, D) packed frames.
            layer_drop: CPU generator that decides which layers are skipped in training; None uses PyTorch's global one.

        Returns:
            `depth` + 1 packed batches (N, D): the input of each layer, then the output of the last layer, like the
            hidden states of Transformers.
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
                norm = next(following)
                x, normalised = layer.chain(x, layout, bias, norm, normalised, last=norm is self.layer_norm)
            elif kept:
                x = layer(x, layout, bias)
            states.append(x)
        if self.pre_norm:
            states[-1] = self.layer_norm(x) if normalised is None else normalised
        return [Packed(state, layout) for state in states]
