"""Product quantisation with a straight-through Gumbel softmax."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.nn.linear import PackedLinear


class Quantized(NamedTuple):
    """What the quantiser returns for M frames, G groups of V codes."""

    values: Tensor  # (M, width)
    codes: Tensor  # (M, G) int64, the chosen code of each group
    probabilities: Tensor  # (M, G, V) fp32, softmax without noise


class GumbelQuantizer(nn.Module):
    """Chooses one of V codes in each of G groups (wav2vec 2.0, arXiv 2006.11477, section 2, equation 1).

    Args:
        c_in: Channels of the frames to quantise.
        groups: G.
        codes: V, per group.
        width: Width of the quantised vector, split evenly over the groups.

    Raises:
        ValueError: The groups do not divide the width.
    """

    def __init__(self, c_in: int, *, groups: int, codes: int, width: int) -> None:
        super().__init__()
        if width % groups:
            raise ValueError(f"width: {width} is not divisible by {groups} groups")
        self.groups = groups
        self.codes = codes
        self.codevectors = nn.Parameter(torch.rand(1, groups * codes, width // groups))
        self.weight_proj = PackedLinear(c_in, groups * codes)
        nn.init.normal_(self.weight_proj.weight, std=1.0)
        nn.init.zeros_(self.weight_proj.bias)

    def forward(self, x: Tensor, *, temperature: float = 1.0, noise: Tensor | None = None) -> Quantized:
        """Quantise frames; the gradient passes through the softmax at `temperature`.

        Args:
            x: (M, c_in).
            temperature: Of the softmax that carries the gradient.
            noise: (M, G * V) Gumbel noise added to the logits, None for none (the likeliest code is taken).
        """
        logits = self.weight_proj(x).unflatten(1, (self.groups, self.codes)).float()
        noisy = logits if noise is None else logits + noise.view_as(logits)
        soft = F.softmax(noisy / temperature, dim=-1)
        chosen = noisy.argmax(-1)
        hard = F.one_hot(chosen, self.codes).to(soft.dtype)
        # In this order the sum is exactly one-hot, so equal codes give equal vectors to the last bit.
        weights = hard + (soft - soft.detach())
        codevectors = self.codevectors.view(self.groups, self.codes, -1)
        values = torch.einsum("mgv,gvd->mgd", weights.to(codevectors.dtype), codevectors).flatten(1)
        return Quantized(values, chosen, F.softmax(logits, dim=-1))
