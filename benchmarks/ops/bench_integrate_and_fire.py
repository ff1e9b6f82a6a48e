"""Measure `integrate_and_fire`: `python -m benchmarks.ops.bench_integrate_and_fire --device cpu|cuda [--only ROW]`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import limits, rivals
from benchmarks.harness import Contenders, Entry, Outputs, Row, backends, compare
from benchmarks.report import Rows, main
from fastssl import ops
from fastssl.packing import Layout, Packed


def forward_and_backward(device: torch.device) -> Row:
    """Measure the op on sequences of equal length, in fp32 on the CPU and in bf16 on a GPU.

    Equal lengths are the best case for plain PyTorch, which then needs no padding.
    """
    B, T, C = (8, 750, 512) if device.type == "cpu" else (64, 750, 512)
    dtype, tolerance = (torch.float32, 1e-4) if device.type == "cpu" else (torch.bfloat16, 0.05)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B * T, C, generator=generator).to(device, dtype).requires_grad_()
    weights = (torch.rand(B * T, generator=generator) * 0.5).to(device).requires_grad_()
    layout = Layout.from_lengths([T] * B, device=device)
    layout_out = ops.integrate_and_fire(x, weights, layout, backend="reference")[1]
    grad_out = torch.randn(layout_out.total, C, generator=generator).to(device, dtype)
    padded_grad_out = Packed(grad_out, layout_out).to_padded()

    def ours(backend: str, x: Tensor = x) -> Outputs:
        out = ops.integrate_and_fire(x, weights, layout, backend=backend)[0]
        grad_x, grad_weights = torch.autograd.grad(out, (x, weights), grad_out.to(x.dtype))
        return {"out": out, "grad_x": grad_x, "grad_weights": grad_weights}

    def padded(function: Callable[[Tensor, Tensor, int], Tensor]) -> Entry:
        def run() -> tuple[Tensor, ...]:
            out = function(x.view(B, T, C), weights.view(B, T), layout_out.max_length)
            return (out, *torch.autograd.grad(out, (x, weights), padded_grad_out))

        def check() -> Outputs:
            out, grad_x, grad_weights = run()
            valid = Packed.from_padded(out, layout_out.lengths).values
            return {"out": valid, "grad_x": grad_x, "grad_weights": grad_weights}

        return run, check

    contenders = Contenders()
    for backend in backends("integrate_and_fire", device):
        contenders.add(f"fastssl, {backend}", partial(ours, backend))
    contenders.add("plain PyTorch, two sums", *padded(rivals.integrate_and_fire_two_sums))
    contenders.add("plain PyTorch, dense product", *padded(rivals.integrate_and_fire_product))
    product = torch.compile(rivals.integrate_and_fire_product, dynamic=False)
    contenders.add("plain PyTorch, dense product, torch.compile", *padded(product))
    # Forward reads x and writes out. Backward reads the gradient and x, and writes the gradient of x.
    frame_bytes = C * x.element_size()
    moved = (3 * layout.total + 2 * layout_out.total) * frame_bytes
    footprint = 2 * (layout.total + layout_out.total) * frame_bytes
    return compare(
        f"integrate_and_fire forward and backward, {B} x {T} frames x {C} to {layout_out.total} frames",
        contenders,
        reference=lambda: ours("reference", x.detach().double().requires_grad_()),
        tolerance=tolerance,
        device=device,
        copy_limit=limits.copy_limit(moved, footprint, device),
        budget_s=4,
    )


ROWS: Rows = {"integrate-and-fire": forward_and_backward}

if __name__ == "__main__":
    main(ROWS, __doc__)
