"""Define what each `tests/ops/test_<op>.py` declares, as `STANDARD`, for the tests that all ops share."""

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
#: Runs an op: (case, inputs, backend) -> output.
Run = Callable[[str, Inputs, str | None], Tensor]


def interpreted(backend: str, device: str) -> bool:
    """Return whether Triton's interpreter runs the op. It is slow, so some ops give it smaller inputs."""
    return (backend, device) == ("triton", "cpu")


def all_but_triton_in_double(case: str, backend: str, device: str, dtype: torch.dtype) -> bool:
    return backend != "triton" or dtype != torch.float64


@dataclass(frozen=True, kw_only=True)
class Mates:
    """Batches whose sequences must each give the same result as alone.

    Attributes:
        make: Makes inputs from the lengths and the values of `drawn`; tensors have one row per frame, unless `shared`.
        call: Returns the packed results to compare: outputs, and gradients if the op promises them too.
        lengths: Hypothesis strategy for the lengths of a batch.
        drawn: Strategies for the other arguments of `make`.
        shared: Names of inputs without a row per frame.
        examples: Number of batches to draw.
        on: Whether to test a backend on a device.
        shorten: Makes lengths shorter for Triton's interpreter.
        same_bits: Whether a backend on a device promises equal bits; otherwise results must be close.
        tolerance: rtol and atol for results that must be close.
        empty: Whether a backend accepts an empty batch.
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
    """Everything that the shared tests need to know about an op.

    Attributes:
        op: Name of the op.
        cases: Names of the cases of the forward and backward tests.
        make_inputs: Makes the inputs of a case in a dtype, on the CPU.
        run: Runs the op on a case.
        mates: Name -> batches whose sequences must each give the same result as alone.
        good: Arguments that the op accepts.
        bad: Pattern of an error message -> change of `good` that must raise it.
        frames: Makes inputs with a number of frames, which `call` can split into sequences of any lengths.
        call: Runs the op on inputs from `frames`.
        gradcheck_cases: Names of small cases for gradcheck; `make_inputs` and `run` must support them.
        compile_cases: Names of the cases to compile.
        opcheck_cases: Names of the cases for opcheck; None means `cases`.
        opcheck_dtypes: Dtypes of floating inputs in the opcheck test.
        forward_dtypes: Dtypes of floating inputs in the forward test.
        backward_dtypes: Dtypes of floating inputs in the backward test.
        exact: Returns integers that must be equal for all backends and the reference in fp64.
        outputs: Name -> function whose output the backward test differentiates; empty means `run`.
        constants: Names of floating inputs without a gradient.
        smooth: Replaces `run` in gradcheck if the output has jumps.
        gradcheck_step: Step of gradcheck's finite differences; its atol is ten times this.
        trace: (case, inputs, backend) -> the function to compile and its arguments; None means `run` and the inputs.
        compiler: Backend -> backend of `torch.compile`; Inductor takes seconds.
        compile_tolerance: Tolerances of compiled outputs and of their gradients.
        interpreter_inputs: Replaces `make_inputs` for Triton's interpreter.
        interpreter_skips: Names of the cases that are too slow for compilation and opcheck in Triton's interpreter.
        serves: Whether a backend supports a case on a device in a dtype; if not, it must raise an error.
        backward_of_others: Backends whose gradients PyTorch computes, so that their error is not tested.
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
        """Make the inputs of a case for a backend, on its device."""
        make = self.make_inputs
        if interpreted(backend, device) and self.interpreter_inputs is not None:
            make = self.interpreter_inputs
        return {name: x.to(device) for name, x in make(case, dtype).items()}

    def skip_unserved(self, case: str, backend: str, device: str, dtype: torch.dtype = torch.float32) -> None:
        """Skip a case that a backend does not support, after checking that the backend refuses it."""
        if not self.serves(case, backend, device, dtype):
            with pytest.raises(ValueError, match=f"backend='{backend}': not available for {self.op}"):
                self.run(case, self.inputs(case, backend, device, dtype), backend)
            pytest.skip(f"{backend} does not support this case")

    def skip_slow(self, case: str, backend: str, device: str) -> None:
        """Skip a case that is too slow in Triton's interpreter."""
        if interpreted(backend, device) and case in self.interpreter_skips:
            pytest.skip("too slow in Triton's interpreter, which runs the other cases")


def standard_of(op: str) -> Standard:
    """Return what an op's test file declares."""
    declared: Standard = importlib.import_module(f"tests.ops.test_{op}").STANDARD
    return declared


def every(
    axes: Callable[[Standard], Iterable[tuple[Any, ...]]] = lambda standard: [()],
    *,
    compiled_only: bool = False,
    where: Callable[..., bool] = lambda standard, implementation, *values: True,
) -> list[ParameterSet]:
    """Return pytest parameters (standard, *values, backend, device): each implementation of each op, times its axes."""
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
