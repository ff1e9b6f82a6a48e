import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.kernels.philox import keep_mask, philox, resolve_seed, seeds_together

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


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5])
def test_keep_mask(dropout_p: float) -> None:
    seed = torch.tensor(-1234567890123456789)
    mask = keep_mask(seed, (251, 403), dropout_p=dropout_p)
    kept = mask.double().mean().item()
    assert abs(kept - (1 - dropout_p)) <= 4 * (dropout_p * (1 - dropout_p) / mask.numel()) ** 0.5
    shifted = keep_mask(seed, (100,), dropout_p=dropout_p, offset=7)
    assert torch.equal(shifted, mask.flatten()[28:128])
    assert keep_mask(seed, (0, 4), dropout_p=dropout_p).shape == (0, 4)


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


def test_on_the_cpu_seeds_are_drawn_one_by_one() -> None:
    def drawn() -> list[Tensor | None]:
        torch.manual_seed(0)
        return [resolve_seed(None, dropout_p=0.1, device=torch.device("cpu")) for _ in range(3)]

    expected = drawn()
    with seeds_together(torch.device("cpu")):
        assert drawn() == expected
