"""Measure `positional_conv`: `python -m benchmarks.ops.bench_positional_conv --device cpu|cuda [--only ROW]`."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import limits, workloads
from benchmarks.harness import Contenders, Entry, Outputs, Row, backends, compare
from benchmarks.report import Rows, main
from fastssl import ops
from fastssl.packing import Layout, Packed

D, K, GROUPS = 768, 128, 16


def forward_and_backward(title: str, lengths_s: Sequence[float], device: torch.device) -> Row:
    """Measure the op with a base model's width, taps and groups, in fp32 on the CPU and in bf16 on a GPU.

    Args:
        title: Name of the lengths, for the title of the row.
        lengths_s: Lengths of the utterances in seconds.
        device: Device to measure on.
    """
    dtype, tolerance = (torch.float32, 1e-4) if device.type == "cpu" else (torch.bfloat16, 0.05)
    layout = Layout.from_lengths(workloads.frames(lengths_s), device=device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(layout.total, D, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(D, D // GROUPS, K, generator=generator) / 78).to(device, dtype).requires_grad_()
    bias = torch.randn(D, generator=generator).to(device, dtype).requires_grad_()
    grad_out = torch.randn(layout.total, D, generator=generator).to(device, dtype)
    padded_x = Packed(x.detach(), layout).to_padded().requires_grad_()
    padded_grad_out = Packed(grad_out, layout).to_padded()
    names = ("grad_x", "grad_weight", "grad_bias")

    def ours(backend: str, leaves: tuple[Tensor, ...] = (x, weight, bias)) -> Outputs:
        x, weight, bias = leaves
        out = ops.positional_conv(x, weight, layout, bias=bias, backend=backend)
        grads = torch.autograd.grad(out, leaves, grad_out.to(out.dtype))
        return {"out": out} | dict(zip(names, grads, strict=True))

    def padded(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Entry:
        leaves = (padded_x, weight, bias)

        def run() -> tuple[Tensor, ...]:
            out = function(*leaves)
            return (out, *torch.autograd.grad(out, leaves, padded_grad_out))

        def check() -> Outputs:
            out, grad_x, grad_weight, grad_bias = run()
            valid = [Packed.from_padded(padded, layout.lengths).values for padded in (out, grad_x)]
            # The output's gradient is zero in the padding, so that the parameters' gradients need no correction.
            return {"out": valid[0]} | dict(zip(names, (valid[1], grad_weight, grad_bias), strict=True))

        return run, check

    contenders = Contenders()
    for backend in backends("positional_conv", device):
        contenders.add(f"fastssl, {backend}", partial(ours, backend))
    contenders.add("Transformers' formula, padded", *padded(_transformers))
    compiled = torch.compile(_transformers, dynamic=False)
    contenders.add("Transformers' formula, torch.compile", *padded(compiled))
    products = limits.linear(layout.total, K * D // GROUPS, D // GROUPS, backward=True, times=GROUPS)
    return compare(
        f"positional convolution forward and backward, {D} wide, {K} taps, {GROUPS} groups, {title}",
        contenders,
        reference=lambda: ours(
            "reference", tuple(leaf.detach().double().requires_grad_() for leaf in (x, weight, bias))
        ),
        tolerance=tolerance,
        device=device,
        limits=lambda: limits.gemm_limits(products, dtype, device),
        audio_s=sum(lengths_s),
        budget_s=6,
        notes=[
            f"padded batch: {workloads.padding_factor(lengths_s):.2f} times the valid audio",
            "the limit counts direct convolution; computing the gradient of the weight by FFT takes fewer operations",
        ],
    )


def _transformers(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # (B, T, D)
    return F.conv1d(x.transpose(1, 2), weight, bias, padding=K // 2, groups=GROUPS)[..., :-1].transpose(1, 2)


ROWS: Rows = {
    "positional-conv": partial(forward_and_backward, "read-speech batch of 4", workloads.read_speech(4)),
    "positional-conv-one": partial(forward_and_backward, "one 15.6 s utterance", workloads.equal(1)),
    "positional-conv-short": partial(forward_and_backward, "short batch of 16", workloads.short(16)),
}

if __name__ == "__main__":
    main(ROWS, __doc__)
