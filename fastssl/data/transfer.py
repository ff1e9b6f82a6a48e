"""Move all tensors of a batch together: on a GPU's host, many small copies cost more than one large one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from fastssl.packing import Layout, one_buffer, views_of

_Part = TypeVar("_Part")


def to_device(parts: _Part, device: torch.device | str, *, non_blocking: bool) -> _Part:
    """Copy all tensors of a batch to a device, in one copy if `pin_memory` has put them into one buffer.

    Args:
        parts: Tensors, layouts and tuples of these, named or not, in any depth; anything else stays as it is.
        device: Target device.
        non_blocking: Let the host continue without waiting for the copy, as in `torch.Tensor.to`.
    """

    def move(tensors: Sequence[Tensor]) -> list[Tensor]:
        if not _share_pinned_memory(tensors):
            return [tensor.to(device, non_blocking=non_blocking) for tensor in tensors]
        buffer = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensors[0].untyped_storage())
        sent = buffer.to(device, non_blocking=non_blocking)
        begins = [tensor.storage_offset() * tensor.element_size() for tensor in tensors]
        bytes_of = [sent[begin : begin + one.nbytes] for begin, one in zip(begins, tensors, strict=True)]
        return [part.view(one.dtype).view(one.shape) for part, one in zip(bytes_of, tensors, strict=True)]

    return _with_tensors(parts, move)


def pin_memory(parts: _Part) -> _Part:
    """Copy all tensors of a batch into one buffer of page-locked memory; `parts` as in `to_device`."""
    return _with_tensors(parts, lambda tensors: views_of(one_buffer(tensors, pinned=True), tensors))


def _share_pinned_memory(tensors: Sequence[Tensor]) -> bool:
    places = {tensor.untyped_storage()._cdata for tensor in tensors if tensor.device.type == "cpu"}
    alike = len(places) == 1 and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
    return alike and len(tensors) > 1 and tensors[0].is_pinned()


def _with_tensors(parts: _Part, move: Callable[[list[Tensor]], list[Tensor]]) -> _Part:
    """Return the parts with other tensors: `move` gets all of them at once, and returns as many."""
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    _with_each(parts, collect)
    moved = iter(move(tensors))
    return _with_each(parts, lambda _: next(moved))


def _with_each(part: _Part, each: Callable[[Tensor], Tensor]) -> _Part:
    if isinstance(part, Tensor):
        return cast(_Part, each(part))
    if isinstance(part, Layout):
        return cast(_Part, replace(part, cu_seqlens=each(part.cu_seqlens)))
    if isinstance(part, tuple):
        inner = [_with_each(one, each) for one in part]
        return cast(_Part, type(part)(*inner) if hasattr(part, "_fields") else tuple(inner))
    return part
