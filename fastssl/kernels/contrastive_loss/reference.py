"""The contrastive loss of wav2vec 2.0 in plain PyTorch: the specification."""

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-8  # of the norms, as in torch.nn.functional.cosine_similarity
_ROW_TILE = 48


def contrastive_loss(
    context: Tensor,  # (N, D)
    targets: Tensor,  # (N, D)
    negatives: Tensor,  # (N, K)
    *,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """All cosines by one GEMM, then the K + 1 that count. Arguments as in `fastssl.ops.contrastive_loss`."""
    accumulation = torch.promote_types(context.dtype, torch.float32)
    frames = torch.arange(len(context), device=context.device).unsqueeze(1)
    # A negative that is none becomes the frame itself, which is left out because it equals itself.
    negatives = torch.where(negatives < 0, frames, negatives)
    groups = _groups_of_equal_rows(targets.detach().to(accumulation))
    valid = groups[negatives] != groups.unsqueeze(1)

    # A GEMM gives the rows of whole tiles the same bits in every batch. A row of zeros has norm _EPS, so it stays zero.
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
    """A number per row; two rows have the same one if and only if they are equal.

    Sorting by a 64-bit hash brings equal rows together, and comparing neighbours makes sure. Only if two different rows
    had the same hash could equal ones stay apart, for which the odds are below 1e-9 per pair of rows.
    """
    words = torch.where(rows == 0, 0.0, rows).contiguous().view(torch.int32).long()  # 0.0 and -0.0 are equal
    base = torch.full((words.shape[1],), 0x9E3779B97F4A7C15 - 2**64, device=rows.device)
    order = (words * base.cumprod(0)).sum(1).argsort()
    ordered = words[order]
    groups = (ordered != ordered.roll(1, 0)).any(1).cumsum(0)
    return torch.empty_like(groups).scatter(0, order, groups)
