"""Test how a batch moves to a device: in one copy from page-locked memory."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.data.batches import AudioBatch
from fastssl.data.segments import FrameSegments
from fastssl.data.teacher_frames import TeacherFrames
from fastssl.packing import Layout, Packed


def _batch() -> AudioBatch:
    """Return a batch with tensors of several dtypes, with sizes that are not aligned, and with one that is empty."""
    return AudioBatch(
        Packed.pack([torch.rand(9, 1), torch.rand(4, 1)]),
        ids=torch.tensor([3, 4]),
        names=("a.wav", "b.wav"),
        update=2,
        problems=(),
        labels=torch.arange(7),
        segments=FrameSegments(torch.rand(5), torch.tensor([True, False, True])),
        noise=Packed(torch.empty(0, 1), Layout.from_lengths([0, 0])),
        teacher=TeacherFrames((torch.rand(3, 2), torch.rand(3, 2).half()), None),
        draws=(torch.rand(3) > 0.5, None),
    )


def _tensors(batch: AudioBatch) -> list[Tensor]:
    assert batch.labels is not None
    assert batch.segments is not None
    assert batch.noise is not None
    assert batch.teacher is not None
    packed = (part for each in (batch.waveforms, batch.noise) for part in (each.values, each.layout.cu_seqlens))
    return [*packed, batch.labels, *batch.segments, *batch.teacher.layers, batch.draws[0]]


class _Copies(TorchDispatchMode):
    """Counts copies to the device "meta", and pretends that all memory of the host is page-locked."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func._schema.name == "aten::is_pinned":
            return True
        self.count += func._schema.name == "aten::_to_copy" and str(kwargs.get("device")) == "meta"
        return func(*args, **{name: value for name, value in kwargs.items() if name != "pin_memory"})


def test_a_batch_in_page_locked_memory_is_one_copy() -> None:
    batch = _batch()
    with _Copies() as copies:
        pinned = batch.pin_memory()
        moved = pinned.to("meta", non_blocking=True)
    assert copies.count == 1
    for one, there, original in zip(_tensors(pinned), _tensors(moved), _tensors(batch), strict=True):
        assert torch.equal(one, original)
        assert one.dtype == original.dtype
        assert there.is_meta
        assert (there.shape, there.dtype) == (one.shape, one.dtype)
        assert there.storage_offset() == one.storage_offset()
    assert (moved.draws[1], moved.names, moved.update) == (None, batch.names, 2)
    assert moved.waveforms.layout.lengths == batch.waveforms.layout.lengths


@pytest.mark.parametrize("pinned", [False, True])
def test_tensors_that_share_no_buffer_are_copied_one_by_one(pinned: bool) -> None:
    batch = _batch()
    with _Copies() if pinned else nullcontext():
        moved = batch.to("meta")
    for there, original in zip(_tensors(moved), _tensors(batch), strict=True):
        assert there.is_meta
        assert (there.shape, there.dtype) == (original.shape, original.dtype)
