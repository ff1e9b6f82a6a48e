"""Hidden states that are returned and that later layers depend on, as in the originals.

Code that asks for the gradient of a hidden state (`retain_grad`, `torch.autograd.grad`) needs a tensor that the outputs
are computed from. A padded copy of packed frames is not: nothing depends on it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastssl.kernels.autograd import is_transformed, once_differentiable

Pad = Callable[[Tensor], Tensor]  # (N, D) -> (B, F, D)


class ShownStates:
    """Padded hidden states of one forward pass.

    Args:
        pad: Function that pads packed frames.
    """

    def __init__(self, pad: Pad) -> None:
        self._pad = pad
        self._shown: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the packed frames, which are kept

    def through(self, values: Tensor) -> Tensor:  # (N, D) -> (N, D)
        """Return the same frames, computed from their padded copy, for whatever comes next."""
        if not (values.requires_grad and torch.is_grad_enabled()) or is_transformed():
            return values
        padded = self._pad(values)
        self._shown[id(values)] = values, padded
        return _Unpadded.apply(padded, self._pad, [values.detach()])  # type: ignore[no-any-return]

    def padded(self, values: Tensor) -> Tensor:  # (N, D) -> (B, F, D)
        """Return the padded copy of frames."""
        known = self._shown.get(id(values))
        return self._pad(values) if known is None else known[1]


class _Unpadded(torch.autograd.Function):
    """The packed frames that a padded batch was made from; its gradient is theirs, padded with zeros."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, pad: Pad, packed: list[Tensor]) -> Tensor:
        ctx.pad = pad
        return packed[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.pad(grad), None, None
