import copy
import pickle
from dataclasses import fields
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl import packing
from fastssl.packing import Layout, Packed, PaddedRows
from tests.device_waits import device_waits

FIELDS = {field.name for field in fields(Layout)}
KEPT = {"device_lengths", "sequence_ids", "positions"}


def used(layout: Layout) -> Layout:
    """Return the layout after filling its cached properties."""
    assert layout.positions.device == layout.cu_seqlens.device
    assert set(vars(layout)) == FIELDS | KEPT
    return layout


class Calls(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@given(st.lists(st.integers(0, 50), max_size=8))
def test_layout_says_where_each_row_belongs(lengths: list[int]) -> None:
    layout = Layout.from_lengths(lengths)
    rows = [(sequence, position) for sequence, length in enumerate(lengths) for position in range(length)]
    assert layout.total == len(rows)
    assert layout.max_length == max(lengths, default=0)
    assert tuple(layout.cu_seqlens.tolist()) == layout.offsets
    assert list(zip(layout.sequence_ids.tolist(), layout.positions.tolist(), strict=True)) == rows
    assert layout.sequence_ids.dtype == layout.positions.dtype == torch.int64
    assert layout.device_lengths.tolist() == lengths
    assert layout.device_lengths.dtype == torch.int32
    assert layout.divisors.tolist() == [max(1, length) for length in lengths]
    by_step = [position * max(2, len(lengths)) + sequence for sequence, position in rows]
    assert layout.rows_by_step.tolist() == by_step
    assert torch.equal(layout.rows(layout.sequence_ids, layout.positions), torch.arange(len(rows)))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_pack_and_pad_are_inverse(lengths: list[int]) -> None:
    sequences = [torch.randn(length, 3) for length in lengths]
    packed = Packed.pack(sequences)
    assert all(torch.equal(a, b) for a, b in zip(packed.unpack(), sequences, strict=True))
    padded = packed.to_padded(value=7.0)
    assert padded.shape == (len(lengths), max(lengths), 3)
    assert all((padded[b, length:] == 7.0).all() for b, length in enumerate(lengths))
    assert torch.equal(Packed.from_padded(padded, lengths).values, packed.values)
    assert torch.equal(Packed.from_padded(padded, torch.tensor(lengths)).values, packed.values)


def test_gradients_pass_through_padding() -> None:
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    layout = Layout.from_lengths([2, 0, 3])
    assert torch.autograd.gradcheck(lambda v: Packed(v, layout).to_padded(), (values,))
    padded = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: Packed.from_padded(p, [2, 0, 4]).values, (padded,))


@given(st.lists(st.integers(0, 400), min_size=1, max_size=5), st.integers(1, 10), st.integers(1, 6))
def test_after_conv_counts_what_torch_makes(lengths: list[int], kernel: int, stride: int) -> None:
    expected = [
        torch.nn.functional.conv1d(torch.zeros(1, 1, length), torch.zeros(1, 1, kernel), stride=stride).shape[-1]
        if length >= kernel
        else 0
        for length in lengths
    ]
    layout, expected_layout = Layout.from_lengths(lengths).after_conv(kernel, stride), Layout.from_lengths(expected)
    assert layout.lengths == expected_layout.lengths
    assert torch.equal(layout.cu_seqlens, expected_layout.cu_seqlens)
    assert layout.cu_seqlens.dtype == torch.int32
    assert (layout.max_length, layout.total) == (expected_layout.max_length, expected_layout.total)


def test_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match="lengths: must not be negative"):
        Layout.from_lengths([3, -1])
    with pytest.raises(ValueError, match="kernel and stride"):
        Layout.from_lengths([3]).after_conv(0, 1)
    with pytest.raises(ValueError, match="sequences: nothing to pack"):
        Packed.pack([])
    with pytest.raises(ValueError, match="sequences: must agree"):
        Packed.pack([torch.zeros(3, 2), torch.zeros(3, 1)])
    with pytest.raises(ValueError, match="lengths: got 1, expected one per sequence"):
        Packed.from_padded(torch.zeros(2, 4), [3])
    with pytest.raises(ValueError, match="lengths: longest is 5"):
        Packed.from_padded(torch.zeros(2, 4), [3, 5])


def test_padded_to_a_given_length() -> None:
    packed = Packed.pack([torch.ones(2, 3), torch.ones(4, 3)])
    padded = packed.to_padded(length=6)
    assert padded.shape == (2, 6, 3)
    assert torch.equal(padded[:, :4], packed.to_padded())
    assert not padded[:, 4:].any()
    with pytest.raises(ValueError, match="length: 3 is less than the longest sequence, 4"):
        packed.to_padded(length=3)


