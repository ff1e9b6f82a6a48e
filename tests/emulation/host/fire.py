"""Compare integrate-and-fire's CUDA kernels, run on the CPU, with the reference and the CPU kernels.

A wrong access ends the process, so the tests run this in a process of its own:

    python -m tests.emulation.host.fire LIBRARY [--seed SEED] [--count COUNT] [--only-float32]
"""

import argparse
import ctypes
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.kernels.dispatch import BACKENDS
from fastssl.kernels.integrate_and_fire import reference
from fastssl.packing import Layout
from tests.ops.common import assert_as_good_as

#: (order of blocks, warps and lanes, where a tensor lies in its pages): see `Order` and `Place` in the C++ sources.
SETTINGS = {
    "forward": (0, 1),
    "reverse": (1, 2),
    "random": (2, 1),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Lengths in frames: none, the fewest, around a warp (32), a block (256) and a piece of the scan (1024).
LENGTHS = (0, 1, 2, 5, 31, 33, 64, 130, 255, 257, 600, 1025)
EDGES = ((), (0,), (1,), (0, 1, 0), (1, 1), (1024, 0, 1025), (256, 2100))
#: Numbers of channels: around a warp's loads of 1 or 16 bytes per lane.
CHANNELS = (0, 1, 3, 8, 24, 33, 64, 130, 264)
_SCHEMAS = {
    "scan": "(Tensor weights, Tensor cu_seqlens, float threshold) -> (Tensor, Tensor)",
    "fwd": "(Tensor x, Tensor positions, Tensor cu_seqlens, Tensor cu_seqlens_out, int total_out, float threshold)"
    " -> Tensor",
    "bwd": "(Tensor grad_out, Tensor x, Tensor positions, Tensor cu_seqlens, Tensor cu_seqlens_out, float threshold)"
    " -> (Tensor, Tensor)",
}


class Case(NamedTuple):
    """One batch."""

    dtype: torch.dtype
    lengths: tuple[int, ...]
    channels: int
    threshold: float
    weights: str
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return x (N, C) and weights (N,)."""
        generator = torch.Generator().manual_seed(self.seed)
        frames = sum(self.lengths)
        x = torch.randn(frames, self.channels, generator=generator)
        uniform = torch.rand(frames, generator=generator)
        quarters = torch.randint(0, 5, (frames,), generator=generator) / 4
        weights = {
            "uniform": uniform,
            "small": uniform / 10,
            "large": uniform * 9,
            "with zeros": uniform * (quarters < 0.5),
            "ends on borders": quarters,
        }
        return x.to(self.dtype), weights[self.weights].to(self.dtype)


def draw_cases(seed: int, count: int, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Draw cases, of which the first have the lengths in `EDGES`, with each dtype in turn."""
    draw = random.Random(seed)
    for index in range(count):
        lengths = EDGES[index] if index < len(EDGES) else draw.choices(LENGTHS, k=draw.choice((1, 2, 3)))
        yield Case(
            dtype=dtypes[index % len(dtypes)],
            lengths=tuple(lengths),
            channels=draw.choice(CHANNELS if index >= len(EDGES) else CHANNELS[1:]),
            threshold=draw.choice((1.0, 1.0, 0.5, 0.3, 2.7)),
            weights=draw.choice(("uniform", "small", "large", "with zeros", "ends on borders")),
            seed=draw.randrange(1 << 30),
        )


class Kernels:
    """The compiled kernels; every tensor that they get lies between pages that cannot be accessed."""

    def __init__(self, library: str) -> None:
        self._definitions = torch.library.Library("fastssl_on_host", "DEF")
        for name, schema in _SCHEMAS.items():
            self._definitions.define(f"integrate_and_fire_{name}{schema}")
        torch.ops.load_library(library)
        self._functions = ctypes.CDLL(library)
        operators = torch.ops.fastssl_on_host
        self.scan = self._guarded(operators.integrate_and_fire_scan)
        self.forward = self._guarded(operators.integrate_and_fire_fwd)
        self.backward = self._guarded(operators.integrate_and_fire_bwd)

    @contextmanager
    def _guard(self, place: int) -> Iterator[None]:
        self._functions.set_guard(place)
        yield
        self._functions.set_guard(0)

    def _guarded(self, operator: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., list[Tensor]]:
        """Let an operator run with each of `SETTINGS`, which must not change a bit, and return its results."""

        def call(*arguments: Tensor | float) -> list[Tensor]:
            results = []
            for order, place in SETTINGS.values():
                self._functions.set_order(order, 0)
                with self._guard(place):
                    copies = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
                    out = operator(*copies)
                results.append([x.clone() for x in ((out,) if isinstance(out, Tensor) else out)])
            for name, other in zip(SETTINGS, results, strict=True):
                for x, y in zip(results[0], other, strict=True):
                    assert torch.equal(_bits(x), _bits(y)), f"order {name}: other bits than in order forward"
            return results[0]

        return call


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def check(kernels: Kernels, case: Case) -> None:
    """Compare forward and backward of one case."""
    x, weights = case.tensors()
    layout, threshold = Layout.from_lengths(case.lengths), case.threshold
    positions, fired = kernels.scan(weights, layout.cu_seqlens, threshold)
    expected = reference.fire_positions(weights, layout, threshold)
    assert torch.equal(positions, expected), "positions"
    assert torch.equal(fired, reference.fired(expected, weights, layout)), "fired"
    out_layout = Layout.from_lengths([int(count) for count in fired])
    where = (positions, layout.cu_seqlens, out_layout.cu_seqlens)
    grad = torch.randn(out_layout.total, case.channels, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    (out,) = kernels.forward(x, *where, out_layout.total, threshold)
    results = {"out": out} | dict(
        zip(("grad_x", "grad_weights"), kernels.backward(grad, x, *where, threshold), strict=True)
    )
    exact = _reference(x.double(), weights.double(), grad.double(), layout, out_layout, threshold)
    rivals = [_reference(x, weights, grad, layout, out_layout, threshold)]
    if "native" in BACKENDS["integrate_and_fire"]["cpu"]:
        native = torch.ops.fastssl_native
        outputs = native.integrate_and_fire_fwd(x, *where, out_layout.total, threshold)
        rivals.append((outputs, *native.integrate_and_fire_bwd(grad, x, *where, threshold)))
    for rival in rivals:
        for (name, result), plain, correct in zip(results.items(), rival, exact, strict=True):
            if case.dtype == torch.float64:  # no result is more exact
                torch.testing.assert_close(result, plain, rtol=1e-11, atol=1e-11, msg=f"{name}: too far from {plain}")
                continue
            # The gradient of the weights is in fp64, but sums over channels in fp32.
            dtype = torch.float32 if name == "grad_weights" else case.dtype
            assert_as_good_as(result.to(dtype), plain.to(dtype), correct, name)


def _reference(
    x: Tensor, weights: Tensor, grad: Tensor, layout: Layout, out_layout: Layout, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the reference's output and gradients of x and of the weights."""
    x, weights = x.detach().requires_grad_(), weights.detach().double().requires_grad_()
    positions = reference.fire_positions(weights, layout, threshold)
    out = reference.integrate_and_fire(x, positions, layout, out_layout, threshold=threshold)
    grad_x, grad_weights = torch.autograd.grad(out, (x, weights), grad)
    return out.detach(), grad_x, grad_weights


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--only-float32", action="store_true", help="draw no other dtypes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kernels = Kernels(options.library)
    for case in draw_cases(options.seed, options.count, DTYPES[:1] if options.only_float32 else DTYPES):
        print(case, flush=True)
        check(kernels, case)


if __name__ == "__main__":
    _main()
