"""Packed batches: sequences of different lengths back to back in one tensor, without padding.

Nothing else in the package converts between padded and packed batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor


def _kept(compute: Callable[["Layout"], Tensor]) -> Callable[["Layout"], Tensor]:
    """Compute a tensor of a layout once and keep it with the layout.

    Inside `torch.compile` nothing is kept: a graph computes equal expressions once anyway.
    """
    name = compute.__name__

    @wraps(compute)
    def get(layout: "Layout") -> Tensor:
        if torch.compiler.is_compiling():
            return compute(layout)
        kept: dict[str, Tensor] = layout.__dict__
        if name not in kept:
            # Autograd cannot save a tensor made in inference mode, and a later forward pass may need it for gradients.
            with torch.inference_mode(False):
                kept[name] = compute(layout)
        return kept[name]

    return get


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each sequence of a packed tensor begins.

    Args:
        lengths: Frames of each sequence, on the host, so that sizes cost no device synchronisation.
        cu_seqlens: (B + 1,) int32 on the device of the data: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        max_length: The longest length, 0 for an empty batch.
        total: N, the rows of the packed tensor.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor  # (B + 1,)
    max_length: int
    total: int

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], *, device: torch.device | str | None = None) -> "Layout":
        """Layout of sequences with these lengths.

        Args:
            lengths: Frames of each sequence, none negative; zero is allowed.
            device: Where `cu_seqlens` lives (default: the CPU).

        Raises:
            ValueError: A length is negative.
        """
        lengths = tuple(int(length) for length in lengths)
        if any(length < 0 for length in lengths):
            raise ValueError(f"lengths: must not be negative, got {lengths}")
        offsets = tuple(accumulate(lengths, initial=0))
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
        return cls(lengths, cu_seqlens, max(lengths, default=0), offsets[-1])

    @classmethod
    def from_device(cls, lengths: tuple[int, ...], device_lengths: Tensor) -> "Layout":
        """Layout of lengths that both host and device know; copying them over would make the host wait.

        Args:
            lengths: Frames of each sequence, none negative.
            device_lengths: (B,) the same whole numbers on the device, of any dtype.
        """
        cu_seqlens = torch.nn.functional.pad(device_lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(lengths, cu_seqlens, max(lengths, default=0), sum(lengths))

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: copies and pickles compute again what a layout keeps."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def offsets(self) -> tuple[int, ...]:
        """`cu_seqlens` on the host: B + 1 numbers."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    @_kept
    def device_lengths(self) -> Tensor:
        """(B,) int32 on the device: `lengths`."""
        return self.cu_seqlens.diff()

    @property
    @_kept
    def sequence_ids(self) -> Tensor:
        """(N,) int64 on the device: which sequence each row belongs to."""
        return torch.repeat_interleave(self.device_lengths.long(), output_size=self.total)

    @property
    @_kept
    def positions(self) -> Tensor:
        """(N,) int64 on the device: the index of each row within its sequence."""
        return torch.arange(self.total, device=self.cu_seqlens.device) - self.cu_seqlens[self.sequence_ids]

    def rows(self, sequences: Tensor, positions: Tensor) -> Tensor:
        """Rows of the packed tensor, for indices that broadcast against each other.

        Args:
            sequences: int64, which sequences.
            positions: int64, indices within them.
        """
        return self.cu_seqlens[sequences] + positions

    def padded_rows(self, length: int) -> "PaddedRows":
        """The rows of this layout in a batch padded to `length`, which is at least the longest length."""
        return PaddedRows(self.sequence_ids * length + self.positions, self, length)

    def valid(self, length: int) -> Tensor:
        """(B, length) bool on the device: which places of a batch padded to `length` hold a frame."""
        return torch.arange(length, device=self.cu_seqlens.device) < self.device_lengths.unsqueeze(1)

    def sums(self, x: Tensor) -> Tensor:  # (N, ...) -> (B, ...)
        """Sums over each sequence, in fp64.

        Rows are added in order on every device, so the bits of a sum do not depend on the rest of the batch.
        """
        # PyTorch adds in order only where there is a second dimension; `unsafe` skips a check that makes the host wait.
        by_row = x.double().unsqueeze(1)
        return torch.segment_reduce(by_row, "sum", offsets=self.cu_seqlens, axis=0, unsafe=True).squeeze(1)

    def map_lengths(self, host: Callable[[int], int], device: Callable[[Tensor], Tensor]) -> "Layout":
        """Layout of the same sequences with other lengths, computed on both host and device so that neither waits.

        Args:
            host: New length of a sequence from its length.
            device: The same function of `device_lengths`, (B,) to (B,).
        """
        return Layout.from_device(tuple(map(host, self.lengths)), device(self.device_lengths))

    def after_conv(self, kernel: int, stride: int) -> "Layout":
        """Layout after a convolution without padding: floor((length - kernel) / stride) + 1 frames, at least 0."""
        if kernel < 1 or stride < 1:
            raise ValueError(f"kernel and stride: must be at least 1, got {kernel} and {stride}")
        return self.map_lengths(
            lambda length: max(0, (length - kernel) // stride + 1),
            lambda lengths: ((lengths - kernel) // stride + 1).clamp(min=0),
        )

    def with_gaps(self, before: int, after: int) -> "Layout":
        """Layout of the sequences with `before` more rows in front of each and `after` more rows after it."""
        gap = before + after
        return self.map_lengths(lambda length: length + gap, lambda lengths: lengths + gap)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Layout":
        """The same layout with `cu_seqlens` on another device."""
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Layout":
        """The same layout with `cu_seqlens` in page-locked memory."""
        return replace(self, cu_seqlens=self.cu_seqlens.pin_memory())


class Packed(NamedTuple):
    """The frames of all sequences of a batch, back to back."""

    values: Tensor  # (N, ...)
    layout: Layout

    @classmethod
    def pack(cls, sequences: Sequence[Tensor]) -> "Packed":
        """Concatenate sequences.

        Args:
            sequences: B tensors (T_b, ...) that agree in everything but their length.

        Raises:
            ValueError: There is no sequence, or their trailing shapes differ.
        """
        if not sequences:
            raise ValueError("sequences: nothing to pack; an empty batch has no shape to take")
        shapes = [tuple(sequence.shape) for sequence in sequences]
        if () in shapes or len({shape[1:] for shape in shapes}) > 1:
            raise ValueError(f"sequences: must agree in all but the first dimension, got {shapes}")
        lengths = [sequence.shape[0] for sequence in sequences]
        return cls(torch.cat(tuple(sequences)), Layout.from_lengths(lengths, device=sequences[0].device))

    def unpack(self) -> list[Tensor]:
        """The sequences as views (T_b, ...) of `values`."""
        return list(self.values.split(self.layout.lengths)) if self.layout.lengths else []

    @classmethod
    def from_padded(cls, x: Tensor, lengths: Sequence[int] | Tensor | Layout) -> "Packed":
        """Drop the padding of a batch.

        Args:
            x: (B, T, ...) padded at the end.
            lengths: B valid lengths, or a layout that has them; a tensor on a device costs one synchronisation.

        Raises:
            ValueError: The lengths do not fit `x`.
        """
        if isinstance(lengths, Tensor):
            lengths = lengths.tolist()
        layout = lengths if isinstance(lengths, Layout) else Layout.from_lengths(lengths, device=x.device)
        if x.dim() < 2 or len(layout.lengths) != x.shape[0]:
            raise ValueError(f"lengths: {len(layout.lengths)} of them for x of shape {tuple(x.shape)}")
        if layout.max_length > x.shape[1]:
            raise ValueError(f"lengths: up to {layout.max_length}, but x is {tuple(x.shape)}")
        # The copy of the layout keeps no indices: for waveforms they would take four times the memory of the samples.
        return cls(layout.padded_rows(x.shape[1]).pack(x), replace(layout))

    def to_padded(self, value: float = 0.0, *, length: int | None = None) -> Tensor:
        """(B, T, ...) padded at the end with `value`; T is `length`, or else the longest length.

        Raises:
            ValueError: `length` is less than the longest.
        """
        longest = self.layout.max_length
        length = longest if length is None else length
        if length < longest:
            raise ValueError(f"length: {length} is less than the longest sequence, {longest}")
        return self.layout.padded_rows(length).pad(self.values, value)

    def spread(self, layout: Layout, *, before: int = 0) -> "Packed":
        """Copy each sequence into a longer slot: `before` zero rows in front, the remaining zeros after it.

        Args:
            layout: Layout of the slots, one for each sequence.
            before: Rows in front of each sequence.
        """
        own = self.layout
        rows = layout.rows(own.sequence_ids, own.positions + before if before else own.positions)
        zeros = self.values.new_zeros(layout.total, *self.values.shape[1:])
        return Packed(zeros.index_copy(0, rows, self.values), layout)

    def with_gaps(self, before: int, after: int) -> "Packed":
        """The sequences with `before` zero rows in front of each and `after` zero rows after it."""
        return self.spread(self.layout.with_gaps(before, after), before=before)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packed":
        """The same batch on another device."""
        values = self.values.to(device, non_blocking=non_blocking)
        return Packed(values, self.layout.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Packed":
        """The same batch in page-locked memory."""
        return Packed(self.values.pin_memory(), self.layout.pin_memory())


class PaddedRows(NamedTuple):
    """Where the rows of a packed tensor are in a padded batch: at the start of each sequence, or anywhere in it."""

    rows: Tensor  # (N,) int64, of the flattened batch (B * T, ...)
    layout: Layout
    length: int  # T

    @classmethod
    def from_mask(cls, mask: Tensor) -> "PaddedRows":
        """The rows where a mask is True; the host waits for the device.

        Args:
            mask: (B, T) bool.
        """
        layout = Layout.from_lengths(mask.sum(1).tolist(), device=mask.device)
        return cls(mask.flatten().nonzero().squeeze(1), layout, mask.shape[1])

    def pack(self, x: Tensor) -> Tensor:  # (B, T, ...) -> (N, ...)
        """Drop everything else."""
        return x.flatten(0, 1).index_select(0, self.rows)

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:  # (N, ...) -> (B, T, ...)
        """Put `value` everywhere else."""
        batch, shape = len(self.layout.lengths), x.shape[1:]
        padded = x.new_full((batch * self.length, *shape), value)
        return padded.index_copy(0, self.rows, x).view(batch, self.length, *shape)
