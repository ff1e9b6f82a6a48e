"""The public function of `gumbel_quantize`, its operators and its checks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl.kernels.autograd import once_differentiable
from fastssl.kernels.dispatch import Op, autocast_off, contiguous
from fastssl.kernels.gumbel_quantize import reference


class GumbelQuantized(NamedTuple):
    """Result of `gumbel_quantize` for M frames and G groups of V codes with E channels each.

    Attributes:
        values: (M, G * E) the chosen codevectors, in their own dtype; a row with NaN may get NaN instead.
        codes: (M, G) int64, the chosen code of each group; the first NaN of a row that contains NaN.
        probability_sums: (G, V) softmax of the logits without noise, summed over the frames: fp32, or fp64 if an
            argument is fp64.
        counts: (G, V) int64, the number of frames that chose each code.
    """

    values: Tensor  # (M, G * E)
    codes: Tensor  # (M, G)
    probability_sums: Tensor  # (G, V)
    counts: Tensor  # (G, V)


def _accumulator(logits: Tensor, codevectors: Tensor) -> torch.dtype:
    """Return the dtype of the sums: fp32, or fp64 if an argument is fp64."""
    return torch.promote_types(torch.promote_types(logits.dtype, codevectors.dtype), torch.float32)


def _fake_forward(
    logits: Tensor,  # (M, G, V)
    codevectors: Tensor,  # (G, V, E)
    noise: Tensor | None,  # (M, G, V)
    seeds: Tensor | None,  # (M,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # the fields of `GumbelQuantized`
    frames, groups, codes = logits.shape
    return (
        codevectors.new_empty((frames, groups * codevectors.shape[2])),
        logits.new_empty((frames, groups), dtype=torch.int64),
        logits.new_empty((groups, codes), dtype=_accumulator(logits, codevectors)),
        logits.new_empty((groups, codes), dtype=torch.int64),
    )


def _fake_backward(
    grad_values: Tensor,  # (M, G * E)
    grad_probability_sums: Tensor,  # (G, V)
    logits: Tensor,
    codevectors: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    codes: Tensor,  # (M, G)
    temperature: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), torch.empty_like(codevectors)


_OP = Op(
    "gumbel_quantize",
    _fake_forward,
    _fake_backward,
    triton_kernels="fastssl.kernels.gumbel_quantize.triton_kernel",
)


class _GumbelQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, temperature: float, *inputs: Any) -> Any:  # inputs as in `_fake_forward`
        inputs = contiguous(inputs)
        values, codes, probability_sums, counts = _OP.forward[backend](*inputs)
        ctx.save_for_backward(*inputs, codes)
        ctx.mark_non_differentiable(codes, counts)
        ctx.settings = backend, temperature
        return values, codes, probability_sums, counts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_values: Tensor, _grad_codes: None, grad_probability_sums: Tensor, _grad_counts: None
    ) -> tuple[Tensor | None, ...]:
        backend, temperature = ctx.settings
        grads = contiguous((grad_values, grad_probability_sums))
        return None, None, *_OP.backward[backend](*grads, *contiguous(ctx.saved_tensors), temperature), None, None


def gumbel_quantize(
    logits: Tensor,  # (M, G, V)
    codevectors: Tensor,  # (G, V, E)
    *,
    noise: Tensor | None = None,  # (M, G, V)
    seeds: Tensor | None = None,  # (M,)
    temperature: float = 1.0,
    backend: str | None = None,
) -> GumbelQuantized:
    """Quantise by a straight-through Gumbel softmax over G codebooks (wav2vec 2.0, arXiv 2006.11477, equation 1).

    Each group chooses the code with the largest sum of logit and noise (the lowest code if several are equal), and
    outputs a copy of its vector. The gradient is computed as if the output were the mean of all vectors, weighted by
    softmax((logits + noise) / temperature). Without `noise` and `seeds` there is no noise.

    Args:
        logits: (M, G, V) logits of any floating dtype.
        codevectors: (G, V, E) vectors of any floating dtype.
        noise: (M, G, V) noise of any floating dtype, added to the logits; it receives no gradient.
        seeds: (M,) int64 seeds of standard Gumbel noise, which the kernel draws instead of reading `noise`. Code v of
            group g gets number g * V + v of SplitMix64 for the seed of its frame (`nn.random.noise_seeds`).
        temperature: Temperature of the softmax that the gradient passes through, above 0.
        backend: Implementation to run, see `fastssl.ops`; None picks the fastest available.

    Returns:
        The chosen vectors, the chosen codes, and two sums over the frames. The first sums softmax(logits) and has a
        gradient; the second counts how often each code was chosen. Sums are computed in fp32 (fp64 if an argument is
        fp64). Autocast does not change this op.

    Raises:
        ValueError: A shape, dtype or option is invalid, or `backend` cannot run this call.
    """
    _check(logits, codevectors, noise, seeds, temperature)
    accumulator = _accumulator(logits, codevectors)
    unsupported = {"triton": "Triton cannot multiply float64 matrices" if accumulator == torch.float64 else None}
    chosen = _OP.choose(logits, backend, unsupported)
    noise = None if noise is None else noise.detach()
    with autocast_off(logits):
        if chosen == "reference":
            return GumbelQuantized(
                *reference.gumbel_quantize(logits, codevectors, noise, seeds, temperature=temperature)
            )
        noise = None if noise is None else noise.to(accumulator)
        outputs = _GumbelQuantize.apply(chosen, temperature, logits, codevectors, noise, seeds)
    return GumbelQuantized(*outputs)


def _check(logits: Tensor, codevectors: Tensor, noise: Tensor | None, seeds: Tensor | None, temperature: float) -> None:
    if logits.dim() != 3 or logits.shape[2] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits: expected (M, G, V) floating point, got {tuple(logits.shape)} {logits.dtype}")
    frames, groups, codes = logits.shape
    if codevectors.dim() != 3 or codevectors.shape[:2] != (groups, codes) or not codevectors.is_floating_point():
        raise ValueError(
            f"codevectors: expected ({groups}, {codes}, E) floating point for these logits,"
            f" got {tuple(codevectors.shape)} {codevectors.dtype}"
        )
    if noise is not None and seeds is not None:
        raise ValueError("noise and seeds: give at most one of the two")
    if noise is not None and (noise.shape != logits.shape or not noise.is_floating_point()):
        raise ValueError(f"noise: expected float {tuple(logits.shape)}, got {tuple(noise.shape)} {noise.dtype}")
    if seeds is not None and (seeds.shape != (frames,) or seeds.dtype != torch.int64):
        raise ValueError(f"seeds: expected ({frames},) torch.int64, got {tuple(seeds.shape)} {seeds.dtype}")
    for name, tensor in (("codevectors", codevectors), ("noise", noise), ("seeds", seeds)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name}: is on {tensor.device}, must be on {logits.device} like logits")
    if not temperature > 0:
        raise ValueError(f"temperature: must be above 0, got {temperature}")
