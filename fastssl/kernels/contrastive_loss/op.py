"""The public function of `contrastive_loss`, its operators and its checks."""

from typing import Any

import torch
from torch import Tensor

from fastssl.kernels.autograd import once_differentiable
from fastssl.kernels.contrastive_loss import reference
from fastssl.kernels.dispatch import Op, autocast_off, contiguous


def _fake_forward(
    context: Tensor,  # (N, D)
    targets: Tensor,  # (N, D)
    negatives: Tensor,  # (N, K)
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    frames, count = negatives.shape
    loss = context.new_empty(frames, dtype=torch.promote_types(context.dtype, torch.float32))
    return loss, context.new_empty(frames, dtype=torch.bool), loss.new_empty((frames, count + 1))


def _fake_backward(
    grad_loss: Tensor,  # (N,)
    context: Tensor,
    targets: Tensor,
    negatives: Tensor,
    loss: Tensor,  # (N,)
    logits: Tensor,  # (N, K + 1)
    temperature: float,
) -> tuple[Tensor, Tensor]:
    return context.new_empty(context.shape), targets.new_empty(targets.shape)


_OP = Op(
    "contrastive_loss",
    _fake_forward,
    _fake_backward,
    triton_kernels="fastssl.kernels.contrastive_loss.triton_kernel",
)


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *inputs: Any) -> tuple[Tensor, Tensor]:  # inputs as in `_fake_forward`
        *tensors, temperature = inputs = contiguous(inputs)
        loss, correct, logits = _OP.forward[backend](*inputs)
        ctx.save_for_backward(*tensors, loss, logits)
        ctx.mark_non_differentiable(correct)
        ctx.settings = backend, temperature
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_correct: Tensor) -> tuple[Tensor | None, ...]:
        backend, temperature = ctx.settings
        grads = _OP.backward[backend](grad_loss.contiguous(), *contiguous(ctx.saved_tensors), temperature)
        return None, *grads, None, None


def contrastive_loss(
    context: Tensor,  # (N, D)
    targets: Tensor,  # (N, D)
    negatives: Tensor,  # (N, K)
    *,
    temperature: float = 0.1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Compute each masked frame's contrastive loss against K negatives (wav2vec 2.0, arXiv 2006.11477, equation 3).

    The logits of frame n are the cosine similarities of context[n] with targets[n] and with targets[negatives[n]],
    divided by the temperature. Its loss is the logsumexp of the logits minus the first logit. A negative is ignored if
    it is -1, or if its target equals targets[n] in every element, as in fairseq and Transformers.

    Args:
        context: (N, D) encoder outputs at the masked frames.
        targets: (N, D) quantised features of the same frames, in the dtype of `context`.
        negatives: (N, K) int32 or int64 row numbers in `targets`; they may repeat, and -1 means no negative. Their
            range is checked on the CPU only, because on a GPU the check would make the host wait.
        temperature: Divisor of the cosine similarities, above 0.
        backend: Implementation to run, see `fastssl.ops`; None picks the fastest available.

    Returns:
        The loss of each frame, (N,) fp32 (fp64 for fp64 input), and (N,) bool, True if its own target scored highest.
        The target scored highest if no negative that is not ignored scored higher, and at least one scored lower. If
        all negatives are ignored, the loss is 0 and the bool is False. Autocast does not change this op.

    Raises:
        ValueError: A shape, dtype or option is invalid, or `backend` cannot run this call.
    """
    _check(context, targets, negatives, temperature)
    unsupported = {"triton": "its kernels compute in float32" if context.dtype == torch.float64 else None}
    chosen = _OP.choose(context, backend, unsupported)
    with autocast_off(context):
        if chosen != "native":  # the native kernel checks row numbers as it reads them
            _check_rows(negatives)
        if chosen == "reference":
            return reference.contrastive_loss(context, targets, negatives, temperature=temperature)
        try:
            loss, correct = _ContrastiveLoss.apply(chosen, context, targets, negatives, temperature)
        except RuntimeError:
            _check_rows(negatives)  # if a row number was invalid, raise an error that gives the range
            raise
    return loss, correct


def _check(context: Tensor, targets: Tensor, negatives: Tensor, temperature: float) -> None:
    if context.dim() != 2:
        raise ValueError(f"context: expected (N, D), got {tuple(context.shape)}")
    if targets.shape != context.shape or targets.dtype != context.dtype:
        raise ValueError(
            f"targets: expected {tuple(context.shape)} {context.dtype} like context,"
            f" got {tuple(targets.shape)} {targets.dtype}"
        )
    if negatives.dim() != 2 or len(negatives) != len(context) or negatives.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"negatives: expected ({len(context)}, K) torch.int32 or torch.int64,"
            f" got {tuple(negatives.shape)} {negatives.dtype}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: must be above 0, got {temperature}")


def _check_rows(negatives: Tensor) -> None:
    """Raise if a row number is out of range; do nothing on a GPU or inside `torch.compile`."""
    # Reading the values would break a graph in `torch.compile`, and make the host wait for a GPU.
    if negatives.device.type == "cpu" and negatives.numel() > 0 and not torch.compiler.is_compiling():
        lowest, highest = (int(bound) for bound in negatives.aminmax())
        if lowest < -1 or highest >= len(negatives):
            raise ValueError(f"negatives: must be from -1 to {len(negatives) - 1}, got {lowest} to {highest}")
