"""The public function of `integrate_and_fire`, its operators and its checks."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl.kernels.autograd import once_differentiable
from fastssl.kernels.dispatch import NATIVE, Op, autocast_off, contiguous, define_operator
from fastssl.kernels.integrate_and_fire import reference
from fastssl.packing import Layout


def _fake_scan(weights: Tensor, cu_seqlens: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return empty results of the scan: positions (N,), and the number of output frames of each utterance (B,)."""
    sequences = cu_seqlens.shape[0] - 1
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


class Fired(NamedTuple):
    """Result of `integrate`.

    Attributes:
        frames: (N_out, C) output frames in the dtype of the input.
        layout: Where each utterance of `frames` begins.
        positions: (N,) float64 without gradient, where each input frame ends, in output frames.
    """

    frames: Tensor  # (N_out, C)
    layout: Layout
    positions: Tensor  # (N,)


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
        grad_x, grad_weights = _OP.backward["native"](*contiguous(grads), *contiguous(ctx.saved_tensors), threshold)
        return grad_weights.to(dtype), grad_x, *(None,) * 5


def integrate_and_fire(
    x: Tensor,  # (N, C)
    weights: Tensor,  # (N,)
    layout: Layout,
    *,
    threshold: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Layout]:  # (N_out, C)
    """Apply continuous integrate-and-fire (CIF, arXiv 1905.11235, section 3; to compress sequences: arXiv 2211.02332).

    Let S_t be the sum of an utterance's weights up to frame t. Frame t occupies the interval [S_{t-1}, S_t), and output
    frame j the interval [j * threshold, (j + 1) * threshold). Output frame j is the sum over t of x_t times the overlap
    of the two intervals, so the weights within each output frame add up to `threshold`. A remainder below `threshold`
    at the end of an utterance is dropped, and utterances never mix. If S_t is exactly on a border between two output
    frames, its gradient is taken from the later one.

    The output lengths depend on the weights, so the host waits for the device once to read them.

    Args:
        x: (N, C) packed frames.
        weights: (N,) weights of any floating dtype, finite and at least 0. One weight can fill several output frames.
        layout: Where each utterance of `x` begins.
        threshold: Sum of the weights in one output frame, above 0.
        backend: Implementation to run, see `fastssl.ops`; None picks the fastest available.

    Returns:
        (N_out, C) in the dtype of `x`, and its layout: floor(S_T / threshold) frames per utterance, possibly none.
        Sums over frames are computed in fp32 (fp64 for fp64 input), S in fp64. Autocast does not change this op.

    Raises:
        ValueError: A shape, dtype or option is invalid, `weights` contains a negative number, NaN or infinity, or
            `backend` cannot run this call.
    """
    frames, layout_out, _ = integrate(x, weights, layout, threshold=threshold, backend=backend)
    return frames, layout_out


def integrate(
    x: Tensor,  # (N, C)
    weights: Tensor,  # (N,)
    layout: Layout,
    *,
    threshold: float = 1.0,
    backend: str | None = None,
) -> Fired:
    """Apply `integrate_and_fire`, and also return where each frame ends, for callers that need both.

    Args:
        x: As in `integrate_and_fire`.
        weights: As in `integrate_and_fire`.
        layout: As in `integrate_and_fire`.
        threshold: As in `integrate_and_fire`.
        backend: As in `integrate_and_fire`.

    Raises:
        ValueError: As in `integrate_and_fire`.
    """
    _check(x, weights, layout, threshold)
    chosen = _OP.choose(x, backend)
    with autocast_off(x):
        if chosen == "reference":
            positions = reference.fire_positions(weights, layout, threshold)
            layout_out = _layout_after_firing(reference.fired(positions, weights, layout))
            out = reference.integrate_and_fire(x, positions, layout, layout_out, threshold=threshold)
            return Fired(out, layout_out, positions.detach())
        positions, fired = _scan(*contiguous((weights.detach(), layout.cu_seqlens, threshold)))
        layout_out = _layout_after_firing(fired)
        out = fire(x, weights, positions, layout, layout_out, threshold=threshold)
    return Fired(out, layout_out, positions)


def fire(
    x: Tensor,  # (N, C)
    weights: Tensor,  # (N,)
    positions: Tensor,  # (N,)
    layout: Layout,
    layout_out: Layout,
    *,
    threshold: float,
) -> Tensor:  # (N_out, C)
    """Run the compiled kernels with autograd, once the layout of the output is known.

    Args:
        x: (N, C) packed frames.
        weights: (N,) weights, which receive the gradient; their values are not read.
        positions: (N,) float64 without gradient, from `reference.fire_positions`.
        layout: Where each utterance of `x` begins.
        layout_out: Where each utterance of the output begins.
        threshold: Sum of the weights in one output frame.

    Returns:
        (N_out, C) in the dtype of `x`.
    """
    out: Tensor = _IntegrateAndFire.apply(
        weights, x, positions, layout.cu_seqlens, layout_out.cu_seqlens, layout_out.total, threshold
    )
    return out


def _layout_after_firing(fired: Tensor) -> Layout:
    """Create the output's layout from the number of frames per utterance (B,), which the host waits for."""
    counts = fired.tolist()
    if any(math.isnan(count) for count in counts):
        raise ValueError("weights: must be finite and not negative")
    if sum(counts) > torch.iinfo(torch.int32).max:
        raise ValueError(f"weights: would fire {sum(counts):.3g} output frames, more than an int32 can count")
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
        raise ValueError(f"weights and layout: must both be on {x.device} like x")
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold: must be positive and finite, got {threshold}")