def test_sequences_may_be_padded_at_their_beginning() -> None:
    packed, left = Packed.pack([torch.randn(length, 3) for length in (2, 0, 4, 1)]), (True, True, False, True)
    padded = packed.to_padded(7.0, length=6, left=left)
    for row, sequence, before in zip(padded, packed.unpack(), left, strict=True):
        place = slice(6 - len(sequence), 6) if before else slice(0, len(sequence))
        expected = torch.full((6, 3), 7.0)
        expected[place] = sequence
        assert torch.equal(row, expected)
    assert torch.equal(packed.layout.padded_rows(6, left).pack(padded), packed.values)


def reversed_halves(layout: Layout) -> Layout:
    return layout.map_lengths(lambda length: 50 - length // 2, lambda lengths: 50 - lengths // 2)


@given(st.lists(st.integers(0, 50), max_size=8))
def test_mapped_lengths_are_the_same_on_host_and_device(lengths: list[int]) -> None:
    layout = reversed_halves(Layout.from_lengths(lengths))
    expected = Layout.from_lengths([50 - length // 2 for length in lengths])
    assert (layout.lengths, layout.max_length, layout.total) == (expected.lengths, expected.max_length, expected.total)
    assert torch.equal(layout.cu_seqlens, expected.cu_seqlens)
    assert layout.cu_seqlens.dtype == torch.int32


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 3), st.integers(0, 3))
def test_gaps_are_zeros_around_each_sequence(lengths: list[int], before: int, after: int) -> None:
    sequences = [torch.randn(length, 3) for length in lengths]
    packed = Packed.pack(sequences).with_gaps(before, after)
    expected = [torch.nn.functional.pad(sequence, (0, 0, before, after)) for sequence in sequences]
    assert packed.layout.lengths == tuple(map(len, expected))
    assert torch.equal(packed.layout.cu_seqlens, Packed.pack(expected).layout.cu_seqlens)
    assert torch.equal(packed.values, torch.cat(expected))


def test_sequences_spread_into_slots_of_any_length() -> None:
    packed = Packed.pack([torch.ones(2), torch.ones(0), torch.ones(1)])
    spread = packed.spread(Layout.from_lengths([4, 1, 2]), before=1)
    assert spread.values.tolist() == [0, 1, 1, 0, 0, 0, 1]
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: Packed(v, packed.layout).with_gaps(1, 2).values, (values,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [700], [300, 0, 399, 1]])
def test_sums_are_added_in_order(lengths: list[int], dtype: torch.dtype) -> None:
    layout = Layout.from_lengths(lengths)
    x = (100 * torch.randn(layout.total, 2)).to(dtype)
    sums = layout.sums(x)
    assert sums.dtype == torch.float64
    assert sums.shape == (len(lengths), 2)
    for found, sequence in zip(sums, Packed(x, layout).unpack(), strict=True):
        for channel in range(2):
            *_, expected = accumulate(sequence[:, channel].double().tolist(), initial=0.0)
            assert found[channel].item() == expected
    assert torch.equal(layout.sums(x[:, 1].contiguous()), sums[:, 1])


def test_gradients_pass_through_sums() -> None:
    layout = Layout.from_lengths([2, 0, 3])
    assert torch.autograd.gradcheck(layout.sums, (torch.randn(5, dtype=torch.float64, requires_grad=True),))


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_rows_of_a_mask_may_lie_anywhere(mask: list[list[bool]]) -> None:
    valid, x = torch.tensor(mask), torch.randn(len(mask), 5, 2)
    rows = PaddedRows.from_mask(valid)
    assert rows.layout.lengths == tuple(map(sum, mask))
    assert torch.equal(rows.pack(x), x[valid])
    assert torch.equal(rows.pad(x[valid], 7.0), torch.where(valid.unsqueeze(2), x, 7.0))


def test_padding_is_dropped_by_a_layout_too() -> None:
    packed = Packed.pack([torch.randn(2, 3), torch.randn(0, 3), torch.randn(4, 3)])
    found = Packed.from_padded(packed.to_padded(length=6), packed.layout)
    assert found.layout is packed.layout  # with the indices that it keeps
    assert torch.equal(found.values, packed.values)
    with pytest.raises(ValueError, match="lengths: longest is 4"):
        Packed.from_padded(torch.zeros(3, 3), packed.layout)


