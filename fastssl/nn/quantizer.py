"""Product quantisation with a straight-through Gumbel softmax."""

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.kernels.gumbel_quantize.op import GumbelQuantized
from fastssl.nn.linear import PackedLinear


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

    def forward(
        self, x: Tensor, *, temperature: float = 1.0, noise: Tensor | None = None, seeds: Tensor | None = None
    ) -> GumbelQuantized:
        """Quantise frames; the gradient passes through the softmax at `temperature`.

        Args:
            x: (M, c_in).
            temperature: Of the softmax that carries the gradient.
            noise: (M, G * V) Gumbel noise added to the logits.
            seeds: (M,) int64 from which it is drawn instead, see `ops.gumbel_quantize`. With neither, the likeliest
                code is taken.
        """
        shape = (self.groups, self.codes)
        return ops.gumbel_quantize(
            self.weight_proj(x).unflatten(1, shape),
            self.codevectors.view(*shape, -1),
            noise=None if noise is None else noise.unflatten(1, shape),
            seeds=seeds,
            temperature=temperature,
        )
