"""Packed batches: sequences of different lengths back to back in one tensor, without padding.

All conversion between padded and packed batches in the package is in this module.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, wraps
from itertools import accumulate
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

_Part = TypeVar("_Part", Tensor, "Layout")
_Sizes = ParamSpec("_Sizes")
#: Attribute of a layout that keeps everything that is computed from it, because it was planned.
_PLANNED = "_planned"


def _kept(compute: Callable[["Layout"], Tensor]) -> Callable[["Layout"], Tensor]:
    """Decorate a method: compute its tensor once and cache it on the layout.

    Inside `torch.compile` nothing is cached, because the compiler merges equal expressions anyway.
    """
    name = compute.__name__

    @wraps(compute)
    def get(layout: "Layout") -> Tensor:
        if torch.compiler.is_compiling():
            return compute(layout)
        if name not in layout.__dict__:
            layout.__dict__[name] = _outside_inference_mode(partial(compute, layout))
        kept: Tensor = layout.__dict__[name]
        return kept

    return get


def kept_by_plan(
    compute: Callable[Concatenate["Layout", _Sizes], _Part],
) -> Callable[Concatenate["Layout", _Sizes], _Part]:
    """Decorate a function of a layout and numbers: for a planned layout (`Layout.plan`), compute each result once."""
    name = compute.__name__

    @wraps(compute)
    def get(layout: "Layout", /, *sizes: _Sizes.args, **named: _Sizes.kwargs) -> _Part:
        if torch.compiler.is_compiling() or _PLANNED not in layout.__dict__:
            return compute(layout, *sizes, **named)
        key = f"{name}{sizes}{named or ''}"
        if key not in layout.__dict__:
            part = _outside_inference_mode(partial(compute, layout, *sizes, **named))
            if isinstance(part, Layout):
                part.__dict__[_PLANNED] = True
            layout.__dict__[key] = part
        kept: _Part = layout.__dict__[key]
        return kept

    return get


def _outside_inference_mode(compute: Callable[[], _Part]) -> _Part:
    """Compute what is kept: a later forward may need it for gradients, and autograd saves no inference tensors."""
    if not torch.is_inference_mode_enabled():
        return compute()
    with torch.inference_mode(mode=False):
        return compute()


#: Tensors that share a buffer begin at multiples of this many bytes. Triton compiles a kernel again for a pointer that
#: is not a multiple of 16.
_ALIGNMENT = 64


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors from the host to a device, all in one copy; if that is a GPU, the host does not wait for it.

    Args:
        tensors: Tensors on the CPU, of any shapes and dtypes. If all are on the device already, nothing is copied.
        device: Target device.

    Returns:
        The tensors on the device; they share one buffer.
    """
    if all(tensor.device.type == device.type for tensor in tensors):
        return list(tensors)
    # PyTorch keeps page-locked memory until the copy has ended. Other memory may be freed before, as on MPS.
    pinned = device.type == "cuda"
    return views_of(one_buffer(tensors, pinned=pinned).to(device, non_blocking=pinned), tensors)


def one_buffer(tensors: Sequence[Tensor], *, pinned: bool) -> Tensor:
    """Copy tensors into one buffer on the host; `views_of` finds them in it, or in a copy of it.

    Args:
        tensors: Tensors on the CPU, of any shapes and dtypes.
        pinned: Whether to use page-locked memory, for an asynchronous copy to a GPU.
    """
    spans, size = _spans(tensors)
    buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    for span, tensor in zip(spans, tensors, strict=True):
        buffer[span].view(tensor.dtype).copy_(tensor.flatten())
    return buffer


