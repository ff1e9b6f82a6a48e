import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.nn.masking import sample_negatives, sample_span_mask
from fastssl.nn.random import draw_keys, gumbel, normal, uniform, utterance_keys
from fastssl.packing import Layout

LENGTHS = st.lists(st.integers(0, 120), min_size=1, max_size=6)


def keys_of(batch: int, seed: int = 0) -> torch.Tensor:
    return draw_keys(batch, generator=torch.Generator().manual_seed(seed))


def test_uniform_is_uniform_and_streams_differ() -> None:
    keys = utterance_keys(0, 5, torch.arange(4)).unsqueeze(1)
    counters = torch.arange(50_000)
    draws = uniform(keys, counters, stream=0)
    assert draws.min() > 0
    assert draws.max() < 1
    histogram = torch.histc(draws, bins=100, min=0, max=1)
    expected = draws.numel() / 100
    # Chi-square with 99 degrees of freedom: mean 99, standard deviation 14.
    assert ((histogram - expected) ** 2 / expected).sum() < 99 + 5 * 14
    stacked = torch.cat([draws, uniform(keys, counters, stream=1), draws.roll(1, dims=1)])
    correlation = torch.corrcoef(stacked) - torch.eye(len(stacked))
    assert correlation.abs().max() < 0.025


def test_gumbel_has_its_mean_and_variance() -> None:
    noise = gumbel(torch.tensor(3), torch.arange(200_000), stream=3)
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772) < 0.02
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.05


def test_normal_numbers() -> None:
    keys, counters = utterance_keys(0, 5, torch.arange(2)).unsqueeze(1), torch.arange(100_000)
    noise = normal(keys, counters, stream=4)
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.var().item() - 1) < 0.02
    # The shares of a normal distribution within one, two and three standard deviations.
    for within, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert abs((noise.abs() < within).float().mean().item() - share) < 0.005
    stacked = torch.cat([noise, noise.roll(1, dims=1), normal(keys, counters, stream=5)])
    assert (torch.corrcoef(stacked) - torch.eye(6)).abs().max() < 0.02
    assert torch.equal(normal(keys[1:], counters[7:], stream=4), noise[1:, 7:])


def test_keys_differ_by_seed_update_and_utterance() -> None:
    ids = torch.tensor([1, 2, -(2**62)])
    keys = torch.cat([utterance_keys(seed, update, ids) for seed in (0, 1) for update in (-1, 0, 1)])
    assert len(keys.unique()) == len(keys)
    assert torch.equal(utterance_keys(0, 1, ids), utterance_keys(0, 1, ids))


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 1000))
def test_mask_and_negatives_do_not_depend_on_batch_mates(lengths: list[int], seed: int) -> None:
    layout, keys = Layout.from_lengths(lengths), keys_of(len(lengths), seed)
    mask = sample_span_mask(layout, keys, probability=0.65, length=10, min_spans=2)
    negatives = sample_negatives(mask, layout, keys, count=7)
    first = 0
    for b, part in enumerate(mask.split(lengths)):
        alone = Layout.from_lengths([lengths[b]])
        assert torch.equal(part, sample_span_mask(alone, keys[b : b + 1], probability=0.65, length=10, min_spans=2))
        count = int(part.sum())
        own = negatives[first : first + count]
        expected = sample_negatives(part, alone, keys[b : b + 1], count=7)
        assert torch.equal(torch.where(own >= 0, own - first, own), expected)
        first += count


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 1000))
def test_negatives_are_other_masked_frames_of_the_same_utterance(lengths: list[int], seed: int) -> None:
    layout, keys = Layout.from_lengths(lengths), keys_of(len(lengths), seed)
    mask = sample_span_mask(layout, keys, probability=0.5, length=4)
    negatives = sample_negatives(mask, layout, keys, count=20)
    utterance = layout.sequence_ids[mask]
    assert negatives.shape == (len(utterance), 20)
    for row, drawn in enumerate(negatives):
        mates = int((utterance == utterance[row]).sum()) - 1
        if mates == 0:
            assert (drawn == -1).all()
        else:
            assert (drawn != row).all()
            assert (utterance[drawn] == utterance[row]).all()


def test_negatives_are_uniform() -> None:
    layout, keys = Layout.from_lengths([40, 41]), keys_of(2)
    mask = torch.ones(81, dtype=torch.bool)
    negatives = sample_negatives(mask, layout, keys, count=10_000)
    counts = torch.bincount(negatives[50], minlength=81)[40:]
    expected = 10_000 / 40
    others = counts[torch.arange(41) != 10]
    assert counts[10] == 0
    # Chi-square with 39 degrees of freedom: mean 39, standard deviation 9.
    assert ((others - expected) ** 2 / expected).sum() < 39 + 5 * 9


def test_spans_have_the_length_and_share_of_the_paper() -> None:
    layout = Layout.from_lengths([500] * 40)
    mask = sample_span_mask(layout, keys_of(40), probability=0.65, length=10)
    # Spans overlap; simulating fairseq's sampler gives an expected share of 0.49.
    assert 0.47 < mask.float().mean().item() < 0.51
    edges = torch.nn.functional.pad(mask.view(40, 500).int(), (1, 1)).diff(dim=1)
    runs = (edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]
    assert runs.min() >= 10


def test_minimum_number_of_spans() -> None:
    layout = Layout.from_lengths([60])
    mask = sample_span_mask(layout, keys_of(1), probability=0.0, length=5, min_spans=2)
    assert 6 <= int(mask.sum()) <= 10
    assert not sample_span_mask(layout, keys_of(1), probability=0.0, length=5).any()


def test_rejects_bad_input() -> None:
    layout = Layout.from_lengths([10])
    with pytest.raises(ValueError, match="probability"):
        sample_span_mask(layout, keys_of(1), probability=1.5, length=5)
    with pytest.raises(ValueError, match="length"):
        sample_span_mask(layout, keys_of(1), probability=0.5, length=0)
