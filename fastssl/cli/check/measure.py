"""Compare a backend with the reference in fp64, and time it beside PyTorch."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.cli.check.cases import Case, Inputs, Outputs

_BUDGET_S = 0.5  # per kernel
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 20


class Agreement(NamedTuple):
    """How far a backend is from the reference in fp64.

    Attributes:
        error: Largest error of any output or gradient, relative to what is allowed: four times the error of the
            reference in the same dtype, plus 8 units in the last place of the largest value. At most 1 is right.
        worst: Name of the output or gradient with that error.
    """

    error: float
    worst: str


def agreement(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> Agreement:
    """Compare outputs and all gradients of a case.

    Args:
        case: The call.
        backend: Backend to check.
        dtype: Dtype of the floating inputs.
        device: Device to run on.
    """
    rounded = _leaves(case.inputs, dtype, device)
    found = _results(partial(case.run, rounded, backend), rounded)
    plain = _results(partial(case.run, rounded, "reference"), rounded)
    doubles = _leaves(rounded, torch.float64, device)
    exact = _results(partial(case.run, doubles, "reference"), doubles)
    compared = [
        Agreement(_relative_error(found[name], plain[name], expected), name)
        for name, expected in exact.items()
        if expected.numel()
    ]
    return max(compared, key=badness)


def badness(agreement: Agreement) -> tuple[bool, float]:
    """Return a key that sorts agreements from best to worst; NaN is the worst."""
    return math.isnan(agreement.error), agreement.error


def _relative_error(found: Tensor, plain: Tensor, exact: Tensor) -> float:
    unit = torch.finfo(found.dtype).eps
    allowed = 4 * (plain.double() - exact).abs().max() + 8 * unit * exact.abs().max()
    error = (found.double() - exact).abs().max()
    return float(error / allowed) if allowed > 0 else float(error)


def milliseconds(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Time forward and backward of a backend and of PyTorch, which take turns.

    Args:
        case: The call.
        backend: Backend to time.
        dtype: Dtype of the floating inputs.
        device: Device to run on.

    Returns:
        Medians in milliseconds, of the backend and of PyTorch.
    """
    ours, theirs = _leaves(case.inputs, dtype, device), _leaves(case.plain_inputs, dtype, device)
    calls = [
        _training_call(partial(case.run, ours, backend), ours),
        _training_call(partial(case.plain, theirs), theirs),
    ]
    for call in calls:  # compiles, and fills caches
        _seconds(call, device)
    rounds: list[list[float]] = []
    began_s = time.perf_counter()
    while len(rounds) < _LEAST_ROUNDS or (len(rounds) < _MOST_ROUNDS and time.perf_counter() - began_s < _BUDGET_S):
        rounds.append([_seconds(call, device) for call in calls])
    ours_s, theirs_s = (statistics.median(times) for times in zip(*rounds, strict=True))
    return 1e3 * ours_s, 1e3 * theirs_s


def _leaves(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Copy tensors to the device as leaves; floating ones get the dtype and require gradients."""
    return {
        name: x.detach().to(device, dtype if x.is_floating_point() else None).requires_grad_(x.is_floating_point())
        for name, x in inputs.items()
    }


def _gradients(outputs: Outputs, inputs: Inputs, grads: Sequence[Tensor]) -> dict[str, Tensor]:
    names = [name for name, x in inputs.items() if x.requires_grad]
    found = torch.autograd.grad(outputs, [inputs[name] for name in names], grads)
    return {f"gradient of {name}": grad for name, grad in zip(names, found, strict=True)}


def _weights(output: Tensor) -> Tensor:
    """Return a gradient whose values differ, because equal ones could hide errors."""
    return torch.sin(torch.arange(output.numel(), device=output.device) + 1.0).view_as(output).to(output.dtype)


def _results(run: Callable[[], Outputs], inputs: Inputs) -> dict[str, Tensor]:
    outputs = run()
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return named | _gradients(outputs, inputs, [_weights(output) for output in outputs])


def _training_call(run: Callable[[], Outputs], inputs: Inputs) -> Callable[[], object]:
    grads = [_weights(output) for output in run()]
    return lambda: _gradients(run(), inputs, grads)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    began_s = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s
