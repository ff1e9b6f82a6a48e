"""Help the op tests: list implementations, make inputs, and compare results within a tolerance."""

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import NamedTuple

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from fastssl.kernels.dispatch import BACKENDS
from fastssl.packing import Layout

#: Sequence lengths of the test batches: ordinary ones, one long among many short, single frames, empty sequences.
LENGTHS = {
    "odd": (37, 23, 41),
    "one_long": (29, 3, 2, 1, 5, 4),
    "single_frame": (1,),
    "with_empty": (0, 17, 0, 30),
    "empty_batch": (),
}


def implementations(op: str, *, compiled_only: bool = False) -> list[ParameterSet]:
    """Return pytest parameters (backend, device) for every implementation of an op that this machine has."""
    return [
        pytest.param(backend, device, marks=[pytest.mark.gpu] if device == "cuda" else [], id=f"{backend}-{device}")
        for device, backends in BACKENDS[op].items()
        for backend in backends
        if not compiled_only or backend in ("native", "triton")
    ]


def layout_of(lengths: Sequence[int], device: str = "cpu") -> Layout:
    return Layout.from_lengths(lengths, device=device)


def randn(*shape: int) -> Tensor:
    """Return normally distributed numbers in fp64; equal shapes give equal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def normal(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Return normally distributed tensors by name; each name gets different numbers."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def assert_as_good_as(x: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """Assert that the error is at most twice plain PyTorch's in the same dtype, plus 4 eps (in max norm)."""
    assert x.shape == exact.shape, f"{what}: shape {tuple(x.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    exact = exact.to(torch.float64)
    error = (x.to(torch.float64) - exact).abs().max()
    allowed = 2 * (plain.to(torch.float64) - exact).abs().max() + 4 * torch.finfo(x.dtype).eps * exact.abs().max()
    assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}"


def gradients(outputs: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients of a weighted sum of `outputs`; fixed weights break symmetries that could hide errors."""
    weights = torch.sin(torch.arange(outputs.numel(), device=outputs.device, dtype=torch.float64) + 1)
    loss = (outputs.to(torch.float64) * weights.reshape(outputs.shape)).sum()
    return list(torch.autograd.grad(loss, list(inputs)))


def cast(tensors: dict[str, Tensor], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Copy the tensors as fresh leaves; floating-point tensors get the dtype and require gradients."""
    return {
        name: tensor.detach()
        .to(device, dtype if tensor.is_floating_point() else None)
        .requires_grad_(tensor.is_floating_point())
        for name, tensor in tensors.items()
    }


class _Expected(NamedTuple):
    """Results of the reference for inputs of a dtype, computed in fp64 and in the dtype itself."""

    exact: list[Tensor]  # the output, then gradients
    plain: list[Tensor]


#: Results of the reference, shared by the tests of several backends.
_EXPECTED: dict[Hashable, _Expected] = {}


def check_against_reference(
    run: Callable[[dict[str, Tensor], str], Tensor],
    inputs: dict[str, Tensor],
    *,
    backend: str,
    device: str,
    dtype: torch.dtype,
    backward: bool,
    constants: Collection[str] = (),
    case: Hashable = None,
) -> None:
    """Compare `run(inputs, backend)` with the reference in fp64; twice the reference's error in `dtype` is allowed.

    With `backward`, compare the gradients too, for all floating inputs except those named in `constants`. Calls with
    the same `case`, which must identify `run`, compute the reference once for equal inputs.
    """
    names = [name for name in inputs if inputs[name].is_floating_point() and name not in constants] if backward else []

    def results(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
        out = run(tensors, name)
        grads = gradients(out, [tensors[name] for name in names]) if backward else []
        return [x.detach().cpu() for x in (out, *grads)]

    def reference() -> _Expected:
        exact, plain = cast(inputs, torch.float64), cast(inputs, dtype, device)
        for name in exact:  # start from the rounded inputs: their rounding is not the op's error
            exact[name] = plain[name].detach().to("cpu", exact[name].dtype).requires_grad_(exact[name].requires_grad)
        return _Expected(results(exact, "reference"), results(plain, "reference"))

    if case is None:
        expected = reference()
    else:
        digest = tuple((name, x.shape, x.dtype, x.detach().cpu().numpy().tobytes()) for name, x in inputs.items())
        key = (case, device, dtype, backward, hash(digest))
        expected = _EXPECTED[key] if key in _EXPECTED else _EXPECTED.setdefault(key, reference())
    found = results(cast(inputs, dtype, device), backend)
    what = ["output", *(f"grad_{name}" for name in names)]
    for name, x, plain, exact in zip(what, found, expected.plain, expected.exact, strict=True):
        assert_as_good_as(x, plain, exact, name)


def compiler_for(backend: str) -> str:
    """Return the `torch.compile` backend for an op's backend. Plain PyTorch skips Inductor, which takes seconds."""
    return "aot_eager" if backend in ("reference", "torch") else "inductor"
