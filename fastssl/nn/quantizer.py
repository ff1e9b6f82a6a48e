"""Product quantisation with a straight-through Gumbel softmax, as in wav2vec 2.0."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.nn.linear import PackedLinear


class Quantized(NamedTuple):
    """Result of `GumbelQuantizer` for M frames and G groups of V codes.

    Attributes:
        values: (M, width) the chosen vectors.
        codes: (M, G) int64, the chosen code of each group.
        probability_sums: (G, V) softmax of the logits without noise, summed over the frames.
        counts: (G, V) int64, the number of frames that chose each code.
        plain_counts: (G, V) int64, the number of frames that would have chosen each code without noise.
    """

    values: Tensor  # (M, width)
    codes: Tensor  # (M, G)
    probability_sums: Tensor  # (G, V)
    counts: Tensor  # (G, V)
    plain_counts: Tensor  # (G, V)


class GumbelQuantizer(nn.Module):
    """Chooses one of V codes in each of G groups (wav2vec 2.0, arXiv 2006.11477, section 2, equation 1).

    Args:
        c_in: Number of channels of the frames to quantise.
        groups: G, the number of groups.
        codes: V, the number of codes per group.
        width: Number of channels of the quantised vector, split evenly over the groups.

    Raises:
        ValueError: `groups` does not divide `width`.
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
    ) -> Quantized:
        """Quantise frames. The gradient passes through the softmax of the noisy logits divided by `temperature`.

        Without `noise` and `seeds`, the code with the largest logit is chosen.

        Args:
            x: (M, c_in) frames.
            temperature: Temperature of the softmax that the gradient passes through; does not affect the choice.
            noise: (M, G * V) Gumbel noise that is added to the logits.
            seeds: (M,) int64 seeds of the noise, instead of `noise`; see `ops.gumbel_quantize`.

        Returns:
            The quantised vectors (M, width), the codes (M, G) and their statistics.
        """
        shape = (self.groups, self.codes)
        logits = self.weight_proj(x).unflatten(1, shape)
        quantized = ops.gumbel_quantize(
            logits,
            self.codevectors.view(*shape, -1),
            noise=None if noise is None else noise.unflatten(1, shape),
            seeds=seeds,
            temperature=temperature,
        )
        plain_counts = quantized.counts
        if noise is not None or seeds is not None:
            largest = logits.detach().argmax(2, keepdim=True)
            plain_counts = (largest == torch.arange(self.codes, device=largest.device)).sum(0)
        return Quantized(*quantized, plain_counts)
