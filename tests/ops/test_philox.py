import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.kernels.philox import dropout, keep_mask, philox, resolve_seed, seeds_together
from fastssl.kernels.randomness import (
    RANDOMNESS,
    dropout_threshold,
    kept_fraction,
    resolve_randomness,
    using_randomness,
)

#: Seed, counter and output words, as published by the authors of Random123.
KNOWN = (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))


def test_known_answer() -> None:
    seed, counter, words = KNOWN
    found = philox(torch.tensor(seed), torch.tensor([counter]))
    assert tuple(int(word) for word in found) == words


def test_every_bit_of_seed_and_counter_counts() -> None:
    counters = torch.tensor([0, 1, 2**31, 2**32, 2**62])
    blocks = {
        tuple(words)
        for seed in (0, 1, -1, 2**32, 2**62, -(2**63))
        for words in torch.stack(philox(torch.tensor(seed), counters), 1).tolist()
    }
    assert len(blocks) == 6 * 5


@pytest.mark.parametrize("randomness", [1, 2])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5])
def test_keep_mask(dropout_p: float, randomness: int) -> None:
    seed = torch.tensor(-1234567890123456789)
    mask = keep_mask(seed, (251, 403), dropout_p=dropout_p, randomness=randomness)
    kept = mask.double().mean().item()
    assert abs(kept - (1 - dropout_p)) <= 4 * (dropout_p * (1 - dropout_p) / mask.numel()) ** 0.5
    shifted = keep_mask(seed, (100,), dropout_p=dropout_p, randomness=randomness, offset=7)
    begin = 7 * {1: 4, 2: 8}[randomness]
    assert torch.equal(shifted, mask.flatten()[begin : begin + 100])
    assert keep_mask(seed, (0, 4), dropout_p=dropout_p, randomness=randomness).shape == (0, 4)


@pytest.mark.parametrize(("count", "randomness"), [(11, 1), (21, 2)])
def test_each_element_has_its_bits_of_its_block(count: int, randomness: int) -> None:
    seed, offset = torch.tensor(77), 2**32 - 2
    words = torch.stack(philox(seed, torch.arange(offset, offset + 3)), 1).flatten().tolist()
    if randomness == 1:
        draws = [word / 2**32 for word in words]
    else:
        draws = [half / 2**16 for word in words for half in (word % 2**16, word >> 16)]
    for dropout_p in (0.25, 0.5, 0.75):
        mask = keep_mask(seed, (count,), dropout_p=dropout_p, randomness=randomness, offset=offset)
        assert mask.tolist() == [draw >= dropout_p for draw in draws[:count]]


def test_neighbours_are_dropped_independently() -> None:
    """Under version 2, two elements share a word, and eight a block."""
    for randomness in (1, 2):
        mask = keep_mask(torch.tensor(5), (100_000, 8), dropout_p=0.3, randomness=randomness)
        correlation = torch.corrcoef(torch.cat((mask[:-1], mask[1:]), 1).double().t())
        assert (correlation - torch.eye(16)).abs().max() < 5 / 100_000**0.5


def test_kept_elements_make_up_for_dropped_ones() -> None:
    """The mean of the result is that of the input, with the probability that 16 bits can express."""
    for randomness in (1, 2):
        for dropout_p in (2**-18, 0.1, 0.123456, 1 - 2**-18):
            threshold, kept = dropout_threshold(dropout_p, randomness), kept_fraction(dropout_p, randomness)
            assert 0 <= threshold < 2**32
            assert kept == pytest.approx(1 - threshold / 2**32, abs=2**-32)
            assert kept == pytest.approx(1 - dropout_p, abs=2**-16)
            assert threshold % 2**16 == 0 or randomness == 1
    x = torch.ones(2, 50)
    out = dropout(x, dropout_p=0.1, randomness=2, seed=torch.tensor(1))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - 6554 / 2**16)).item()}


def test_the_version_in_force() -> None:
    assert resolve_randomness(None) == RANDOMNESS == 2
    with using_randomness(1):
        assert resolve_randomness(None) == 1
        assert resolve_randomness(2) == 2
        with pytest.raises(ValueError, match="randomness: must be from 1 to 2, got 3"), using_randomness(3):
            pass
        assert resolve_randomness(None) == 1
    assert resolve_randomness(None) == 2


class Draws(TorchDispatchMode):
    """Counts the calls of torch.randint."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += "randint" in str(func)
        return func(*args, **kwargs or {})


def test_seeds_that_are_drawn_together() -> None:
    device = torch.device("meta")
    with Draws() as draws, seeds_together(device):
        seeds = [resolve_seed(None, dropout_p=0.1, device=device) for _ in range(129)]
    assert draws.count == 2
    places = {(seed.untyped_storage()._cdata, seed.storage_offset()) for seed in seeds if seed is not None}
    assert len(places) == 129
    assert all(seed is not None and seed.shape == () and seed.storage_offset() % 2 == 0 for seed in seeds)
    with Draws() as draws:
        assert [resolve_seed(None, dropout_p=0.1, device=device) for _ in range(3)]
    assert draws.count == 3


def test_seeds_that_are_drawn_together_are_on_the_device_that_needs_them() -> None:
    devices = [torch.device("meta"), torch.device("cpu")]
    with Draws() as draws, seeds_together(devices[0]):
        for device in devices * 2:
            seed = resolve_seed(None, dropout_p=0.1, device=device)
            assert seed is not None
            assert seed.device == device
    assert draws.count == 3  # one on the first device, and one per seed on the CPU


def test_on_the_cpu_seeds_are_drawn_one_by_one() -> None:
    def drawn() -> list[Tensor | None]:
        torch.manual_seed(0)
        return [resolve_seed(None, dropout_p=0.1, device=torch.device("cpu")) for _ in range(3)]

    expected = drawn()
    with seeds_together(torch.device("cpu")):
        assert drawn() == expected