def test_tensors_of_a_layout_are_computed_once() -> None:
    layout = used(Layout.from_lengths([3, 0, 4]))
    with Calls() as calls:
        assert layout.positions is layout.positions
        assert layout.sequence_ids is layout.sequence_ids
        assert layout.device_lengths is layout.device_lengths
    assert calls.names == []


def test_what_a_layout_keeps_is_neither_pickled_nor_copied() -> None:
    layout, fresh = used(Layout.from_lengths([300, 0, 4000])), Layout.from_lengths([300, 0, 4000])
    pickled = pickle.dumps(layout)
    assert len(pickled) == len(pickle.dumps(fresh))
    for other in (pickle.loads(pickled), copy.copy(layout), copy.deepcopy(layout), layout.to("cpu")):
        assert set(vars(other)) == FIELDS
        assert other.lengths == layout.lengths
        assert torch.equal(other.positions, layout.positions)
    # Packing waveforms must not cache an index per sample, which would take more memory than the waveforms.
    waveforms = Packed.from_padded(torch.zeros(2, 400), [400, 30])
    assert set(vars(waveforms.layout)) == FIELDS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_host_does_not_wait_and_kept_tensors_are_on_the_device() -> None:
    pinned = used(Layout.from_lengths([3, 0, 4])).pin_memory()
    layout = pinned.to("cuda", non_blocking=True)
    assert set(vars(pinned)) == set(vars(layout)) == FIELDS
    assert used(layout).positions.is_cuda
    x = torch.randn(layout.total, 2, device="cuda")

    def step() -> None:
        fresh = layout.to("cuda")
        reversed_halves(fresh)
        packed = Packed(x, fresh).with_gaps(1, 1)
        Packed.from_padded(packed.to_padded(), packed.layout)
        fresh.sums(x)

    assert device_waits(step) == []


def test_a_layout_first_used_in_inference_mode_serves_training() -> None:
    layout = Layout.from_lengths([3, 1, 4])
    with torch.inference_mode():
        used(layout)
    weights = torch.ones(3, requires_grad=True)
    ((weights / layout.device_lengths)[layout.sequence_ids] * layout.positions).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [1.0, 0.0, 1.5]


def test_fake_tensors_do_not_get_into_real_layouts() -> None:
    layout = Layout.from_lengths([3, 0, 4])
    with FakeTensorMode() as mode:
        fake = Layout(layout.lengths, mode.from_tensor(layout.cu_seqlens), layout.max_length, layout.total)
        assert isinstance(used(fake).positions, FakeTensor)
        padded = Packed(torch.randn(7, 2), fake).to_padded()
        assert padded.shape == (3, 4, 2)
    assert not isinstance(used(layout).positions, FakeTensor)


def _around(x: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    packed = Packed(x, layout)
    padded = packed.to_padded(length=9)
    lengths = layout.after_conv(2, 1).device_lengths
    return padded, Packed.from_padded(padded, layout).values, packed.with_gaps(1, 2).values, layout.sums(x), lengths


def test_compiled_code_keeps_nothing_and_sees_nothing_kept() -> None:
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_around, fullgraph=True, dynamic=True, backend=backend)
    for lengths in ([3, 0, 4], [5, 2, 7]):
        layout, x = Layout.from_lengths(lengths), torch.randn(sum(lengths), 2, dtype=torch.float64, requires_grad=True)
        found = compiled(x, layout)
        assert set(vars(layout)) == FIELDS
        graphs = backend.frame_count
        again = compiled(x, used(layout))
        assert backend.frame_count == graphs
        for expected, one, two in zip(_around(x, layout), found, again, strict=True):
            assert torch.equal(one, expected)
            assert torch.equal(two, expected)
        assert torch.equal(*(torch.autograd.grad(out[0].square().sum(), x)[0] for out in (found, _around(x, layout))))


def test_valid_places() -> None:
    valid = Layout.from_lengths([2, 0, 3]).valid(4)
    assert valid.tolist() == [[True, True, False, False], [False] * 4, [True, True, True, False]]


