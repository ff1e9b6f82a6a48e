"""Test that BEST-RQ's quantiser equals the paper's definition, and needs temporary memory for only one block."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.nn import random_projection
from fastssl.nn.random_projection import RandomProjectionQuantizer


def nearest(quantizer: RandomProjectionQuantizer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute equation 1 of the paper directly: the code whose difference has the smallest norm."""
    projected = F.normalize(x.to(dtype) @ quantizer.projection.to(dtype).t())
    codebook = F.normalize(quantizer.codebook.to(dtype))
    differences = projected.unsqueeze(1) - codebook  # (N, V, code_width)
    codes: Tensor = differences.norm(dim=2).argmin(1)
    return codes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    quantizer = RandomProjectionQuantizer(320, codes=2048, code_width=16)
    x = torch.randn(300, 320)
    codes = quantizer(x)
    assert codes.dtype == torch.int64
    assert len(codes.unique()) > 200
    assert torch.equal(codes, nearest(quantizer, x, dtype))


def test_is_frozen_saved_and_of_the_distributions_of_the_paper() -> None:
    torch.manual_seed(0)
    quantizer = RandomProjectionQuantizer(320, codes=4096, code_width=16)
    assert not list(quantizer.parameters())
    assert quantizer.state_dict().keys() == {"projection", "codebook"}
    assert not quantizer(torch.randn(3, 320, requires_grad=True)).requires_grad
    bound = (6 / (320 + 16)) ** 0.5
    assert 0.99 * bound < quantizer.projection.abs().max() <= bound
    torch.testing.assert_close(quantizer.projection.std(), torch.tensor(bound / 3**0.5), rtol=0.05, atol=0)
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(4096))
    # Directions are uniform on the sphere, where the fourth moment of a coordinate is 3 / (d (d + 2)).
    torch.testing.assert_close(quantizer.codebook.pow(4).mean(), torch.tensor(3 / (16 * 18)), rtol=0.05, atol=0)


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_blocks_bound_the_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    quantizer = RandomProjectionQuantizer(320, codes=512, code_width=16)
    x = torch.randn(101, 320)
    whole = quantizer(x)
    monkeypatch.setattr(random_projection, "_BLOCK", 10 * 512)
    with _Largest() as largest:
        assert torch.equal(quantizer(x), whole)
    assert largest.numbers <= 12 * 512  # blocks of 10 rows; a last block of one row is padded
    assert torch.equal(quantizer(x[100:]), whole[100:])
    assert quantizer(x[:0]).shape == (0,)


def test_half_precision_does_not_choose_other_codes() -> None:
    torch.manual_seed(0)
    quantizer = RandomProjectionQuantizer(320, codes=512, code_width=16)
    x = torch.randn(2_000, 320)  # about twenty of these rows would get another code in bf16
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(x)
    assert torch.equal(found, quantizer(x))
