"""The contrastive loss of wav2vec 2.0 over the masked frames of a packed batch, with sampled negatives."""

import math

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.nn.masking import sample_negatives
from fastssl.nn.random import draw_keys
from fastssl.packing import Layout


class ContrastiveLoss(nn.Module):
    """Contrastive loss between each masked frame's target and K negatives (wav2vec 2.0, arXiv 2006.11477, equation 3).

    The negatives are the targets of other masked frames of the same utterance, drawn uniformly with replacement. The
    draws depend on the utterance's key only, so an utterance gets the same negatives in any batch.

    Example:
        >>> import torch
        >>> from fastssl import Layout
        >>> from fastssl.nn import ContrastiveLoss
        >>> contrastive_loss = ContrastiveLoss(negatives=100)
        >>> masked = Layout.from_lengths([120, 35])  # masked frames of each utterance
        >>> context, targets = torch.randn(155, 64, requires_grad=True), torch.randn(155, 64)
        >>> loss, correct = contrastive_loss(context, targets, masked)
        >>> loss.sum().backward()
        >>> loss.shape, correct.dtype
        (torch.Size([155]), torch.bool)

    Args:
        negatives: K, the number of negatives of each masked frame.
        temperature: Divisor of the cosine similarities.

    Raises:
        ValueError: `negatives` is not a whole number of at least 1, or `temperature` is not positive and finite.
    """

    def __init__(self, *, negatives: int = 100, temperature: float = 0.1) -> None:
        super().__init__()
        if type(negatives) is not int or negatives < 1:
            raise ValueError(f"negatives: must be a whole number of at least 1, got {negatives!r}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: must be above 0 and finite, got {temperature}")
        self.negatives = negatives
        self.temperature = temperature

    def forward(
        self,
        context: Tensor,  # (M, D)
        targets: Tensor,  # (M, D)
        layout: Layout,
        *,
        mask: Tensor | None = None,  # (N,)
        keys: Tensor | None = None,  # (B,)
    ) -> tuple[Tensor, Tensor]:  # (M,), (M,)
        """Compare each masked frame with its own target and with its negatives.

        Args:
            context: (M, D) encoder outputs at the masked frames, in packed order.
            targets: (M, D) targets of the same frames, in the dtype of `context`.
            layout: Layout of the masked frames; with `mask`, layout of all frames.
            mask: (N,) bool, True at the M masked frames among the N frames of `layout`; None if `layout` counts only
                masked frames.
            keys: (B,) int64 keys from `nn.random.utterance_keys` or `draw_keys`, which determine the negatives. None
                draws keys from PyTorch's generator.

        Returns:
            The loss of each masked frame, (M,) in at least fp32, and (M,) bool, True if its own target scored highest,
            as `ops.contrastive_loss` defines it. The loss is 0 for the only masked frame of an utterance.

        Raises:
            ValueError: The shape or dtype of an argument is wrong, or the number of masked frames is not M.
        """
        if keys is None:
            keys = draw_keys(len(layout.lengths), device=context.device)
        elif keys.shape != (len(layout.lengths),) or keys.dtype != torch.int64:
            expected = f"({len(layout.lengths)},) torch.int64"
            raise ValueError(f"keys: expected {expected}, one per utterance, got {tuple(keys.shape)} {keys.dtype}")
        if mask is None:
            if context.shape[:1] != (layout.total,):
                raise ValueError(f"layout: has {layout.total} masked frames, but context is {tuple(context.shape)}")
            mask = torch.ones(layout.total, dtype=torch.bool, device=context.device)
            rows = torch.arange(layout.total, device=context.device)
        else:
            if mask.shape != (layout.total,) or mask.dtype != torch.bool:
                raise ValueError(f"mask: expected ({layout.total},) torch.bool, got {tuple(mask.shape)} {mask.dtype}")
            rows = mask.nonzero().squeeze(1)
            if context.shape[:1] != rows.shape:
                raise ValueError(f"mask: has {len(rows)} masked frames, but context is {tuple(context.shape)}")
        negatives = sample_negatives(mask, layout, keys, count=self.negatives, rows=rows)
        return ops.contrastive_loss(context, targets, negatives, temperature=self.temperature)