def views_of(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a buffer as tensors with the shapes and dtypes of those that `one_buffer` copied there."""
    spans, _ = _spans(tensors)
    return [buffer[span].view(tensor.dtype).view(tensor.shape) for span, tensor in zip(spans, tensors, strict=True)]


def _spans(tensors: Sequence[Tensor]) -> tuple[list[slice], int]:  # bytes of each tensor in one buffer, and its size
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    ends = list(accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes))
    spans = [slice(begin, begin + size) for begin, size in zip([0, *ends], sizes, strict=False)]
    return spans, ends[-1] if ends else 0


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each of the B sequences of a packed tensor begins.

    Build one with `from_lengths`, or take the one that `Packed.pack` returns.

    Args:
        lengths: Number of frames of each sequence, on the host, so that reading a size does not wait for the device.
        cu_seqlens: (B + 1,) int32 on the device of the data. Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] - 1.
        max_length: Length of the longest sequence, 0 for an empty batch.
        total: N, the number of rows of the packed tensor.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor  # (B + 1,)
    max_length: int
    total: int

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], *, device: torch.device | str | None = None) -> "Layout":
        """Create the layout of sequences with the given lengths; the host does not wait for the copy to a GPU.

        Args:
            lengths: Number of frames of each sequence; zero is allowed.
            device: Device of `cu_seqlens` (default: the CPU, also if PyTorch has another default device).

        Raises:
            ValueError: A length is negative.
        """
        lengths = tuple(int(length) for length in lengths)
        if any(length < 0 for length in lengths):
            raise ValueError(f"lengths: must not be negative, got {lengths}")
        offsets = tuple(accumulate(lengths, initial=0))
        host = torch.tensor(offsets, dtype=torch.int32, device="cpu")
        if device is None or torch.device(device).type == "cpu":
            cu_seqlens = host
        elif torch.device(device).type != "cuda" or torch.compiler.is_compiling():
            cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
        else:
            (cu_seqlens,) = send([host], torch.device(device))
        return cls(lengths, cu_seqlens, max(lengths, default=0), offsets[-1])

    @classmethod
    def planned(cls, lengths: Sequence[int], *, device: torch.device, use: Callable[["Layout"], object]) -> "Layout":
        """Create a layout with a plan, all in one copy to the device, see `plan`.

        Args:
            lengths: As in `from_lengths`.
            device: Device of `cu_seqlens`.
            use: Function that asks a layout of these lengths, on the host, for layouts and properties.
        """
        if device.type == "cpu" or torch.compiler.is_compiling():
            return cls.from_lengths(lengths, device=device)
        with torch.inference_mode(mode=False):  # as in `_outside_inference_mode`
            host = cls.from_lengths(lengths)
            host.prepare(use)
            return host.holding(iter(send(list(host.tensors()), device)))

    @classmethod
    def from_device(cls, lengths: tuple[int, ...], device_lengths: Tensor) -> "Layout":
        """Create a layout from lengths that are on both the host and the device, so the host does not wait for a copy.

        The lengths are not checked.

        Args:
            lengths: Number of frames of each sequence, at least 0.
            device_lengths: (B,) the same whole numbers on the device, of any dtype.
        """
        cu_seqlens = torch.nn.functional.pad(device_lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return cls(lengths, cu_seqlens, max(lengths, default=0), sum(lengths))

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields to copy or pickle, without the cached tensors, which a copy computes again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def offsets(self) -> tuple[int, ...]:
        """The values of `cu_seqlens` on the host: B + 1 integers."""
        return tuple(accumulate(self.lengths, initial=0))

    @property
    @_kept
    def device_lengths(self) -> Tensor:
        """(B,) int32: the values of `lengths` on the device."""
        return self.cu_seqlens.diff()

    @property
    @_kept
    def divisors(self) -> Tensor:
        """(B,) int32 on the device: what to divide the sum of each sequence by for a mean; 1 for an empty one."""
        return self.device_lengths.clamp(min=1)

    @property
    @_kept
    def sequence_ids(self) -> Tensor:
        """(N,) int64 on the device: the index of the sequence that each row belongs to."""
        return torch.repeat_interleave(self.device_lengths.long(), output_size=self.total)

    @property
    @_kept
    def positions(self) -> Tensor:
        """(N,) int64 on the device: the index of each row within its sequence."""
        return torch.arange(self.total, device=self.cu_seqlens.device) - self.cu_seqlens[self.sequence_ids]

    def ask_for_indices(self) -> None:
        """Compute `device_lengths`, `divisors`, `sequence_ids` and `positions`, so that a plan includes them."""
        _ = self.device_lengths, self.divisors, self.sequence_ids, self.positions

    @property
    @_kept
    def rows_by_step(self) -> Tensor:
        """(N,) int64 on the device: the row of each frame in a batch (T, max(B, 2)) with one column per sequence."""
        return self.positions * max(2, len(self.lengths)) + self.sequence_ids

    def rows(self, sequences: Tensor, positions: Tensor) -> Tensor:
        """Compute row numbers in the packed tensor from sequence numbers and positions within the sequences.

        Args:
            sequences: int64 sequence numbers, from 0 to B - 1.
            positions: int64 positions within those sequences; must broadcast against `sequences`.

        Returns:
            int64 row numbers, in the broadcast shape. They are not checked against the lengths.
        """
        return self.cu_seqlens[sequences] + positions

    def padded_rows(self, length: int, left: tuple[bool, ...] = ()) -> "PaddedRows":
        """Return the place of each packed row in a padded batch.

        Args:
            length: T, the padded length, at least `max_length`.
            left: For each sequence, whether its padding is before it instead of after it; empty if no sequence's is.
        """
        return PaddedRows(self._rows_in_padded(length, left), self, length)

    @kept_by_plan
    def _rows_in_padded(self, length: int, left: tuple[bool, ...]) -> Tensor:  # (N,)
        rows = self.sequence_ids * length + self.positions
        return rows + self.padding_before(length, left)[self.sequence_ids] if left else rows

    @kept_by_plan
    def padding_before(self, length: int, left: tuple[bool, ...]) -> Tensor:
        """Return (B,) int64 on the device: how many rows of padding are before each sequence, see `padded_rows`."""
        (padded_before,) = send([torch.tensor(left, device="cpu")], self.cu_seqlens.device)
        return padded_before * (length - self.device_lengths)

    def valid(self, length: int) -> Tensor:
        """Return (B, length) bool on the device: True where a batch padded to `length` has a frame, not padding."""
        return torch.arange(length, device=self.cu_seqlens.device) < self.device_lengths.unsqueeze(1)

    def sums(self, x: Tensor) -> Tensor:  # (N, ...) -> (B, ...)
        """Sum the rows of each sequence in fp64.

        Rows are added in order on every device, so the bits of a sum do not depend on the rest of the batch.

        Args:
            x: (N, ...) packed values.

        Returns:
            (B, ...) fp64; 0 for an empty sequence.
        """
        # PyTorch adds in order only if the tensor has a second dimension. `unsafe` skips a check for which the host
        # would wait for the device.
        by_row = x.double().unsqueeze(1)
        return torch.segment_reduce(by_row, "sum", offsets=self.cu_seqlens, axis=0, unsafe=True).squeeze(1)

    def map_lengths(self, host: Callable[[int], int], device: Callable[[Tensor], Tensor]) -> "Layout":
        """Create a layout with new lengths, computed on both host and device so that neither waits for the other.

        Args:
            host: Maps the length of one sequence to its new length.
            device: The same function on tensors: maps `device_lengths` (B,) to the new lengths (B,).
        """
        return Layout.from_device(tuple(map(host, self.lengths)), device(self.device_lengths))

    @kept_by_plan
    def after_conv(self, kernel: int, stride: int) -> "Layout":
        """Return the layout after an unpadded convolution: floor((length - kernel) / stride) + 1 frames, at least 0.

        Args:
            kernel: Kernel width in frames.
            stride: Stride in frames.

        Raises:
            ValueError: `kernel` or `stride` is below 1.
        """
        if kernel < 1 or stride < 1:
            raise ValueError(f"kernel and stride: must be at least 1, got {kernel} and {stride}")
        return self.map_lengths(
            lambda length: max(0, (length - kernel) // stride + 1),
            lambda lengths: ((lengths - kernel) // stride + 1).clamp(min=0),
        )

    @kept_by_plan
    def with_gaps(self, before: int, after: int) -> "Layout":
        """Return a layout with `before` extra rows in front of each sequence and `after` extra rows after it."""
        gap = before + after
        return self.map_lengths(lambda length: length + gap, lambda lengths: lengths + gap)

    def plan(self, use: Callable[["Layout"], object]) -> None:
        """Compute on the host what `use` asks of this layout, and send all of it to the device in one copy.

        Without a plan, a layout on a GPU computes every derived layout and index there, in about five small launches
        each. After it, this layout and those derived from it (`after_conv`, `with_gaps`) have what `use` asked for, and
        keep what they are asked for later. The host does not wait. Only the first plan counts. Nothing happens on the
        CPU, inside `torch.compile`, and while a CUDA graph is captured, which would copy again from freed memory.

        Args:
            use: Function that asks a layout of the same lengths, on the host, for layouts and properties.
        """
        if self.cu_seqlens.device.type == "cpu" or torch.compiler.is_compiling() or _PLANNED in self.__dict__:
            return
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return
        there = Layout.planned(self.lengths, device=self.cu_seqlens.device, use=use)
        self.__dict__.update(there._parts(), **{_PLANNED: True})

    def prepare(self, use: Callable[["Layout"], object]) -> None:
        """Compute what `use` asks of this layout, which is on the host, and keep it for `tensors` and `holding`."""
        self.__dict__[_PLANNED] = True
        use(self)

    def _parts(self) -> dict[str, "Tensor | Layout"]:
        """Return what the layout keeps besides its fields, by name."""
        return {name: part for name, part in vars(self).items() if name not in _FIELDS and name != _PLANNED}

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors of a layout, of what it keeps, and of the layouts that it keeps."""
        yield self.cu_seqlens
        for part in self._parts().values():
            yield from part.tensors() if isinstance(part, Layout) else (part,)

    def holding(self, tensors: Iterator[Tensor]) -> "Layout":
        """Return a planned copy of a layout and of what it keeps, with other tensors in the order of `tensors`."""
        copy = replace(self, cu_seqlens=next(tensors))
        for name, part in self._parts().items():
            copy.__dict__[name] = part.holding(tensors) if isinstance(part, Layout) else next(tensors)
        copy.__dict__[_PLANNED] = True
        return copy

    @kept_by_plan
    def rows_with_gaps(self, before: int, after: int) -> Tensor:
        """Return the row of each frame in the layout `with_gaps(before, after)`: (N,) int64 on the device."""
        positions = self.positions + before if before else self.positions
        return self.with_gaps(before, after).rows(self.sequence_ids, positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Layout":
        """Return the same layout with `cu_seqlens` on another device.

        Args:
            device: Target device.
            non_blocking: Let the host continue without waiting for the copy, as in `torch.Tensor.to`.
        """
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking))

    def beside(self, x: Tensor) -> "Layout":
        """Return the same layout on the device of `x`; from a GPU to the CPU without waiting for the GPU."""
        if self.cu_seqlens.device.type == x.device.type:
            return self
        return Layout.from_lengths(self.lengths, device=x.device)

    def pin_memory(self) -> "Layout":
        """Return the same layout with `cu_seqlens` in page-locked memory, for an asynchronous copy to a GPU."""
        return replace(self, cu_seqlens=self.cu_seqlens.pin_memory())


