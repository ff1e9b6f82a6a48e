"""Multi-head self-attention over packed sequences."""

from torch import Tensor, nn

from fastssl import ops
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
        self.heads = heads
        self.dropout = dropout
        self.q_proj = PackedLinear(width, width)
        self.k_proj = PackedLinear(width, width)
        self.v_proj = PackedLinear(width, width)
        self.out_proj = PackedLinear(width, width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:  # (N, D)
        """Frames (N, D) that have seen their whole sequence."""
        q, k, v = (linear(x).unflatten(1, (self.heads, -1)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        attended = ops.varlen_attention(q, k, v, layout, dropout_p=self.dropout if self.training else 0.0)
        out: Tensor = self.out_proj(attended.flatten(1))
        return out
