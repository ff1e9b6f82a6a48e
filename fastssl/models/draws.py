"""Random choices for a batch, made on the host: so the host knows how many frames are masked, and waits for no GPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.models.config import MaskedConfig
from fastssl.nn.masking import sample_span_mask
from fastssl.packing import Layout, send


class Draws(NamedTuple):
    """Which of the N frames of a batch are masked, and what else is drawn for the M masked ones.

    Attributes:
        mask: (N,) bool, True where a frame is masked.
        rows: (M,) int64, the row of each masked frame.
        counts: (B,) fp32 number of masked frames of each utterance, the weight of values averaged over an utterance.
        negatives: (M, K) int64, see `nn.masking.sample_negatives`; None if the system has no negatives.
        noise_seeds: (M,) int64 seeds of the quantiser's noise, see `ops.gumbel_quantize`; None without noise.
    """

    mask: Tensor  # (N,)
    rows: Tensor  # (M,)
    counts: Tensor  # (B,)
    negatives: Tensor | None = None  # (M, K)
    noise_seeds: Tensor | None = None  # (M,)

    def sent(self, device: torch.device) -> "Draws":
        """Return the same choices on a device, in one copy that the host does not wait for."""
        there = iter(send([part for part in self if part is not None], device))
        return self._replace(**{name: next(there) for name, part in self._asdict().items() if part is not None})


def draw_mask(config: MaskedConfig, layout: Layout, keys: Tensor) -> Draws:
    """Draw the spans of frames to mask (`nn.masking.sample_span_mask`), on the device of the keys.

    Args:
        config: Probability, length and smallest number of spans.
        layout: Where each utterance begins; with keys on the host, only its lengths are read.
        keys: (B,) int64 keys; the mask of an utterance depends on its key and its length only. If they are on a GPU,
            the host waits for M.

    Returns:
        The mask, and the rows and counts of its frames.
    """
    layout = layout.beside(keys)
    mask = sample_span_mask(
        layout,
        keys,
        probability=config.mask_time_prob,
        length=config.mask_time_length,
        min_spans=config.mask_time_min_masks,
    )
    return Draws(mask, mask.nonzero().squeeze(1), masked_by_utterance(mask, layout))


def masked_by_utterance(mask: Tensor, layout: Layout) -> Tensor:  # (N,) bool -> (B,) fp32
    """Count the masked frames of each utterance; values averaged over an utterance are weighted by this count.

    Args:
        mask: (N,) bool, True where a frame is masked.
        layout: Where each utterance begins.

    Returns:
        (B,) fp32 counts.
    """
    none = torch.zeros(len(layout.lengths), device=mask.device)
    return none.index_add(0, layout.sequence_ids, mask.float())
