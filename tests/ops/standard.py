"""What every op has to declare for the tests that all ops share: `STANDARD` in `tests/ops/test_<op>.py`."""

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from hypothesis import strategies as st
from torch import Tensor

from fastssl import ops
from fastssl.kernels.dispatch import BACKENDS
from fastssl.packing import Layout, Packed
from tests.ops.common import implementations

Inputs = dict[str, Tensor]
#: Of a case, inputs and a backend: the output.
Run = Callable[[str, Inputs, str | None], Tensor]


def interpreted(backend: str, device: str) -> bool:
    """Triton's interpreter is slow: some ops give it less to do."""
    return (backend, device) == ("triton", "cpu")


def all_but_triton_in_double(case: str, backend: str, device: str, dtype: torch.dtype) -> bool:
    return backend != "triton" or dtype != torch.float64


@dataclass(frozen=True, kw_only=True)
class Mates:
    """Batches whose sequences must give what they give alone.

    Attributes:
        make: Inputs for some lengths and what is drawn; all tensors are per frame but those in `shared`.
        call: What to compare, frames with their layout: outputs, and gradients where they are promised too.
        lengths: Lengths of a batch.
        drawn: More arguments of `make`.
        shared: Names of inputs that belong to no frame.
        examples: How many batches to draw.
        on: Whether a backend and device are tested.
        shorten: The batch for Triton's interpreter.
        same_bits: Whether a backend and device promise equal bits; closeness is asked of the others.
        tolerance: rtol and atol of "close".
        empty: Whether a backend takes an empty batch.
    """

    make: Callable[..., Inputs]
    call: Callable[[Inputs, Layout, str], Iterable[Packed]]
    lengths: st.SearchStrategy[Sequence[int]]
    drawn: tuple[st.SearchStrategy[Any], ...] = ()
    shared: Collection[str] = ()
    examples: int = 1
    on: Callable[[str, str], bool] = lambda backend, device: True
    shorten: Callable[[Sequence[int]], Sequence[int]] = lambda lengths: lengths
    same_bits: Callable[[str, str], bool] = lambda backend, device: device == "cpu"
    tolerance: tuple[float, float] = (1e-5, 1e-5)
    empty: Callable[[str], bool] = lambda backend: True


@dataclass(frozen=True, kw_only=True)
class Standard:
    """An op for the shared tests.

    Attributes:
        op: Its name.
        cases: Names of the cases for forward and backward.
        make_inputs: Inputs of a case in a dtype, on the CPU.
        run: The op on a case.
        mates: Name -> batches whose sequences must give what they give alone.
        good: Arguments that are accepted.
        bad: Part of the message -> change of `good` that is rejected with it.
        frames: Inputs for so many frames, for batches of any lengths.
        call: The op on these.
        gradcheck_cases: Small ones; `make_inputs` and `run` know them too.
        compile_cases: Cases to trace.
        opcheck_cases: None takes `cases`.
        opcheck_dtypes: Dtypes of floating inputs for opcheck.
        forward_dtypes: Dtypes of floating inputs for the forward test.
        backward_dtypes: The same for the backward test.
        exact: Whole numbers that must be equal for all backends and the reference in fp64.
        outputs: Name -> what the backward test differentiates; empty takes `run`.
        constants: Floating inputs that have no gradient.
        smooth: What gradcheck differentiates, where the output itself jumps.
        gradcheck_step: eps of gradcheck, whose atol is ten times that.
        trace: Of a case, inputs and a backend: what to trace, and its arguments; None takes `run` and the inputs.
        compiler: Of a backend, how to compile; Inductor takes seconds.
        compile_tolerance: atol of compiled outputs and of gradients.
        interpreter_inputs: `make_inputs` for Triton's interpreter.
        interpreter_skips: Cases too slow for tracing and opcheck in Triton's interpreter.
        serves: Whether a backend takes a case on a device in a dtype; it must refuse it otherwise.
        backward_of_others: Backends whose gradients come from PyTorch with an error that is not ours to bound.
    """

    op: str
    cases: Collection[str]
    make_inputs: Callable[[str, torch.dtype], Inputs]
    run: Run
    mates: Mapping[str, Mates]
    good: dict[str, Any]
    bad: dict[str, dict[str, Any]]
    frames: Callable[[int], Inputs]
    call: Callable[[Inputs, Layout, str], Tensor]
    gradcheck_cases: Collection[str]
    compile_cases: Collection[str]
    opcheck_cases: Collection[str] | None = None
    opcheck_dtypes: Collection[torch.dtype] = (torch.float32,)
    forward_dtypes: Collection[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
    backward_dtypes: Collection[torch.dtype] = (torch.float32, torch.bfloat16)
    exact: Run | None = None
    outputs: Mapping[str, Run] = field(default_factory=dict)
    constants: Collection[str] = ()
    smooth: Run | None = None
    gradcheck_step: float = 1e-6
    trace: Callable[[str, Inputs, str], tuple[Callable[..., Tensor], tuple[Any, ...]]] | None = None
    compiler: Callable[[str], str] = lambda backend: "aot_eager"
    compile_tolerance: tuple[float, float] = (1e-5, 1e-4)
    interpreter_inputs: Callable[[str, torch.dtype], Inputs] | None = None
    interpreter_skips: Collection[str] = ()
    serves: Callable[[str, str, str, torch.dtype], bool] = all_but_triton_in_double
    backward_of_others: Collection[str] = ()

    def inputs(self, case: str, backend: str, device: str, dtype: torch.dtype = torch.float32) -> Inputs:
        """Inputs of a case for a backend, on its device."""
        make = self.make_inputs
        if interpreted(backend, device) and self.interpreter_inputs is not None:
            make = self.interpreter_inputs
        return {name: x.to(device) for name, x in make(case, dtype).items()}

    def skip_unserved(self, case: str, backend: str, device: str, dtype: torch.dtype = torch.float32) -> None:
        """Skip the test of a case that a backend does not serve, which it must say itself."""
        if not self.serves(case, backend, device, dtype):
            with pytest.raises(ValueError, match=f"backend='{backend}': not available for {self.op}"):
                self.run(case, self.inputs(case, backend, device, dtype), backend)
            pytest.skip(f"{backend} does not serve this case")

    def skip_slow(self, case: str, backend: str, device: str) -> None:
        """Skip a case that takes Triton's interpreter too long."""
        if interpreted(backend, device) and case in self.interpreter_skips:
            pytest.skip("the interpreter is slow: other cases have it")


def standard_of(op: str) -> Standard:
    """What the test file of an op declares."""
    declared: Standard = importlib.import_module(f"tests.ops.test_{op}").STANDARD
    return declared


def every(
    axes: Callable[[Standard], Iterable[tuple[Any, ...]]] = lambda standard: [()],
    *,
    compiled_only: bool = False,
    where: Callable[..., bool] = lambda standard, implementation, *values: True,
) -> list[ParameterSet]:
    """(standard, *values, backend, device) of every op, implementation and point of its axes `where` it is wanted."""
    assert BACKENDS.keys() <= {*dir(ops)}
    return [
        pytest.param(
            standard,
            *values,
            *found.values,
            marks=found.marks,
            id="-".join([standard.op, *(str(value).removeprefix("torch.") for value in values), str(found.id)]),
        )
        for standard in map(standard_of, BACKENDS)
        for found in implementations(standard.op, compiled_only=compiled_only)
        for values in axes(standard)
        if where(standard, found.values, *values)
    ]
