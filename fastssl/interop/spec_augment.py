"""SpecAugment (arXiv 1904.08779) on packed frames, with the random numbers that Transformers' encoders draw."""

import sys
from typing import Any

import torch
from torch import Tensor

from fastssl.interop.classes import original_class
from fastssl.packing import Packed, send


def mask_frames(
    model: Any,
    x: Packed,
    mask_time_indices: Any,
    padded_frames: int,
    *,
    has_padding: bool,
    left: tuple[bool, ...] = (),
) -> Packed:
    """Mask frames as the model's own SpecAugment function does, with its random draws, but without a padded batch.

    A given mask is for the rows as they are returned. A drawn one has the frames of each utterance first, as always in
    the original.
    """
    config, (values, layout) = model.config, x
    draws_times = model.training and config.mask_time_prob > 0 and mask_time_indices is None
    draws_channels = model.training and config.mask_feature_prob > 0
    if not getattr(config, "apply_spec_augment", True) or (
        mask_time_indices is None and not draws_times | draws_channels
    ):
        return x
    if layout.total == 0:  # the model's function refuses rows without frames
        return x
    original = original_class(model)
    draw = vars(sys.modules[original.__module__])["_compute_mask_indices"]
    valid = torch.arange(padded_frames, device="cpu") < torch.tensor(layout.lengths, device="cpu").unsqueeze(1)
    if draws_times:
        # HuBERT and SEW mask padding frames too, instead of valid ones.
        knows_padding = has_padding and original.__name__ not in ("HubertModel", "SEWModel")
        within = {"attention_mask": valid} if knows_padding else {}
        mask_time_indices = torch.from_numpy(
            draw(
                valid.shape,
                mask_prob=config.mask_time_prob,
                mask_length=config.mask_time_length,
                min_masks=config.mask_time_min_masks,
                **within,
            )
        )
    host: dict[str, Tensor] = {}  # sent in one copy
    if mask_time_indices is not None:
        mask = torch.as_tensor(mask_time_indices, device=getattr(mask_time_indices, "device", "cpu")).bool()
        if mask.shape != valid.shape:
            raise ValueError(
                f"mask_time_indices: expected {tuple(valid.shape)}, one per frame, got {tuple(mask.shape)}"
            )
        if left and not draws_times:
            valid = torch.where(torch.tensor(left, device="cpu").unsqueeze(1), valid.flip(1), valid)
        if mask.device.type == "cpu":
            host["rows"] = mask[valid].nonzero().squeeze(1)
    if draws_channels:
        host["channels"] = torch.from_numpy(
            draw(
                (len(valid), values.shape[1]),
                mask_prob=config.mask_feature_prob,
                mask_length=config.mask_feature_length,
                min_masks=config.mask_feature_min_masks,
            )
        )
    sent = dict(zip(host, send(list(host.values()), values.device), strict=True))
    if mask_time_indices is not None:
        embedding = model.masked_spec_embed.to(values.dtype)
        if "rows" in sent:
            values = values.index_put((sent["rows"],), embedding)
        else:
            values = _embedded_where(x, mask, embedding, left)
    if draws_channels:
        values = values.masked_fill(sent["channels"].index_select(0, layout.sequence_ids), 0)
    return Packed(values, layout)


def _embedded_where(
    x: Packed,
    mask: Tensor,  # (B, F)
    embedding: Tensor,  # (D,)
    left: tuple[bool, ...] = (),
) -> Tensor:  # (N, D)
    """Replace frames where a mask on the GPU is True, without a wait for the number of such frames."""
    packed = mask.flatten().index_select(0, x.layout.padded_rows(mask.shape[1], left).rows)
    return torch.where(packed.unsqueeze(1), embedding, x.values)
