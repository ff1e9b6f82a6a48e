"""A linear layer whose rows do not depend on how many other rows there are."""

import torch.nn.functional as F
from torch import Tensor, nn

# MKL computes a row of an fp32 product with the same bits for any matrix of at least 12 rows, and with others below.
_STABLE_ROWS = 12


class PackedLinear(nn.Linear):
    """`torch.nn.Linear` over packed frames (N, D); on the CPU a frame's bits are the same in any batch."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features)."""
        rows = input.shape[0]
        if rows >= _STABLE_ROWS or input.device.type != "cpu":
            return super().forward(input)
        padded = F.pad(input, (0, 0, 0, _STABLE_ROWS - rows))
        return F.linear(padded, self.weight, self.bias)[:rows]
