"""Count the operators of this package that a model runs: the test of whether its packed code runs."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.interop.tiny_models import padded_batch


class Operators(TorchDispatchMode):
    """Counts operators of this package."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.namespace.startswith("fastssl")
        return func(*args, **(kwargs or {}))


def count(model: Any) -> int:
    """Return how many operators of this package a model runs on a batch of two utterances of the same length."""
    with torch.no_grad(), Operators() as operators:
        model(padded_batch([5000, 5000])[0])
    calls: int = operators.calls
    return calls


def is_packed(model: Any) -> bool:
    return count(model) > 0