_FIELDS = frozenset(field.name for field in fields(Layout))


class Packed(NamedTuple):
    """The frames of all sequences of a batch, back to back.

    Attributes:
        values: (N, ...) frames, sequence after sequence.
        layout: Where each sequence begins.
    """

    values: Tensor  # (N, ...)
    layout: Layout

    @classmethod
    def pack(cls, sequences: Sequence[Tensor]) -> "Packed":
        """Concatenate sequences.

        Args:
            sequences: B tensors (T_b, ...) with the same trailing shape, dtype and device.

        Returns:
            The sequences as one tensor (N, ...) on their device, where N is the sum of all T_b.

        Raises:
            ValueError: `sequences` is empty, or the trailing shapes differ.
        """
        if not sequences:
            raise ValueError("sequences: nothing to pack, expected at least one tensor")
        shapes = [tuple(sequence.shape) for sequence in sequences]
        if () in shapes or len({shape[1:] for shape in shapes}) > 1:
            raise ValueError(f"sequences: must agree in all dimensions but the first, got shapes {shapes}")
        lengths = [sequence.shape[0] for sequence in sequences]
        return cls(torch.cat(tuple(sequences)), Layout.from_lengths(lengths, device=sequences[0].device))

    def unpack(self) -> list[Tensor]:
        """Return the B sequences, each a view (T_b, ...) of `values`."""
        return list(self.values.split(self.layout.lengths)) if self.layout.lengths else []

    @classmethod
    def from_padded(cls, x: Tensor, lengths: Sequence[int] | Tensor | Layout) -> "Packed":
        """Remove the padding of a batch.

        Args:
            x: (B, T, ...) batch, each sequence padded at its end.
            lengths: Valid length of each of the B sequences, or a layout with these lengths. If they are a tensor on a
                GPU, the host waits for it once.

        Returns:
            The valid frames (N, ...), in the dtype of `x`.

        Raises:
            ValueError: The number of lengths is not B, or a length is negative or above T.
        """
        if isinstance(lengths, Tensor):
            lengths = lengths.tolist()
        layout = lengths if isinstance(lengths, Layout) else Layout.from_lengths(lengths, device=x.device)
        if x.dim() < 2 or len(layout.lengths) != x.shape[0]:
            raise ValueError(f"lengths: got {len(layout.lengths)}, expected one per sequence of x {tuple(x.shape)}")
        if layout.max_length > x.shape[1]:
            raise ValueError(f"lengths: longest is {layout.max_length}, must fit in dimension 1 of x {tuple(x.shape)}")
        # A new layout is returned without indices. For waveforms, these take four times as much memory as the samples.
        indexed = layout if layout is lengths else replace(layout)
        return cls(indexed.padded_rows(x.shape[1]).pack(x), layout)

    def to_padded(self, value: float = 0.0, *, length: int | None = None, left: tuple[bool, ...] = ()) -> Tensor:
        """Pad each sequence at its end, or at its beginning.

        Args:
            value: Value of the padding.
            length: T, the padded length; None pads to the longest sequence.
            left: For each sequence, whether it is padded at its beginning; empty if none is.

        Returns:
            (B, T, ...) in the dtype of `values`.

        Raises:
            ValueError: `length` is below the longest sequence.
        """
        longest = self.layout.max_length
        length = longest if length is None else length
        if length < longest:
            raise ValueError(f"length: {length} is less than the longest sequence, {longest}")
        return self.layout.padded_rows(length, left).pad(self.values, value)

    def spread(self, layout: Layout, *, before: int = 0) -> "Packed":
        """Copy each sequence into a longer slot: `before` zero rows in front, the remaining zeros after it.

        Args:
            layout: Layout of the slots, one per sequence; each must have room for `before` rows and the sequence.
            before: Number of zero rows in front of each sequence.

        Returns:
            The slots (layout.total, ...), in the dtype of `values`.
        """
        own = self.layout
        return self._spread(layout.rows(own.sequence_ids, own.positions + before if before else own.positions), layout)

    def _spread(self, rows: Tensor, layout: Layout) -> "Packed":
        zeros = self.values.new_zeros(layout.total, *self.values.shape[1:])
        return Packed(zeros.index_copy_(0, rows, self.values), layout)

    def with_gaps(self, before: int, after: int) -> "Packed":
        """Return the batch with `before` zero rows in front of each sequence and `after` zero rows after it."""
        return self._spread(self.layout.rows_with_gaps(before, after), self.layout.with_gaps(before, after))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packed":
        """Return the same batch on another device.

        Args:
            device: Target device.
            non_blocking: Let the host continue without waiting for the copy, as in `torch.Tensor.to`.
        """
        values = self.values.to(device, non_blocking=non_blocking)
        return Packed(values, self.layout.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Packed":
        """Return the same batch in page-locked memory, for an asynchronous copy to a GPU."""
        return Packed(self.values.pin_memory(), self.layout.pin_memory())


class PaddedRows(NamedTuple):
    """The place of each row of a packed tensor in a padded batch (B, T, ...).

    `Layout.padded_rows` builds one for sequences padded at one end; `from_mask` builds one for frames anywhere.

    Attributes:
        rows: (N,) int64 row numbers in the flattened batch (B * T, ...).
        layout: Layout of the N packed rows.
        length: T, the padded length.
    """

    rows: Tensor  # (N,) int64 row numbers in the flattened batch (B * T, ...)
    layout: Layout
    length: int  # T

    @classmethod
    def from_mask(cls, mask: Tensor) -> "PaddedRows":
        """Find the places where a mask is True. The host waits for the device once.

        Args:
            mask: (B, T) bool, True at the frames to keep.
        """
        layout = Layout.from_lengths(mask.sum(1).tolist(), device=mask.device)
        rows = mask.flatten().nonzero_static(size=layout.total).squeeze(1)  # `nonzero` would wait for the size
        return cls(rows, layout, mask.shape[1])

    def pack(self, x: Tensor) -> Tensor:  # (B, T, ...) -> (N, ...)
        """Gather the packed rows from a padded batch.

        Args:
            x: (B, T, ...) padded batch.

        Returns:
            (N, ...) packed rows.
        """
        return x.flatten(0, 1).index_select(0, self.rows)

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:  # (N, ...) -> (B, T, ...)
        """Write packed rows to their places in a padded batch.

        Args:
            x: (N, ...) packed rows.
            value: Value of all other places.

        Returns:
            (B, T, ...) padded batch.
        """
        batch, shape = len(self.layout.lengths), x.shape[1:]
        padded = x.new_full((batch * self.length, *shape), value).index_copy_(0, self.rows, x)
        # Not a view, on which hooks get lost or crash if the batch is then changed in place.
        whole: Tensor = torch.ops.aten._unsafe_view.default(padded, (batch, self.length, *shape))
        return whole
