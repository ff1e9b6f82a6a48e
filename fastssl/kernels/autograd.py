"""What our `torch.autograd.Function`s cannot do: second derivatives, `torch.func` and forward-mode AD."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Backward = TypeVar("_Backward", bound=Callable[..., Any])
_NO_SECOND_DERIVATIVE = (
    b"fastssl's kernels have no second derivative; pass backend='reference' to an op, or `fastssl.restore` the model"
)


def is_transformed() -> bool:
    """Return whether a transform of `torch.func` or forward-mode AD is at work; code in plain PyTorch supports both.

    `torch.func.functional_call` by itself is no transform.
    """
    if not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0:
        return False  # the common case, with the fewest calls
    return not torch.compiler.is_compiling()


def once_differentiable(backward: _Backward) -> _Backward:
    """Decorate the backward of a `torch.autograd.Function` that has no derivative itself.

    PyTorch's decorator of this name notices a second differentiation only if the incoming gradient needs one. That of a
    loss does not, so a penalty on gradients (`create_graph=True`) would silently be a constant. This decorator makes
    the second differentiation an error.
    """

    @wraps(backward)
    def first_derivative(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled():  # without `create_graph=True`; a context would take longer than this test
            return backward(ctx, *grads)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if torch.compiler.is_compiling():
            return outputs
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        fail = torch._C._functions.DelayedError(_NO_SECOND_DERIVATIVE, len(several))
        leaves = [None if output is None else output.detach().requires_grad_() for output in several]
        marked = fail(*leaves)  # type: ignore[arg-type]  # takes None, too
        return marked if isinstance(outputs, tuple) else marked[0]

    return first_derivative  # type: ignore[return-value]
