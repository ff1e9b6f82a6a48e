"""Continuous integrate-and-fire over packed sequences, in plain PyTorch: the specification."""

import torch
from torch import Tensor

from fastssl.packing import Layout, Packed


def fire_positions(weights: Tensor, layout: Layout, threshold: float) -> Tensor:
    """Where each frame ends on the axis of output frames: the utterance's weights so far, over `threshold`.

    Summed in fp64, utterance by utterance along the first dimension of a padded batch, which PyTorch does one element
    after the other on every device: what an utterance is batched with changes no bit of it.

    Args:
        weights: (N,) packed weights.
        layout: Where each utterance begins.
        threshold: Weight that makes one output frame.

    Returns:
        (N,) float64, rising within each utterance.
    """
    padded = Packed(weights.to(torch.float64), layout).to_padded()
    sums = padded.t().cumsum(0).t()
    return Packed.from_padded(sums, layout).values / threshold


def fired(positions: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """How many output frames each utterance gives: (B,) float64, NaN where a weight is negative or not finite."""
    weights, positions = weights.detach(), positions.detach()
    valid = (weights >= 0) & (weights < torch.inf)
    last = torch.where(valid, positions, torch.nan)
    ends = Packed(last, layout).to_padded()
    return ends.amax(1).floor() if layout.total > 0 else positions.new_zeros(len(layout.lengths))


def integrate_and_fire(
    x: Tensor,  # (N, C)
    positions: Tensor,  # (N,)
    layout: Layout,
    layout_out: Layout,
    *,
    threshold: float,
) -> Tensor:  # (N_out, C)
    """Sum over every pair of a frame and an output frame that its weight reaches. Arguments as in `op.py`."""
    previous = torch.where(layout.positions == 0, 0.0, positions.roll(1))
    first_slot, last_slot = previous.detach().floor().long(), positions.detach().floor().long()
    reached = last_slot - first_slot + 1
    # Over an utterance they add up to its frames plus its output frames, so their number needs no synchronisation.
    pairs = layout.total + layout_out.total
    frame = torch.arange(layout.total, device=x.device).repeat_interleave(reached, output_size=pairs)
    slot = first_slot[frame] + torch.arange(pairs, device=x.device) - (reached.cumsum(0) - reached)[frame]
    begin = torch.where(slot == first_slot[frame], previous[frame], slot.to(torch.float64))
    end = torch.where(slot == last_slot[frame], positions[frame], slot.to(torch.float64) + 1)

    accumulator = torch.promote_types(x.dtype, torch.float32)
    contribution = x[frame].to(accumulator) * ((end - begin) * threshold).to(accumulator)[:, None]
    sequence = layout.sequence_ids[frame]
    fires = slot < layout_out.device_lengths[sequence]  # the tail of an utterance does not: it goes to a spare row
    row = torch.where(fires, layout_out.rows(sequence, slot), layout_out.total)
    out = contribution.new_zeros(layout_out.total + 1, x.shape[1]).index_add(0, row, contribution)
    return out[:-1].to(x.dtype)
