"""Multi-head self-attention over packed sequences."""

import math

import torch
from torch import Tensor, nn

from fastssl.nn import functional
from fastssl.nn.linear import PackedLinear
from fastssl.packing import Layout


class SelfAttention(nn.Module):
    """Self-attention within each sequence, by `ops.varlen_attention`.

    Example:
        >>> import torch
        >>> from fastssl import Layout
        >>> from fastssl.nn import SelfAttention
        >>> attention = SelfAttention(64, 4, dropout=0.1)
        >>> layout = Layout.from_lengths([300, 40])
        >>> attention(torch.randn(340, 64), layout).shape
        torch.Size([340, 64])

    Args:
        width: D, split evenly over the heads.
        heads: H.
        dropout: On the attention probabilities, in training.

    Raises:
        ValueError: The heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: {heads} do not divide a width of {width}")
        self.num_heads = heads
        self.dropout = dropout
        self.q_proj = PackedLinear(width, width)
        self.k_proj = PackedLinear(width, width)
        self.v_proj = PackedLinear(width, width)
        self.out_proj = PackedLinear(width, width)

    def forward(self, x: Tensor, layout: Layout, distance_bias: Tensor | None = None) -> Tensor:
        """Frames that have seen their whole sequence.

        Args:
            x: (N, D).
            layout: Where each sequence begins.
            distance_bias: (H, 2R + 1) added to the logits by key position minus query position, see
                `ops.varlen_attention`.
        """
        projected = functional.queries_keys_values(self, x)
        gate = None if distance_bias is None else self.gate(x)
        attended = functional.attend(self, projected, layout, distance_bias=distance_bias, gate=gate)
        return functional.linear(self.out_proj, attended)

    def gate(self, x: Tensor) -> Tensor | None:  # (N, D) -> (N, H)
        """The factor on a query's distance bias; None is 1."""
        return None


class GatedSelfAttention(SelfAttention):
    """Self-attention with WavLM's gated relative position bias (arXiv 2110.13900, section III-B).

    Args:
        width: D, split evenly over the heads.
        heads: H.
        dropout: On the attention probabilities, in training.
        embedding: The bias by bucket of distance, in the one layer of a stack that has it for all, else None.
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
        """A factor for each query and head, from the query's own frame."""
        return functional.gate(self, x)


class RelativePositionEmbedding(nn.Embedding):
    """A bias per head and bucket of distance: T5's buckets (arXiv 1910.10683), exact near by, logarithmic further off.

    Args:
        buckets: Half of them for keys behind the query, half for keys before it or at it; at least 4.
        heads: H.
        max_distance: R; all distances from here on share a bucket. Above a quarter of the buckets.
    """

    def __init__(self, buckets: int, heads: int, *, max_distance: int) -> None:
        super().__init__(buckets, heads)
        half = buckets // 2
        exact = half // 2
        distances = torch.arange(-max_distance, max_distance + 1, device="cpu")
        size = distances.abs()
        # The operations, in this order, in fp32 and on the host, decide into which bucket a distance at a border falls.
        shares = torch.log(size.float() / exact) / math.log(max_distance / exact) * (half - exact)
        logarithmic = (exact + shares.clamp(min=0)).long().clamp(max=half - 1)
        bucket = torch.where(size < exact, size, logarithmic) + (distances > 0) * half
        self.register_buffer("_bucket_by_distance", bucket, persistent=False)

    def by_distance(self) -> Tensor:  # (H, 2R + 1)
        """The bias of every distance from -R to R, key position minus query position."""
        bias: Tensor = self(self._bucket_by_distance)
        return bias.t()