@pytest.mark.parametrize("at_once", [False, True])
def test_a_plan_is_one_copy_and_nothing_is_computed_after_it(monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    sent: list[Tensor] = []

    def note(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
        sent.extend(tensors)
        return real_send(tensors, device)

    def use(layout: Layout) -> list[Tensor]:
        frames = layout.after_conv(3, 2).after_conv(2, 1)
        frames.ask_for_indices()
        indices = [frames.cu_seqlens, frames.positions, frames.sequence_ids]
        padded = [frames.padded_rows(20), frames.padded_rows(length=21), frames.padded_rows(20, (True, False, True))]
        return [*indices, frames.rows_with_gaps(0, 3), *(places.rows for places in padded)]

    real_send = packing.send
    monkeypatch.setattr("fastssl.packing.send", note)
    if at_once:
        layout = Layout.planned([30, 0, 17], device=torch.device("meta"), use=use)
    else:
        layout = Layout.from_lengths([30, 0, 17]).to("meta")
        layout.plan(use)
    assert len(sent) > 8
    with Calls() as calls:
        found = use(layout)
        layout.plan(use)
    assert calls.names == []
    assert all(tensor.is_meta for tensor in found)
    expected = use(Layout.from_lengths([30, 0, 17]))
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in expected]
    # What was sent, on the host, is what an unplanned layout computes.
    for wanted in expected:
        assert any(wanted.dtype == one.dtype and torch.equal(wanted, one) for one in sent)


def test_tensors_that_are_sent_together_keep_shape_dtype_and_alignment() -> None:
    tensors = [torch.arange(5, dtype=torch.int32), torch.tensor([True, False]).view(1, 2), torch.empty(0, 3)]
    assert packing.send(tensors, torch.device("cpu")) == tensors
    sent = packing.send([*tensors, torch.tensor(7)], torch.device("meta"))
    assert [(one.shape, one.dtype) for one in sent[:-1]] == [(one.shape, one.dtype) for one in tensors]
    assert len({one.untyped_storage()._cdata for one in sent}) == 1
    assert all(one.storage_offset() * one.element_size() % 16 == 0 for one in sent)


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("mps", True), ("xpu", True)])
def test_only_page_locked_memory_is_copied_without_waiting(
    monkeypatch: pytest.MonkeyPatch, device: str, waits: bool
) -> None:
    """Other memory may be freed, and used for something else, before it is copied."""
    copies: list[tuple[bool, bool]] = []
    real = torch.empty

    def empty(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        made = real(*args, **options)

        def to(where: torch.device, non_blocking: bool = False) -> Tensor:
            copies.append((pin_memory, not non_blocking))
            return made

        made.to = to  # type: ignore[method-assign, assignment]
        return made

    monkeypatch.setattr(torch, "empty", empty)
    (sent,) = packing.send([torch.tensor([3, 4])], torch.device(device))
    assert sent.tolist() == [3, 4]
    assert copies == [(not waits, waits)]


def test_the_host_stays_the_host_under_another_default_device() -> None:
    """As after `torch.set_default_device("cuda")`, under which PyTorch refuses page-locked memory."""
    with torch.device("meta"):
        layout = Layout.from_lengths([3, 0, 4])
        assert layout.cu_seqlens.tolist() == [0, 3, 3, 7]
        assert layout.positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
        buffer = packing.one_buffer([layout.cu_seqlens], pinned=False)
        assert buffer.device.type == "cpu"
        on_gpu = layout.to("meta")
        on_gpu.plan(lambda host: host.after_conv(2, 1).cu_seqlens.tolist())
        assert on_gpu.after_conv(2, 1).cu_seqlens.is_meta


def test_no_plan_is_copied_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run of the graph would copy from memory of the host that was freed after the capture."""
    host = Layout.from_lengths([30, 0, 17])
    with FakeTensorMode() as mode:
        on_gpu = torch.empty(4, dtype=torch.int32, device="cuda")
        layout = Layout(host.lengths, on_gpu, host.max_length, host.total)
        with monkeypatch.context() as patched:
            for question in ("is_initialized", "is_current_stream_capturing"):
                patched.setattr(torch.cuda, question, lambda: True)
            layout.plan(lambda _: pytest.fail("a copy from the host"))
        assert layout.after_conv(3, 2).device_lengths.device.type == "cuda"
    assert mode is not None
    assert set(vars(layout)) == FIELDS | {"device_lengths"}


def test_on_the_cpu_and_in_compiled_code_a_plan_changes_nothing() -> None:
    layout = Layout.planned([3, 4], device=torch.device("cpu"), use=lambda _: pytest.fail("a plan on the CPU"))
    layout.plan(lambda _: pytest.fail("a plan on the CPU"))
    assert set(vars(layout)) == FIELDS
    assert layout.after_conv(2, 1) is not layout.after_conv(2, 1)
