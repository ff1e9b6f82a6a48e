"""Triton kernels of `contrastive_loss`, which gather rows by number. README.md has the formulas.

Each program computes one frame (in the last kernel, one target), and no other program writes its results. So the
kernels need no atomics, and the bits of a frame do not depend on its batch. The candidates of a frame are its own
target, in column 0, and its negatives; the kernels treat them all alike.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

_EPS = tl.constexpr(1e-8)  # lower limit of the norms, as in torch.nn.functional.cosine_similarity
#: Sizes that change from batch to batch. Triton must not specialise on them, or it would recompile for new values.
_SIZES = ["frames"]


@triton.jit(do_not_specialize=_SIZES)
def _measure_rows_kernel(
    context_ptr,  # (N, D)
    targets_ptr,  # (N, D)
    scale_ptr,  # (2, N) output: 1 / max(norm, eps) of the rows of context and of targets
    hash_ptr,  # (N,) int32 output: equal for equal targets
    frames,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute 1 / norm of BLOCK_N rows of context and targets, and hashes of the target rows."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = rows.to(tl.int64)[:, None] * D
    context_squares = tl.zeros((BLOCK_N,), tl.float32)
    target_squares = tl.zeros((BLOCK_N,), tl.float32)
    hashes = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)[None, :]
        inside = (rows[:, None] < frames) & (columns < D)
        context = tl.load(context_ptr + begin + columns, mask=inside, other=0).to(tl.float32)
        target = tl.load(targets_ptr + begin + columns, mask=inside, other=0).to(tl.float32)
        context_squares += tl.sum(context * context, 1)
        target_squares += tl.sum(target * target, 1)
        bits = tl.where(target == 0, 0.0, target).to(tl.int32, bitcast=True)  # 0.0 and -0.0 are equal
        hashes += tl.sum((bits ^ (bits >> 15)) * (columns * 1640531526 + 1), 1)
    tl.store(scale_ptr + rows, 1 / tl.maximum(tl.sqrt(context_squares), _EPS), mask=rows < frames)
    tl.store(scale_ptr + frames + rows, 1 / tl.maximum(tl.sqrt(target_squares), _EPS), mask=rows < frames)
    tl.store(hash_ptr + rows, hashes, mask=rows < frames)


@triton.jit
def _candidates(negatives_ptr, frame, places, K: tl.constexpr):
    """Load the rows of a frame's candidates in targets, at some places: its own, then its negatives; -1 for none."""
    rows = tl.load(negatives_ptr + frame.to(tl.int64) * K + places - 1, mask=(places > 0) & (places <= K), other=-1)
    return tl.where(places == 0, frame, rows.to(tl.int32))


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    context_ptr,  # (N, D)
    targets_ptr,  # (N, D)
    negatives_ptr,  # (N, K)
    scale_ptr,  # (2, N)
    hash_ptr,  # (N,)
    loss_ptr,  # (N,)
    correct_ptr,  # (N,)
    logits_ptr,  # (N, K + 1)
    frames,
    inverse_temperature,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute logits, loss and correctness of one frame, with a running logsumexp over blocks of candidates."""
    frame = tl.program_id(0)
    own_begin = frame.to(tl.int64) * D
    own_scale = tl.load(scale_ptr + frame) * inverse_temperature
    positive = 0.0
    highest = -float("inf")
    exponentials = 0.0
    not_below = 0
    lower = 0
    for first in range(0, K + 1, BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        rows = _candidates(negatives_ptr, frame, places, K)
        left = rows >= 0
        begins = rows.to(tl.int64)[:, None] * D
        products = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for first_column in range(0, D, BLOCK_D):
            columns = first_column + tl.arange(0, BLOCK_D)
            context = tl.load(context_ptr + own_begin + columns, mask=columns < D, other=0).to(tl.float32)
            inside = left[:, None] & (columns < D)[None, :]
            tile = tl.load(targets_ptr + begins + columns[None, :], mask=inside, other=0).to(tl.float32)
            products += tile * context[None, :]
        scale = tl.load(scale_ptr + frames + rows, mask=left, other=0)
        logits = tl.sum(products, 1) * (own_scale * scale)

        # Rows can be equal only if their hashes are. In that rare case, compare all elements.
        same = left & (places > 0) & (tl.load(hash_ptr + rows, mask=left, other=0) == tl.load(hash_ptr + frame))
        if tl.sum(same.to(tl.int32)) > 0:
            differences = tl.zeros((BLOCK_K,), tl.int32)
            for first_column in range(0, D, BLOCK_D):
                columns = first_column + tl.arange(0, BLOCK_D)
                own = tl.load(targets_ptr + own_begin + columns, mask=columns < D, other=0).to(tl.float32)
                inside = same[:, None] & (columns < D)[None, :]
                tile = tl.load(targets_ptr + begins + columns[None, :], mask=inside, other=0).to(tl.float32)
                differences += tl.sum((inside & (tile != own[None, :])).to(tl.int32), 1)
            left = left & ((differences > 0) | ~same)
        logits = tl.where(left, logits, -float("inf"))
        tl.store(logits_ptr + frame.to(tl.int64) * (K + 1) + places, logits, mask=places <= K)

        positive += tl.sum(tl.where(places == 0, logits, 0.0))  # only the first tile has place 0
        higher = tl.maximum(highest, tl.max(logits))
        if higher > -float("inf"):
            exponentials = exponentials * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher))
        highest = higher
        negative = left & (places > 0)
        not_below += tl.sum((negative & ~(positive >= logits)).to(tl.int32))
        lower += tl.sum((negative & (positive > logits)).to(tl.int32))
    tl.store(loss_ptr + frame, tl.log(exponentials) + (highest - positive))
    tl.store(correct_ptr + frame, (not_below == 0) & (lower > 0))


@triton.jit(do_not_specialize=_SIZES)
def _backward_context_kernel(
    grad_loss_ptr,  # (N,)
    context_ptr,  # (N, D)
    targets_ptr,  # (N, D)
    negatives_ptr,  # (N, K)
    scale_ptr,  # (2, N)
    loss_ptr,  # (N,)
    logits_ptr,  # (N, K + 1)
    weights_ptr,  # (N, K + 1) output: gradient of the cosines
    grad_context_ptr,  # (N, D)
    frames,
    temperature,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradients of one frame's cosines and of BLOCK_D channels of its context row."""
    frame = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    logits_ptr += frame.to(tl.int64) * (K + 1)
    weights_ptr += frame.to(tl.int64) * (K + 1)
    log_sum = tl.load(logits_ptr) + tl.load(loss_ptr + frame)
    factor = tl.load(grad_loss_ptr + frame) / temperature
    sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    along = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, K + 1, BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        logits = tl.load(logits_ptr + places, mask=places <= K, other=-float("inf"))
        left = logits > -float("inf")
        weights = factor * (tl.exp(logits - log_sum) - tl.where(places == 0, 1.0, 0.0))
        weights = tl.where(left, weights, 0.0)
        if tl.program_id(1) == 0:
            tl.store(weights_ptr + places, weights, mask=places <= K)
        along += weights * tl.where(left, logits, 0.0) * temperature
        rows = _candidates(negatives_ptr, frame, places, K)
        inside = left[:, None] & (columns < D)[None, :]
        tile = tl.load(targets_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=inside, other=0)
        scale = tl.load(scale_ptr + frames + rows, mask=left, other=0)
        sums += (weights * scale)[:, None] * tile.to(tl.float32)
    _store_gradient(grad_context_ptr, context_ptr, tl.load(scale_ptr + frame), tl.sum(sums, 0), tl.sum(along), frame,
                    columns, D)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _backward_targets_kernel(
    context_ptr,  # (N, D)
    targets_ptr,  # (N, D)
    scale_ptr,  # (2, N)
    logits_ptr,  # (N, K + 1)
    weights_ptr,  # (N, K + 1)
    pairs_ptr,  # (N * (K + 1),) indices into the flattened logits, sorted by target
    begins_ptr,  # (N + 1,) where the indices of each target begin
    grad_targets_ptr,  # (N, D)
    frames,
    temperature,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradient of BLOCK_D channels of a target: a sum over the frames that have it as a candidate."""
    target = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(begins_ptr + target + 1)
    sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    along = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(tl.load(begins_ptr + target), end, BLOCK_K):
        numbers = first + tl.arange(0, BLOCK_K)
        left = numbers < end
        places = tl.load(pairs_ptr + numbers, mask=left, other=0).to(tl.int32)  # division is much faster in 32 bits
        rows = places // (K + 1)
        weights = tl.load(weights_ptr + places, mask=left, other=0)
        along += weights * tl.load(logits_ptr + places, mask=left, other=0) * temperature
        inside = left[:, None] & (columns < D)[None, :]
        tile = tl.load(context_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=inside, other=0)
        scale = tl.load(scale_ptr + rows, mask=left, other=0)
        sums += (weights * scale)[:, None] * tile.to(tl.float32)
    scale = tl.load(scale_ptr + frames + target)
    _store_gradient(grad_targets_ptr, targets_ptr, scale, tl.sum(sums, 0), tl.sum(along), target, columns, D)


@triton.jit
def _store_gradient(grad_ptr, x_ptr, scale, grad_unit, along, row, columns, D: tl.constexpr):
    """Store the gradient of x, given that of u = x / max(norm, eps); `along` is the dot product of u and that one."""
    place = row.to(tl.int64) * D + columns
    unit = tl.load(x_ptr + place, mask=columns < D, other=0).to(tl.float32) * scale
    along = tl.where(scale < 1 / _EPS, along, 0.0)
    grad = (grad_unit - unit * along) * scale
    tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=columns < D)


def _blocks(width: int) -> tuple[int, int]:
    """Return BLOCK_K and BLOCK_D of a tile of at most 4096 numbers, 32 per thread."""
    block_d = min(256, max(16, triton.next_power_of_2(width)))
    return min(32, 4096 // block_d), block_d


def _measure_rows(context: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # (2, N), (N,)
    """Return 1 / norm of the rows of both tensors, and hashes of the targets."""
    frames, width = context.shape
    scale = context.new_empty((2, frames), dtype=torch.float32)
    hashes = context.new_empty(frames, dtype=torch.int32)
    block_n, block_d = _blocks(width)
    _measure_rows_kernel[(triton.cdiv(frames, block_n),)](
        context, targets, scale, hashes, frames, D=width, BLOCK_N=block_n, BLOCK_D=block_d
    )
    return scale, hashes


def contrastive_loss_fwd(
    context: Tensor,  # (N, D)
    targets: Tensor,  # (N, D)
    negatives: Tensor,  # (N, K)
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # (N,), (N,), (N, K + 1)
    """Return the loss, whether the target scored highest, and logits (-inf if ignored). Arguments are contiguous."""
    frames, count = negatives.shape
    loss = context.new_empty(frames, dtype=torch.float32)
    correct = context.new_empty(frames, dtype=torch.bool)
    logits = context.new_empty((frames, count + 1), dtype=torch.float32)
    if frames == 0:
        return loss, correct, logits
    width = context.shape[1]
    block_k, block_d = _blocks(width)
    with torch.cuda.device_of(context):
        scale, hashes = _measure_rows(context, targets)
        _forward_kernel[(frames,)](
            context,
            targets,
            negatives,
            scale,
            hashes,
            loss,
            correct,
            logits,
            frames,
            1 / temperature,
            K=count,
            D=width,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
        )
    return loss, correct, logits


def contrastive_loss_bwd(
    grad_loss: Tensor,  # (N,)
    context: Tensor,  # (N, D)
    targets: Tensor,  # (N, D)
    negatives: Tensor,  # (N, K)
    loss: Tensor,  # (N,)
    logits: Tensor,  # (N, K + 1)
    temperature: float,
) -> tuple[Tensor, Tensor]:  # (N, D), (N, D)
    """Return the gradients of `context` and `targets`. Arguments are contiguous."""
    frames, count = negatives.shape
    grad_context, grad_targets = torch.empty_like(context), torch.empty_like(targets)
    if context.numel() == 0:
        return grad_context, grad_targets
    width = context.shape[1]
    block_k, block_d = _blocks(width)
    grid = (frames, triton.cdiv(width, block_d))
    weights = torch.empty_like(logits)
    with torch.cuda.device_of(context):
        scale, _ = _measure_rows(context, targets)
        _backward_context_kernel[grid](
            grad_loss,
            context,
            targets,
            negatives,
            scale,
            loss,
            logits,
            weights,
            grad_context,
            frames,
            temperature,
            K=count,
            D=width,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
        )
        # Sort the pairs (frame, candidate) by candidate. The sort is stable, so frames keep their order.
        numbers = torch.arange(frames + 1, device=context.device, dtype=torch.int32)
        negatives = torch.where(logits[:, 1:] > -torch.inf, negatives.to(torch.int32), frames)
        candidates = torch.cat((numbers[:-1].unsqueeze(1), negatives), 1)
        candidates, pairs = candidates.flatten().sort(stable=True)
        begins = torch.searchsorted(candidates, numbers, out_int32=True)
        _backward_targets_kernel[grid](
            context,
            targets,
            scale,
            logits,
            weights,
            pairs,
            begins,
            grad_targets,
            frames,
            temperature,
            K=count,
            D=width,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
        )
    return grad_context, grad_targets


def ahead_of_time_cases() -> dict[str, Callable[[], object]]:
    """Return calls by label; tests/ops/ahead_of_time.py compiles the kernels that each call would launch."""
    return {
        f"{dtype}, D={width}".replace("torch.", ""): partial(_forward_and_backward, width, dtype)
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
        for width in (256, 64, 768)
    }


def _forward_and_backward(width: int, dtype: torch.dtype) -> None:
    x = torch.zeros(10, width, dtype=dtype)
    negatives = torch.zeros(10, 100, dtype=torch.int64)
    loss, _, logits = contrastive_loss_fwd(x, x, negatives, 0.1)
    contrastive_loss_bwd(loss, x, x, negatives, loss, logits, 0.1)
