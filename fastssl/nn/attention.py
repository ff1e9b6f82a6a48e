"""Multi-head self-attention over packed sequences."""

import math

import torch
from torch import Tensor, nn

from fastssl.nn import functional
from fastssl.nn.linear import PackedLinear
from fastssl.packing import Layout


class SelfAttention(nn.Module):
    """Multi-head self-attention within each sequence (arXiv 1706.03762, section 3.2), with `ops.varlen_attention`.

    Example:
        >>> import torch
        >>> from fastssl import Layout
        >>> from fastssl.nn import SelfAttention
        >>> attention = SelfAttention(64, 4, dropout=0.1)
        >>> layout = Layout.from_lengths([300, 40])
        >>> attention(torch.randn(340, 64), layout).shape
        torch.Size([340, 64])

    Args:
        width: D, the number of channels of a frame, split evenly over the heads.
        heads: H, the number of heads.
        dropout: Dropout probability of the attention weights in training.

    Raises:
        ValueError: `heads` does not divide `width`.
    """

    def __init__(self, width: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: must divide the width of {width}, got {heads}")
        self.num_heads = heads
        self.dropout = dropout
        self.q_proj = PackedLinear(width, width)
        self.k_proj = PackedLinear(width, width)
        self.v_proj = PackedLinear(width, width)
        self.out_proj = PackedLinear(width, width)

    def forward(self, x: Tensor, layout: Layout, distance_bias: Tensor | None = None) -> Tensor:
        """Let each frame attend to all frames of its own sequence.

        Args:
            x: (N, D) packed frames.
            layout: Where each sequence begins.
            distance_bias: (H, 2R + 1) bias of the logits, indexed by key position minus query position plus R; see
                `ops.varlen_attention`.

        Returns:
            (N, D) in the dtype of `x`, or in autocast's dtype under autocast.
        """
        projected = functional.queries_keys_values(self, x)
        gate = None if distance_bias is None else self.gate(x)
        attended = functional.attend(self, projected, layout, distance_bias=distance_bias, gate=gate)
        return functional.linear(self.out_proj, attended)

    def gate(self, x: Tensor) -> Tensor | None:  # (N, D) -> (N, H)
        """Return the factor of the distance bias for each query and head; None means 1."""
        return None


class GatedSelfAttention(SelfAttention):
    """Self-attention with the gated relative position bias of WavLM (arXiv 2110.13900, section III-B).

    Args:
        width: D, the number of channels of a frame, split evenly over the heads.
        heads: H, the number of heads.
        dropout: Dropout probability of the attention weights in training.
        embedding: The table of biases by distance. The layers of a stack share one table. The first layer owns it; the
            other layers get None here, and `forward` gets the biases as `distance_bias`.
    """

    def __init__(
        self, width: int, heads: int, *, dropout: float, embedding: "RelativePositionEmbedding | None" = None
    ) -> None:
        super().__init__(width, heads, dropout=dropout)
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, heads, 1, 1))
        self.gru_rel_pos_linear = PackedLinear(width // heads, 8)
        if embedding is not None:
            self.rel_attn_embed = embedding

    def gate(self, x: Tensor) -> Tensor:  # (N, D) -> (N, H)
        """Compute the factor of each query and head from the query's own frame; see `functional.gate`."""
        return functional.gate(self, x)


class RelativePositionEmbedding(nn.Embedding):
    """A learned bias for each head and bucket of distances, with the buckets of T5 (arXiv 1910.10683).

    Short distances have a bucket each. The buckets of longer distances widen logarithmically.

    Args:
        buckets: Number of buckets, at least 4. Half of them are for keys after the query, the other half for the query
            itself and keys before it.
        heads: H, the number of heads.
        max_distance: R. All distances of R frames or more share a bucket. Must be above `buckets` / 4.
    """

    def __init__(self, buckets: int, heads: int, *, max_distance: int) -> None:
        super().__init__(buckets, heads)
        half = buckets // 2
        exact = half // 2
        distances = torch.arange(-max_distance, max_distance + 1, device="cpu")
        size = distances.abs()
        # Compute in fp32, on the host and in this order: rounding decides the bucket of a distance at a boundary.
        shares = torch.log(size.float() / exact) / math.log(max_distance / exact) * (half - exact)
        logarithmic = (exact + shares.clamp(min=0)).long().clamp(max=half - 1)
        bucket = torch.where(size < exact, size, logarithmic) + (distances > 0) * half
        self.register_buffer("_bucket_by_distance", bucket, persistent=False)

    def by_distance(self) -> Tensor:  # (H, 2R + 1)
        """Return the bias of each head for each distance (key position minus query position) from -R to R."""
        bias: Tensor = self(self._bucket_by_distance)
        return bias.t().contiguous()  # because every layer's op would copy it otherwise
