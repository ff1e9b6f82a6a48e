"""Packed batches: sequences of different lengths back to back in one tensor, without padding.

Nothing else in the package converts between padded and packed batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


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

    @property
    def offsets(self) -> tuple[int, ...]:
        """`cu_seqlens` on the host: B + 1 numbers."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    def sequence_ids(self) -> Tensor:
        """(N,) int64 on the device: which sequence each row belongs to."""
        lengths = self.cu_seqlens.diff().long()
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=self.total)

    @property
    def positions(self) -> Tensor:
        """(N,) int64 on the device: the index of each row within its sequence."""
        rows = torch.arange(self.total, device=self.cu_seqlens.device)
        return rows - self.cu_seqlens[:-1].long()[self.sequence_ids]

    def after_conv(self, kernel: int, stride: int) -> "Layout":
        """Layout after a convolution without padding: floor((length - kernel) / stride) + 1 frames, at least 0."""
        if kernel < 1 or stride < 1:
            raise ValueError(f"kernel and stride: must be at least 1, got {kernel} and {stride}")
        lengths = tuple(max(0, (length - kernel) // stride + 1) for length in self.lengths)
        # On the device from what is there: a copy from the host would make the host wait, in every layer.
        frames = ((self.cu_seqlens.diff() - kernel) // stride + 1).clamp(min=0)
        cu_seqlens = torch.nn.functional.pad(frames.cumsum(0, dtype=torch.int32), (1, 0))
        return Layout(lengths, cu_seqlens, max(lengths, default=0), sum(lengths))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Layout":
        """The same layout with `cu_seqlens` on another device."""
        cu_seqlens = self.cu_seqlens.to(device, non_blocking=non_blocking)
        return Layout(self.lengths, cu_seqlens, self.max_length, self.total)

    def pin_memory(self) -> "Layout":
        """The same layout with `cu_seqlens` in page-locked memory."""
        return Layout(self.lengths, self.cu_seqlens.pin_memory(), self.max_length, self.total)


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
    def from_padded(cls, x: Tensor, lengths: Sequence[int] | Tensor) -> "Packed":
        """Drop the padding of a batch.

        Args:
            x: (B, T, ...) padded at the end.
            lengths: B valid lengths; a tensor on a device costs one synchronisation.

        Raises:
            ValueError: The lengths do not fit `x`.
        """
        host_lengths = [int(length) for length in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        if x.dim() < 2 or len(host_lengths) != x.shape[0]:
            raise ValueError(f"lengths: {len(host_lengths)} of them for x of shape {tuple(x.shape)}")
        if max(host_lengths, default=0) > x.shape[1]:
            raise ValueError(f"lengths: up to {max(host_lengths)}, but x is {tuple(x.shape)}")
        layout = Layout.from_lengths(host_lengths, device=x.device)
        rows = layout.sequence_ids * x.shape[1] + layout.positions
        return cls(x.flatten(0, 1).index_select(0, rows), layout)

    def to_padded(self, value: float = 0.0, *, length: int | None = None) -> Tensor:
        """(B, T, ...) padded at the end with `value`; T is `length`, or else the longest length.

        Raises:
            ValueError: `length` is less than the longest.
        """
        batch, longest = len(self.layout.lengths), self.layout.max_length
        if length is not None and length < longest:
            raise ValueError(f"length: {length} is less than the longest sequence, {longest}")
        longest = longest if length is None else length
        padded = self.values.new_full((batch * longest, *self.values.shape[1:]), value)
        rows = self.layout.sequence_ids * longest + self.layout.positions
        return padded.index_copy(0, rows, self.values).view(batch, longest, *self.values.shape[1:])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packed":
        """The same batch on another device."""
        values = self.values.to(device, non_blocking=non_blocking)
        return Packed(values, self.layout.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Packed":
        """The same batch in page-locked memory."""
        return Packed(self.values.pin_memory(), self.layout.pin_memory())
