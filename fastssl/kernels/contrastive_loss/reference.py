"""The contrastive loss of wav2vec 2.0 in plain PyTorch: the specification."""

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-8  # lower limit of the norms, as in torch.nn.functional.cosine_similarity
_ROW_TILE = 48  # rows are padded to a multiple of this


def contrastive_loss(
    context: Tensor,  # (N, D)
    targets: Tensor,  # (N, D)
    negatives: Tensor,  # (N, K)
    *,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Compute all N x N cosines in one matrix product, then gather K + 1 per frame. Arguments as in `op.py`."""
    accumulation = torch.promote_types(context.dtype, torch.float32)
    frames = torch.arange(len(context), device=context.device).unsqueeze(1)
    # Replace -1 by the frame itself, which is then ignored because its target equals the frame's own target.
    negatives = torch.where(negatives < 0, frames, negatives)
    groups = _groups_of_equal_rows(targets.detach().to(accumulation))
    valid = groups[negatives] != groups.unsqueeze(1)

    # With whole tiles, a matrix product gives a row the same bits in every batch. Rows of padding stay zero, because
    # their norm is clamped to _EPS.
    padding = (0, 0, 0, -len(context) % _ROW_TILE)
    context, targets = (F.normalize(F.pad(x.to(accumulation), padding), dim=1, eps=_EPS) for x in (context, targets))
    cosines = (context @ targets.t()).gather(1, torch.cat([frames, negatives], 1))
    logits = cosines / temperature
    positive, negative = logits[:, 0], logits[:, 1:]
    loss = torch.cat([positive.unsqueeze(1), negative.masked_fill(~valid, -torch.inf)], 1).logsumexp(1) - positive
    lead = (positive.unsqueeze(1) - negative).detach()
    correct = ((lead >= 0) | ~valid).all(1) & ((lead > 0) & valid).any(1)
    return loss, correct


def _groups_of_equal_rows(
    rows: Tensor,  # (N, D)
) -> Tensor:  # (N,)
    """Number the rows so that two rows have the same number if and only if they are equal.

    Rows are sorted by a 64-bit hash, which brings equal rows together, and then compared with their neighbours. The
    result can be wrong only if two different rows have the same hash: the probability is below 1e-9 per pair of rows.

    Args:
        rows: (N, D) rows in fp32 or fp64.

    Returns:
        (N,) int64 numbers.
    """
    words = torch.where(rows == 0, 0.0, rows).contiguous().view(torch.int32).long()  # 0.0 and -0.0 are equal
    base = torch.full((words.shape[1],), 0x9E3779B97F4A7C15 - 2**64, device=rows.device)
    order = (words * base.cumprod(0)).sum(1).argsort()
    ordered = words[order]
    groups = (ordered != ordered.roll(1, 0)).any(1).cumsum(0)
    return torch.empty_like(groups).scatter(0, order, groups)
