"""Collect the results of one tree by name, and write them to a file for comparison with another tree."""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bits.trees import RANDOMNESS
from fastssl import Layout

Results = dict[str, Tensor | str]


def drawing() -> AbstractContextManager[None]:
    """Return a context in which dropout draws by the version given to the tree; older trees know only the first."""
    version = os.environ.get(RANDOMNESS)
    if version is None or importlib.util.find_spec("fastssl.kernels.randomness") is None:
        return nullcontext()
    from fastssl.kernels.randomness import using_randomness

    return using_randomness(int(version))


class Record:
    """Collects results by name: tensors bit by bit, all other values as text.

    Args:
        match: Skip calls whose name does not contain this text.
    """

    def __init__(self, match: str = "") -> None:
        self.match = match
        self.results: Results = {}

    def add(self, name: str, value: Any) -> None:
        """Add a value. An item of a container is named by the container's name and its key; None is left out."""
        if value is None:
            return
        if isinstance(value, Tensor):
            self.results[name] = value.detach().clone()
        elif isinstance(value, Layout):
            self.add(f"{name}.cu_seqlens", value.cu_seqlens)
            self.results[f"{name}.lengths"] = str(value.lengths)
        elif is_dataclass(value):
            self.add(name, _attributes(value))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.add(f"{name}.{key}", item)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for key, item in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
                self.add(f"{name}.{key}", item)
        else:
            self.results[name] = str(value)

    def attempt(self, name: str, call: Callable[[], Any]) -> None:
        """Add the result of a call, or the type of the error it raises; the error's message is ignored."""
        if self.match not in name:
            return
        try:
            value = call()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            self.results[name] = f"raises {type(error).__name__}"
        else:
            self.add(name, value)

    def save(self, path: str | Path) -> None:
        """Write all results to a file that `load` reads."""
        torch.save(self.results, path)


def _attributes(value: Any) -> dict[str, Any]:
    """Return the public fields and cached properties of an instance of a dataclass, by name."""
    names = [field.name for field in fields(value)]
    names += [name for name, member in vars(type(value)).items() if isinstance(member, cached_property)]
    return {name: getattr(value, name) for name in names if not name.startswith("_")}


def load(path: Path) -> Results:
    """Read the results that `Record.save` wrote."""
    results: Results = torch.load(path, weights_only=True)
    return results


def score(value: Any) -> Tensor:
    """Return a weighted sum of all tensors in a result that require gradients, as a () fp64 tensor.

    The weights are irregular, so that no direction of the gradient cancels by symmetry.
    """
    total = torch.zeros((), dtype=torch.float64)
    for x in _differentiable(value):
        weights = torch.sin(torch.arange(x.numel(), dtype=torch.float64) + 1).reshape(x.shape)
        total = total + (x.double() * weights).sum()
    return total


def _differentiable(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, Layout | str):
        return []
    if is_dataclass(value):
        value = _attributes(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    return [x for item in value for x in _differentiable(item)] if isinstance(value, Sequence) else []


def with_gradients(call: Callable[[], Any], leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return {"out": the result of a call, "grad": the gradients of its `score` by leaf name}."""
    value = call()
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    total = score(value)
    if not total.requires_grad:
        return {"out": value}
    gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {"out": value, "grad": dict(zip(wanted, gradients, strict=True))}
