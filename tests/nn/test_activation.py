"""Activations do not see where in a batch a frame lies."""

import pytest
import torch

from fastssl.nn.activation import sigmoid


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
