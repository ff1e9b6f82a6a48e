"""Run the seven standard tests of every op, on the cases that each `tests/ops/test_<op>.py` declares."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastssl import ops
from fastssl.kernels.dispatch import BACKENDS
from tests.ops.common import cast, check_against_reference, gradients, layout_of
from tests.ops.standard import Inputs, Mates, Standard, every, interpreted, standard_of


@pytest.mark.parametrize(
    ("standard", "case", "dtype", "backend", "device"),
    every(lambda standard: product(standard.cases, standard.forward_dtypes)),
)
def test_forward(standard: Standard, case: str, dtype: torch.dtype, backend: str, device: str) -> None:
    standard.skip_unserved(case, backend, device, dtype)
    inputs = standard.inputs(case, backend, device)
    check_against_reference(
        lambda tensors, name: standard.run(case, tensors, name),
        inputs,
        backend=backend,
        device=device,
        dtype=dtype,
        backward=False,
        case=(standard.op, case),
    )
    if standard.exact is not None:
        ours = cast(inputs, dtype, device)
        found, expected = (
            standard.exact(case, tensors, name)
            for tensors, name in ((ours, backend), (cast(ours, torch.float64), "reference"))
        )
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(
    ("standard", "case", "output", "dtype", "backend", "device"),
    every(lambda standard: product(standard.cases, standard.outputs or ("output",), standard.backward_dtypes)),
)
def test_backward(standard: Standard, case: str, output: str, dtype: torch.dtype, backend: str, device: str) -> None:
    standard.skip_unserved(case, backend, device, dtype)
    if backend in standard.backward_of_others:
        pytest.skip("PyTorch computes these gradients, so their error is not tested")
    run = standard.outputs.get(output, standard.run)
    check_against_reference(
        lambda tensors, name: run(case, tensors, name),
        standard.inputs(case, backend, device),
        backend=backend,
        device=device,
        dtype=dtype,
        backward=True,
        constants=standard.constants,
        case=(standard.op, case, output),
    )


@pytest.mark.parametrize(
    ("standard", "case", "backend", "device"), every(lambda standard: product(standard.gradcheck_cases))
)
def test_gradcheck(standard: Standard, case: str, backend: str, device: str) -> None:
    if device == "cuda":
        pytest.skip("gradcheck runs only on the CPU")
    standard.skip_unserved(case, backend, device, torch.float64)
    inputs = standard.make_inputs(case, torch.float64)
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    run = standard.smooth or standard.run
    assert torch.autograd.gradcheck(
        lambda *tensors: run(case, inputs | dict(zip(leaves, tensors, strict=True)), backend),
        tuple(leaves.values()),
        eps=standard.gradcheck_step,
        atol=10 * standard.gradcheck_step,
    )


class Recorder(TorchDispatchMode):
    """Records calls of a backend's operators, with their arguments detached."""

    def __init__(self, backend: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.namespace = f"fastssl_{backend}"
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.namespace:
            assert not kwargs
            self.calls[func._opname] = func, tree_map_only(Tensor, Tensor.detach, args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("standard", "case", "dtype", "backend", "device"),
    every(
        lambda standard: product(
            standard.cases if standard.opcheck_cases is None else standard.opcheck_cases, standard.opcheck_dtypes
        ),
        compiled_only=True,
    ),
)
def test_opcheck(standard: Standard, case: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Check the backend's operators with the arguments that the op itself passes to them."""
    standard.skip_slow(case, backend, device)
    inputs = cast(standard.inputs(case, backend, device), dtype, device)
    with Recorder(backend) as recorder:
        out = standard.run(case, inputs, backend)
        torch.autograd.grad(out.sum(), [x for x in inputs.values() if x.requires_grad], allow_unused=True)
    assert {f"{standard.op}_fwd", f"{standard.op}_bwd"} <= recorder.calls.keys()
    for operator, arguments in recorder.calls.values():
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize(
    ("standard", "case", "backend", "device"), every(lambda standard: product(standard.compile_cases))
)
def test_compile(standard: Standard, case: str, backend: str, device: str) -> None:
    standard.skip_slow(case, backend, device)
    dtype = torch.float32 if standard.serves(case, backend, device, torch.float32) else torch.bfloat16
    standard.skip_unserved(case, backend, device, dtype)
    inputs = cast(standard.inputs(case, backend, device), dtype, device)

    def traced() -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        if standard.trace is not None:
            return standard.trace(case, inputs, backend)
        return lambda tensors: standard.run(case, tensors, backend), (inputs,)

    # Two calls, because the graph that leads to the arguments can be differentiated only once.
    (function, arguments), (eager_function, eager_arguments) = traced(), traced()
    torch.compiler.reset()  # all ops compile the same lines, and PyTorch limits recompilations per line
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=standard.compiler(backend))
    leaves = [x for x in inputs.values() if x.requires_grad]
    out, eager = compiled(*arguments), eager_function(*eager_arguments)
    for_outputs, for_gradients = standard.compile_tolerance
    torch.testing.assert_close(out, eager, rtol=for_outputs, atol=for_outputs)
    found, expected = gradients(out, leaves), gradients(eager, leaves)
    torch.testing.assert_close(found, expected, rtol=for_gradients, atol=for_gradients)


@pytest.mark.parametrize(
    ("standard", "mates", "backend", "device"),
    every(lambda standard: product(standard.mates), where=lambda s, found, mates: s.mates[mates].on(*found)),
)
def test_batch_mates_do_not_matter(standard: Standard, mates: str, backend: str, device: str) -> None:
    chosen = standard.mates[mates]

    @settings(max_examples=chosen.examples, deadline=None)
    @given(chosen.lengths, st.tuples(*chosen.drawn))
    def check(lengths: list[int], drawn: tuple[Any, ...]) -> None:
        check_batch_mates(chosen, lengths, drawn, backend, device)

    check()


def check_batch_mates(mates: Mates, lengths: list[int], drawn: tuple[Any, ...], backend: str, device: str) -> None:
    lengths = list(mates.shorten(lengths)) if interpreted(backend, device) else lengths
    inputs = {name: x.to(device) for name, x in mates.make(lengths, *drawn).items()}

    def call(tensors: Inputs, lengths: list[int]) -> list[list[Tensor]]:
        # Clone, because a slice of the batch is aligned differently, and matrix products can depend on alignment.
        own = {name: x.clone() for name, x in tensors.items()}
        return [packed.unpack() for packed in mates.call(own, layout_of(lengths, device), backend)]

    if not sum(lengths) and not mates.empty(backend):
        return
    together = call(inputs, lengths)
    parts = {name: x.split(lengths) for name, x in inputs.items() if name not in mates.shared}
    for index, length in enumerate(lengths):
        if length == 0 and not mates.empty(backend):
            continue
        alone = call(inputs | {name: split[index] for name, split in parts.items()}, [length])
        for in_batch, (by_itself,) in zip(together, alone, strict=True):
            if mates.same_bits(backend, device) or not by_itself.is_floating_point():
                assert torch.equal(in_batch[index], by_itself)
            else:
                rtol, atol = mates.tolerance
                torch.testing.assert_close(in_batch[index], by_itself, rtol=rtol, atol=atol)


@pytest.mark.parametrize("op", BACKENDS)
def test_rejects_bad_input(op: str) -> None:
    standard = standard_of(op)
    for message, change in standard.bad.items():
        with pytest.raises(ValueError, match=message):
            getattr(ops, op)(**(standard.good | change))
