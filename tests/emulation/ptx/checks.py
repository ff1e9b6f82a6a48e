"""Check the kernels of an op in the emulator: against the reference, with strides, alone, and without frames."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl.kernels.precision import SWITCHES, fp32_precision
from tests.emulation.ptx.launch import Emulator
from tests.emulation.ptx.subjects import Call, Subject
from tests.ops.common import cast, check_against_reference, gradients, layout_of
from tests.ops.standard import Inputs
from tests.ops.test_every_op import every_second


class Outcome(NamedTuple):
    """What one check has found."""

    op: str
    dtype: str
    check: str
    error: str | None


def _with_gradients(
    subject: Subject, call: Call, inputs: Inputs, lengths: tuple[int, ...], backend: str = "triton"
) -> list[Tensor]:
    """Return an output, and the gradients of the inputs that have a row per frame."""
    out = call(inputs, layout_of(lengths), backend)
    names = [name for name in subject.packed if inputs[name].is_floating_point() and name not in subject.constants]
    return [out.detach(), *(gradients(out, [inputs[name] for name in names]) if names else [])]


def against_the_reference(subject: Subject, call: Call, dtype: torch.dtype) -> None:
    _compare(subject, call, dtype, subject.lengths)


def without_frames(subject: Subject, call: Call, dtype: torch.dtype) -> None:
    for lengths in ((), (0, 0)):
        _compare(subject, call, dtype, lengths)


def _compare(subject: Subject, call: Call, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    check_against_reference(
        lambda inputs, backend: call(inputs, layout_of(lengths), backend),
        subject.make(lengths),
        backend="triton",
        device="cpu",
        dtype=dtype,
        backward=True,
        constants=subject.constants,
    )


def in_tf32(subject: Subject, call: Call, dtype: torch.dtype) -> None:
    """Check products of fp32 numbers in TF32: four times the error of the reference in fp16 is allowed.

    Both have 10 bits of mantissa, but for TF32 the tensor cores cut the others off, which may double each error.
    """
    inputs = subject.make(subject.lengths)
    with fp32_precision(convolutions="tf32", matrix_products="tf32"):
        found = _with_gradients(subject, call, cast(inputs, dtype), subject.lengths)
    plain, exact = (
        _with_gradients(subject, call, cast(inputs, of), subject.lengths, "reference")
        for of in (torch.float16, torch.float64)
    )
    for index, (x, rounded, right) in enumerate(zip(found, plain, exact, strict=True)):
        error, allowed = (x.double() - right).abs().max(), 4 * (rounded.double() - right).abs().max()
        assert error <= allowed, f"result {index}: off by {error:.3g}, allowed {allowed:.3g}"
    with fp32_precision(convolutions="ieee", matrix_products="ieee"):
        others = _with_gradients(subject, call, cast(inputs, dtype), subject.lengths)
    assert not torch.equal(found[0], others[0]), "the switch changes nothing"


def with_strides(subject: Subject, call: Call, dtype: torch.dtype) -> None:
    """Check that arguments that are not contiguous give the same bits."""
    inputs = cast(subject.make(subject.lengths), dtype)
    strided = {name: every_second(x) if x.dim() > 0 else x for name, x in inputs.items()}
    found = [_with_gradients(subject, call, each, subject.lengths) for each in (inputs, strided)]
    assert all(torch.equal(plain, other) for plain, other in zip(*found, strict=True))


def alone(subject: Subject, call: Call, dtype: torch.dtype) -> None:
    """Check that the first sequence has the same bits alone as in its batch."""
    inputs = cast(subject.make(subject.lengths), dtype)
    length = subject.lengths[0]
    own = {name: x.detach()[:length] if name in subject.packed else x.detach() for name, x in inputs.items()}
    own = cast({name: x.clone() for name, x in own.items()}, dtype)
    together = _with_gradients(subject, call, inputs, subject.lengths)
    by_itself = _with_gradients(subject, call, own, (length,))
    assert len(by_itself[0]) > 0
    for in_batch, single in zip(together, by_itself, strict=True):
        assert torch.equal(in_batch[: len(single)], single)


CHECKS: tuple[Callable[[Subject, Call, torch.dtype], None], ...] = (
    against_the_reference,
    with_strides,
    alone,
    without_frames,
    in_tf32,
)
#: Outputs that are sums over all frames, so that no part of them belongs to a sequence.
_SUMS = ("probability_sums",)


def outcomes(subject: Subject, dtype: torch.dtype, *, first_only: bool = False) -> list[Outcome]:
    """Run all checks of a subject, or only that against the reference."""
    found = []
    for name, call in subject.calls.items():
        for check in CHECKS[: 1 if first_only else None]:
            if check is alone and name in _SUMS:
                continue
            if check is in_tf32 and (dtype != torch.float32 or SWITCHES[subject.op] == "exact"):
                continue
            try:
                check(subject, call, dtype)
                error = None
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"
            found.append(Outcome(subject.op, str(dtype).removeprefix("torch."), f"{name} {check.__name__}", error))
    return found


def kernels_of(op: str) -> set[str]:
    """Return the names of all kernels of an op, as `launched` does."""
    from triton.runtime.jit import JITFunction

    folder: Any = importlib.import_module(f"fastssl.kernels.{op}")
    found = set()
    for module in pkgutil.iter_modules(folder.__path__):
        if module.name.startswith("triton"):
            members = inspect.getmembers(importlib.import_module(f"{folder.__name__}.{module.name}"))
            found |= {
                f"{module.name}.{name}"
                for name, value in members
                if isinstance(value, JITFunction) and re.fullmatch(r"_\w+_kernel", name)
            }
    return found


def launched(emulator: Emulator) -> set[str]:
    """Return the names of the kernels that have been launched."""
    kernels = (launch.kernel for launch in emulator.launches)
    return {f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}" for kernel in kernels}
