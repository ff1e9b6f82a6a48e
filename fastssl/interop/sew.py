"""Run Transformers' SEW (squeezed and efficient wav2vec, arXiv 2109.06870) on packed batches.

Before the transformer, SEW averages every `squeeze_factor` frames, and adds a positional convolution with this stride.
After it, a linear layer makes `squeeze_factor` frames of each squeezed one again. An utterance of F frames has
F // squeeze_factor squeezed frames. The last hidden state is zero in the F % squeeze_factor frames at its end. The
hidden states of the layers have the squeezed frames. All this is as in the original on the utterance alone. The
original refuses an utterance with fewer than `squeeze_factor` frames; here, its last hidden state is zero.

In a padded batch, the original differs: if a longer utterance leaves room, it averages the F % squeeze_factor frames at
an utterance's end with zeros. This makes one more squeezed frame, to which the others attend. `norm="padded"` does the
same, and its valid frames are the original's in the padded batch.

A compressor shortens the squeezed frames, after the positional convolution.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import ops
from fastssl.interop import encoders, transformers
from fastssl.interop.classes import CALLS, NORM
from fastssl.interop.shown_states import ShownStates
from fastssl.nn import functional
from fastssl.packing import Layout, Packed, kept_by_plan

_SOURCES = {"SEWModel": "transformers.models.sew.modeling_sew"}
_PARTS = ("pos_conv_embed", "pool", "layer_norm", "layers", "upsample")


def _check(module: Any) -> None:
    """Raise ValueError if an encoder lacks a part or has an unsupported one."""
    transformers.check_parts(module, "feature_extractor", "layer_norm", *(f"encoder.{part}" for part in _PARTS))
    transformers.check_activations(module, "hidden_act", "feat_extract_activation")


def _modules_not_called(model: Any) -> Iterator[nn.Module]:
    stack = model.encoder
    yield from encoders.modules_not_called(model, stack)
    yield from (stack.pool, stack.upsample)
    yield from encoders.parts(stack.upsample, "activation")


def _project(model: Any, frames: Tensor) -> tuple[Tensor, Tensor]:  # (N, C) -> (N, C), (N, D)
    normalised = projected = functional.normalise(model, frames)
    if model.project_features:
        projected = functional.linear(model.feature_projection, normalised)
    return normalised, functional.dropout(model.feature_dropout, projected)


class _Squeeze(NamedTuple):
    """How many squeezed frames an utterance of F frames has: (F + extra) // factor, at most `most`."""

    factor: int
    extra: int
    most: int

    def counts(self, frames: int) -> int:
        return min((frames + self.extra) // self.factor, self.most)

    def device_counts(self, frames: Tensor) -> Tensor:  # (B,) -> (B,)
        return ((frames + self.extra) // self.factor).clamp(max=self.most)


def _squeeze_of(model: Any, padded_frames: int) -> _Squeeze:
    factor = int(model.encoder.upsample.squeeze_factor)
    extra = factor - 1 if getattr(model, NORM) == "padded" else 0
    return _Squeeze(factor, extra, padded_frames // factor)


@kept_by_plan
def _squeezed(layout: Layout, squeeze: _Squeeze) -> Layout:
    """Return the layout of the squeezed frames; each is made from a slot of `factor` frames."""
    return layout.map_lengths(squeeze.counts, squeeze.device_counts)


@kept_by_plan
def _slots(layout: Layout, squeeze: _Squeeze) -> Layout:
    """Return the layout of the frames in slots, of which those after the end of an utterance are zero."""
    factor = squeeze.factor
    return layout.map_lengths(
        lambda frames: factor * squeeze.counts(frames), lambda frames: factor * squeeze.device_counts(frames)
    )


@kept_by_plan
def _kept(layout: Layout, squeeze: _Squeeze) -> Layout:
    """Return the layout of the frames that are in a slot: all but those after the last slot of each utterance."""
    factor = squeeze.factor
    return layout.map_lengths(
        lambda frames: min(frames, factor * squeeze.counts(frames)),
        lambda frames: frames.minimum(factor * squeeze.device_counts(frames)),
    )


@kept_by_plan
def _kept_frames(layout: Layout, squeeze: _Squeeze) -> Tensor:
    """Return the rows, among all frames, of those of `_kept`."""
    kept = _kept(layout, squeeze)
    return layout.rows(kept.sequence_ids, kept.positions)


@kept_by_plan
def _kept_slots(layout: Layout, squeeze: _Squeeze) -> Tensor:
    """Return the rows, among the slots, of the frames of `_kept`."""
    kept = _kept(layout, squeeze)
    return _slots(layout, squeeze).rows(kept.sequence_ids, kept.positions)


@kept_by_plan
def _first_frames(layout: Layout, squeeze: _Squeeze) -> Tensor:
    """Return the row of the first frame of each slot."""
    squeezed = _squeezed(layout, squeeze)
    return layout.rows(squeezed.sequence_ids, squeeze.factor * squeezed.positions)


def _called_through(model: Any) -> tuple[nn.Module, ...]:
    return (model.feature_extractor, *model.encoder.layers)


def _ask(model: Any, layout: Layout, padded_frames: int, left: tuple[bool, ...]) -> None:
    squeeze = _squeeze_of(model, padded_frames)
    encoders.ask_for_positions(model.encoder, layout)
    for rows in (_kept_frames, _kept_slots, _first_frames):
        rows(layout, squeeze)
    squeezed = _squeezed(layout, squeeze)
    squeezed.padded_rows(squeeze.most, left)
    encoders.ask_for_layers(model, Layout.ask_for_indices, squeezed)


def _encode(model: Any, x: Packed, padded_frames: int, left: tuple[bool, ...], *, shows: bool) -> transformers.Encoded:
    stack, squeeze = model.encoder, _squeeze_of(model, padded_frames)
    squeezed = _squeezed_frames(stack.pos_conv_embed.conv, x, squeeze)
    fewer, repeat = encoders.compress(model, Layout.ask_for_indices, squeezed)
    shown = ShownStates(lambda state: Packed(repeat(state), squeezed.layout).to_padded(length=squeeze.most, left=left))
    through = shown.through if shows and fewer is squeezed else None  # a compressor's states are repeated ones
    last, states = transformers.run_transformer(stack, *fewer, calls=getattr(model, CALLS), through=through)
    upsampled = Packed(_upsampled(stack.upsample, repeat(last), x.layout, squeeze), x.layout)
    return transformers.Encoded(upsampled, states, shown.padded)


def _squeezed_frames(conv: nn.Conv1d, x: Packed, squeeze: _Squeeze) -> Packed:
    """Average the frames (N, D) of each slot, and add the positional embedding of its first frame.

    The convolution is computed at all frames, because its op is then as fast as PyTorch's at every second frame, and
    faster in the backward pass.
    """
    values, layout = x
    kept, slots = _kept(layout, squeeze), _slots(layout, squeeze)
    in_slots = _moved(
        values,
        None if kept.total == layout.total else _kept_frames(layout, squeeze),
        None if kept.total == slots.total else _kept_slots(layout, squeeze),
        slots.total,
    )
    squeezed = _squeezed(layout, squeeze)
    pooled = in_slots.reshape(squeezed.total, squeeze.factor, values.shape[1]).mean(1)
    positions = ops.positional_conv(values, functional.convolution_weight(conv), layout, bias=conv.bias)
    return Packed(pooled + F.gelu(positions.index_select(0, _first_frames(layout, squeeze))), squeezed)


def _upsampled(module: Any, squeezed: Tensor, layout: Layout, squeeze: _Squeeze) -> Tensor:  # (M, D) -> (N, D)
    """Make `factor` frames of each squeezed one, and put zeros where an utterance has more frames than its slots."""
    in_slots = F.gelu(functional.linear(module.projection, squeezed)).reshape(-1, squeezed.shape[1])
    kept = _kept(layout, squeeze)
    return _moved(
        in_slots,
        None if kept.total == len(in_slots) else _kept_slots(layout, squeeze),
        None if kept.total == layout.total else _kept_frames(layout, squeeze),
        layout.total,
    )


def _moved(x: Tensor, rows: Tensor | None, places: Tensor | None, total: int) -> Tensor:  # (N, D) -> (total, D)
    """Take rows of `x`, all if None, and copy them to places among `total` zeros, to all of them if None."""
    chosen = x if rows is None else x.index_select(0, rows)
    return chosen if places is None else chosen.new_zeros(total, x.shape[1]).index_copy(0, places, chosen)


CLASSES = transformers.accelerated_classes(
    __name__, _SOURCES, transformers.Architecture(_modules_not_called, _project, _encode, _ask, _called_through), _check
)
__getattr__ = CLASSES.by_name  # for pickle
