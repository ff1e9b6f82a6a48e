"""Measure `bias_gelu_dropout`: `python -m benchmarks.ops.bench_bias_gelu_dropout --device cpu|cuda [--only ROW]`."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import limits
from benchmarks.harness import Contenders, Outputs, Row, backends, compare
from benchmarks.report import Rows, main
from fastssl import ops
from fastssl.kernels import philox
from fastssl.kernels.randomness import RANDOMNESS, kept_fraction


def forward_and_backward(device: torch.device, *, dropout_p: float) -> Row:
    """Measure the op at the size of a base model's feed-forward layers.

    The frames are those of one minute of audio in fp32 on the CPU, and of 800 s in bf16 on a GPU.
    """
    N, D = (3000, 3072) if device.type == "cpu" else (40_000, 3072)
    dtype, tolerance = (torch.float32, 1e-4) if device.type == "cpu" else (torch.bfloat16, 0.05)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator).to(device, dtype).requires_grad_()
    bias = torch.randn(D, generator=generator).to(device, dtype).requires_grad_()
    grad_out = torch.randn(N, D, generator=generator).to(device, dtype)
    seed = torch.tensor(1, device=device)

    def gradients(out: Tensor, x: Tensor, bias: Tensor) -> Outputs:
        grad_x, grad_bias = torch.autograd.grad(out, (x, bias), grad_out.to(out.dtype))
        return {"out": out, "grad_x": grad_x, "grad_bias": grad_bias}

    def ours(backend: str, x: Tensor = x, bias: Tensor = bias) -> Outputs:
        out = ops.bias_gelu_dropout(x, bias, dropout_p=dropout_p, seed=seed, backend=backend)
        return gradients(out, x, bias)

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return F.dropout(F.gelu(x + bias), dropout_p)

    def plain_with_our_mask() -> Outputs:
        keep = philox.keep_mask(seed, (N, D), dropout_p=dropout_p, randomness=RANDOMNESS)
        keep = keep / kept_fraction(dropout_p, RANDOMNESS)
        return gradients(keep.to(dtype) * F.gelu(x + bias), x, bias)

    contenders = Contenders()
    for backend in backends("bias_gelu_dropout", device):
        contenders.add(f"fastssl, {backend}", partial(ours, backend))
    compiled = torch.compile(plain, dynamic=False)
    contenders.add("plain PyTorch", lambda: gradients(plain(x, bias), x, bias), plain_with_our_mask)
    contenders.add("plain PyTorch, torch.compile", lambda: gradients(compiled(x, bias), x, bias), plain_with_our_mask)
    tensor_bytes = N * D * x.element_size()
    # Forward reads x and writes out. Backward reads x and the gradient, and writes a gradient.
    return compare(
        f"bias, GELU, dropout {dropout_p} forward and backward, {N} x {D}",
        contenders,
        reference=lambda: ours("reference", *(leaf.detach().double().requires_grad_() for leaf in (x, bias))),
        tolerance=tolerance,
        device=device,
        copy_limit=limits.copy_limit(5 * tensor_bytes, 4 * tensor_bytes, device),
        budget_s=4,
    )


ROWS: Rows = {
    "bias-gelu-dropout": partial(forward_and_backward, dropout_p=0.1),
    "bias-gelu": partial(forward_and_backward, dropout_p=0.0),
}

if __name__ == "__main__":
    main(ROWS, __doc__)
