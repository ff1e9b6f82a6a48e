"""Test that activations return the same bits for a frame wherever it is in the batch."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from fastssl.nn.activation import glu, sigmoid, silu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigmoid(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(1001, 50, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    alone = sigmoid(x)
    assert alone.dtype == dtype
    torch.testing.assert_close(alone, torch.sigmoid(x))
    for before in range(1, 24):
        batch = torch.cat([torch.zeros(before, 50, dtype=dtype), x])
        assert torch.equal(sigmoid(batch)[before:], alone)
    (grad,) = torch.autograd.grad(alone.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(torch.sigmoid(x).sum(), x)[0], rtol=0, atol=4e-3)


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Use three threads, so that a thread's share may end in the middle of a row."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("name", ["silu", "glu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_and_glu(name: str, dtype: torch.dtype) -> None:
    ours, plain = {"silu": (silu, F.silu), "glu": (glu, F.glu)}[name]
    x = (3 * torch.randn(1001, 100, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    alone = ours(x)
    assert alone.dtype == dtype
    torch.testing.assert_close(alone, plain(x))
    for before in range(1, 24):
        batch = torch.cat([torch.zeros(before, 100, dtype=dtype), x])
        assert torch.equal(ours(batch)[before:], alone)
    weights = torch.sin(torch.arange(alone.numel())).view_as(alone).to(dtype)
    (grad,) = torch.autograd.grad((alone * weights).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad((plain(x) * weights).sum(), x)[0])
    assert ours(x[:0]).shape == plain(x[:0]).shape


@pytest.mark.parametrize("name", ["silu", "glu"])
def test_compiled_activations(name: str) -> None:
    function = {"silu": silu, "glu": glu}[name]
    x = torch.randn(70, 8, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), function(x))
