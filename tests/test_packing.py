import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastssl.packing import Layout, Packed


@given(st.lists(st.integers(0, 50), max_size=8))
def test_layout_says_where_each_row_belongs(lengths: list[int]) -> None:
    layout = Layout.from_lengths(lengths)
    rows = [(sequence, position) for sequence, length in enumerate(lengths) for position in range(length)]
    assert layout.total == len(rows)
    assert layout.max_length == max(lengths, default=0)
    assert tuple(layout.cu_seqlens.tolist()) == layout.offsets
    assert list(zip(layout.sequence_ids.tolist(), layout.positions.tolist(), strict=True)) == rows


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
    with pytest.raises(ValueError, match="lengths: 1 of them"):
        Packed.from_padded(torch.zeros(2, 4), [3])
    with pytest.raises(ValueError, match="lengths: up to 5"):
        Packed.from_padded(torch.zeros(2, 4), [3, 5])


def test_padded_to_a_given_length() -> None:
    packed = Packed.pack([torch.ones(2, 3), torch.ones(4, 3)])
    padded = packed.to_padded(length=6)
    assert padded.shape == (2, 6, 3)
    assert torch.equal(padded[:, :4], packed.to_padded())
    assert not padded[:, 4:].any()
    with pytest.raises(ValueError, match="length: 3 is less than the longest sequence, 4"):
        packed.to_padded(length=3)
