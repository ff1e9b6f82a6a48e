"""The public function of `integrate_and_fire`, its operators and its checks."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastssl.kernels.dispatch import NATIVE, Op, autocast_off, contiguous, define_operator
from fastssl.kernels.integrate_and_fire import reference
from fastssl.packing import Layout


def _fake_scan(weights: Tensor, cu_seqlens: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    sequences = cu_seqlens.shape[0] - 1  # positions, and how many frames each utterance fires
    return weights.new_empty(weights.shape, dtype=torch.float64), weights.new_empty(sequences, dtype=torch.float64)


def _fake_forward(
    x: Tensor,  # (N, C)
    positions: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (B + 1,)
    cu_seqlens_out: Tensor,  # (B + 1,)
    total_out: int,
    threshold: float,
) -> Tensor:
    return x.new_empty((total_out, x.shape[1]))


def _fake_backward(
    grad_out: Tensor, x: Tensor, positions: Tensor, cu_seqlens: Tensor, cu_seqlens_out: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(positions)


_OP = Op("integrate_and_fire", _fake_forward, _fake_backward)
_scan = define_operator(NATIVE, "integrate_and_fire_scan", _fake_scan)


class _IntegrateAndFire(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, *inputs: Any) -> Any:  # (N,), then as in `_fake_forward`
        *tensors, _, threshold = inputs = contiguous(inputs)
        ctx.save_for_backward(*tensors)
        ctx.settings = threshold, weights.dtype
        return _OP.forward["native"](*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        threshold, dtype = ctx.settings
        grad_x, grad_weights = _OP.backward["native"](*contiguous(grads), *ctx.saved_tensors, threshold)
        return grad_weights.to(dtype), grad_x, *(None,) * 5


def integrate_and_fire(
    x: Tensor,  # (N, C)
    weights: Tensor,  # (N,)
    layout: Layout,
    *,
    threshold: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Layout]:  # (N_out, C)
    """Continuous integrate-and-fire (CIF, arXiv 1905.11235, section 3; for sequence compression arXiv 2211.02332).

    With S_t the sum of an utterance's weights up to frame t, frame t occupies [S_{t-1}, S_t) and output frame j
    collects [j * threshold, (j + 1) * threshold): out_j is the sum of x_t times the overlap of the two, so the weights
    inside each output frame add up to `threshold`. What an utterance has left over at its end is dropped. Nothing
    crosses the border between utterances. Where S_t falls on a slot's border, its gradient is that of the later slot.

    The output length depends on data: the call waits for the device once, to read it.

    Args:
        x: (N, C) packed frames.
        weights: (N,) finite and not negative, of any floating dtype; a weight above `threshold` fires several times.
        layout: Where each utterance of `x` begins.
        threshold: Weight that makes one output frame, more than 0.
        backend: See `fastssl.ops`; None takes the fastest there is.

    Returns:
        (N_out, C) in the dtype of `x`, and its layout: floor(S_T / threshold) frames of each utterance, possibly none.
        Sums are in fp32 (fp64 for fp64 input), S in fp64. Autocast does not change this op.

    Raises:
        ValueError: Shapes or dtypes do not fit, `weights` holds a negative number, NaN or infinity, or `backend` cannot
            serve the call.
    """
    _check(x, weights, layout, threshold)
    chosen = _OP.choose(x, backend)
    with autocast_off(x):
        if chosen == "reference":
            positions = reference.fire_positions(weights, layout, threshold)
            layout_out = _layout_after_firing(reference.fired(positions, weights, layout))
            return reference.integrate_and_fire(x, positions, layout, layout_out, threshold=threshold), layout_out
        positions, fired = _scan(*contiguous((weights.detach(), layout.cu_seqlens, threshold)))
        layout_out = _layout_after_firing(fired)
        out = fire(x, weights, positions, layout, layout_out, threshold=threshold)
    return out, layout_out


def fire(
    x: Tensor,  # (N, C)
    weights: Tensor,  # (N,)
    positions: Tensor,  # (N,)
    layout: Layout,
    layout_out: Layout,
    *,
    threshold: float,
) -> Tensor:  # (N_out, C)
    """The compiled kernels with their gradient, below the computation of the output length.

    Args:
        x: (N, C) packed frames.
        weights: (N,), which takes the gradient; its values are not read.
        positions: (N,) float64 without gradient, from `reference.fire_positions`.
        layout: Where each utterance of `x` begins.
        layout_out: Where each utterance of the output begins.
        threshold: Weight that makes one output frame.
    """
    out: Tensor = _IntegrateAndFire.apply(
        weights, x, positions, layout.cu_seqlens, layout_out.cu_seqlens, layout_out.total, threshold
    )
    return out


def _layout_after_firing(fired: Tensor) -> Layout:
    """Layout of as many frames as each utterance gives; reading them is the one time that the device is waited for."""
    counts = fired.tolist()
    if any(math.isnan(count) for count in counts):
        raise ValueError("weights: must be finite and not negative")
    if sum(counts) > torch.iinfo(torch.int32).max:
        raise ValueError(f"weights: would fire {sum(counts):.3g} output frames")
    lengths = tuple(int(count) for count in counts)
    return Layout.from_device(lengths, fired)


def _check(x: Tensor, weights: Tensor, layout: Layout, threshold: float) -> None:
    if x.dim() != 2 or x.shape[0] != layout.total:
        raise ValueError(f"x: expected ({layout.total}, C) for this layout, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: must be floating point, got {x.dtype}")
    if weights.shape != x.shape[:1]:
        raise ValueError(f"weights: expected ({layout.total},), got {tuple(weights.shape)}")
    if not weights.is_floating_point():
        raise ValueError(f"weights: must be floating point, got {weights.dtype}")
    if weights.device != x.device or layout.cu_seqlens.device != x.device:
        raise ValueError(f"weights and layout: must be on {x.device} like x")
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold: must be positive and finite, got {threshold}")
