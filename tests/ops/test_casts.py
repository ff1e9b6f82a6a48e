"""Test casts of several tensors at once."""

import pytest
import torch
from torch import Tensor

from fastssl.kernels import dispatch


@pytest.mark.parametrize("together", [False, True])
def test_tensors_and_their_gradients_are_cast(together: bool) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 2)]
    for tensor in tensors:
        tensor.requires_grad_()
    if together:  # as on a GPU
        cast: list[Tensor] = list(dispatch._CastTogether.apply(torch.bfloat16, *tensors))
    else:
        cast = dispatch.cast_together(tensors, torch.bfloat16)
    for one, tensor in zip(cast, tensors, strict=True):
        assert torch.equal(one, tensor.bfloat16())
    loss = cast[0].square().sum() + cast[1].sum()  # the third has no gradient
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    expected = torch.autograd.grad(tensors[0].bfloat16().square().sum() + tensors[1].bfloat16().sum(), tensors[:2])
    assert grads[2] is None
    for grad, one in zip(grads, expected, strict=False):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, one)


def test_a_tensor_of_the_dtype_stays() -> None:
    tensors = [torch.empty(3, device="meta"), torch.empty(4, dtype=torch.float16, device="meta")]
    first, second = dispatch.cast_together(tensors, torch.float16)
    assert (first.dtype, first.shape) == (torch.float16, (3,))
    assert second is tensors[1]
