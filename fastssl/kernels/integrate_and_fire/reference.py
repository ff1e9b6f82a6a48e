"""Continuous integrate-and-fire over packed sequences, in plain PyTorch: the specification."""

import torch
from torch import Tensor

from fastssl.packing import Layout, Packed


def fire_positions(weights: Tensor, layout: Layout, threshold: float) -> Tensor:
    """Compute where each frame ends, in output frames: the running sum of its utterance's weights over `threshold`.

    Args:
        weights: (N,) packed weights of any floating dtype.
        layout: Where each utterance begins.
        threshold: Sum of the weights in one output frame.

    Returns:
        (N,) float64 positions, which never decrease within an utterance.
    """
    return running_sums(weights, layout) / threshold


def running_sums(x: Tensor, layout: Layout) -> Tensor:
    """Sum the rows of each utterance up to each row.

    Sums are in fp64, along the first dimension of a padded batch with at least two columns. There, PyTorch adds one
    element after another on every device, so the bits do not depend on the rest of the batch. For a single column,
    PyTorch on a GPU would call CUB, which adds in parallel, in another order.

    Args:
        x: (N, ...) packed values of any floating dtype; further dimensions are summed independently.
        layout: Where each utterance begins.

    Returns:
        (N, ...) float64 sums.
    """
    rows, steps, others = layout.rows_by_step, layout.max_length, x.shape[1:]
    columns = max(2, len(layout.lengths))
    by_step = x.new_zeros((steps * columns, *others), dtype=torch.float64).index_copy(0, rows, x.double())
    sums = by_step.view(steps, columns, *others).cumsum(0)
    return sums.flatten(0, 1).index_select(0, rows)


def fired(positions: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """Count the output frames of each utterance.

    Args:
        positions: (N,) float64 positions from `fire_positions`.
        weights: (N,) the weights that the positions were computed from.
        layout: Where each utterance begins.

    Returns:
        (B,) float64 counts; NaN if a weight of the utterance is negative or not finite.
    """
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
    """Sum over all pairs of a frame and an output frame whose intervals overlap. Arguments as in `op.fire`."""
    previous = torch.where(layout.positions == 0, 0.0, positions.roll(1))
    first_slot, last_slot = previous.detach().floor().long(), positions.detach().floor().long()
    reached = last_slot - first_slot + 1
    # An utterance has as many pairs as input and output frames together, so the host knows their number.
    pairs = layout.total + layout_out.total
    frame = torch.arange(layout.total, device=x.device).repeat_interleave(reached, output_size=pairs)
    slot = first_slot[frame] + torch.arange(pairs, device=x.device) - (reached.cumsum(0) - reached)[frame]
    begin = torch.where(slot == first_slot[frame], previous[frame], slot.to(torch.float64))
    end = torch.where(slot == last_slot[frame], positions[frame], slot.to(torch.float64) + 1)

    accumulator = torch.promote_types(x.dtype, torch.float32)
    contribution = x[frame].to(accumulator) * ((end - begin) * threshold).to(accumulator)[:, None]
    sequence = layout.sequence_ids[frame]
    fires = slot < layout_out.device_lengths[sequence]  # the remainder of an utterance goes to a spare row
    row = torch.where(fires, layout_out.rows(sequence, slot), layout_out.total)
    out = contribution.new_zeros(layout_out.total + 1, x.shape[1]).index_add(0, row, contribution)
    return out[:-1].to(x.dtype)
