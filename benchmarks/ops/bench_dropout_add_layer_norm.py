"""Measure `dropout_add_layer_norm`: `python -m benchmarks.ops.bench_dropout_add_layer_norm --device cpu|cuda`."""

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
    """Measure the op at the width of a base model.

    The frames are those of one minute of audio in fp32 on the CPU, and of 800 s in bf16 on a GPU.
    """
    N, D = (3000, 768) if device.type == "cpu" else (40_000, 768)
    dtype, tolerance = (torch.float32, 1e-4) if device.type == "cpu" else (torch.bfloat16, 0.05)
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(N, D, generator=generator).to(device, dtype).requires_grad_() for _ in range(2))
    weight = (1 + 0.1 * torch.randn(D, generator=generator)).to(device, dtype).requires_grad_()
    bias = torch.randn(D, generator=generator).to(device, dtype).requires_grad_()
    grad_out = torch.randn(N, D, generator=generator).to(device, dtype)
    seed = torch.tensor(1, device=device)
    leaves = (x, residual, weight, bias)

    def gradients(out: Tensor, leaves: tuple[Tensor, ...]) -> Outputs:
        names = ("grad_x", "grad_residual", "grad_weight", "grad_bias")
        grads = torch.autograd.grad(out, leaves, grad_out.to(out.dtype))
        return {"out": out} | dict(zip(names, grads, strict=True))

    def ours(backend: str, leaves: tuple[Tensor, ...] = leaves) -> Outputs:
        x, residual, weight, bias = leaves
        out = ops.dropout_add_layer_norm(
            x, residual, weight=weight, bias=bias, dropout_p=dropout_p, seed=seed, backend=backend
        )
        return gradients(out, leaves)

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(residual + F.dropout(x, dropout_p), (D,), weight, bias)

    def plain_with_our_mask() -> Outputs:
        keep = philox.keep_mask(seed, (N, D), dropout_p=dropout_p, randomness=RANDOMNESS)
        keep = keep / kept_fraction(dropout_p, RANDOMNESS)
        return gradients(F.layer_norm(residual + keep.to(dtype) * x, (D,), weight, bias), leaves)

    contenders = Contenders()
    for backend in backends("dropout_add_layer_norm", device):
        contenders.add(f"fastssl, {backend}", partial(ours, backend))
    compiled = torch.compile(plain, dynamic=False)
    contenders.add("plain PyTorch", lambda: gradients(plain(*leaves), leaves), plain_with_our_mask)
    contenders.add("plain PyTorch, torch.compile", lambda: gradients(compiled(*leaves), leaves), plain_with_our_mask)
    tensor_bytes = N * D * x.element_size()
    # Forward reads x and residual and writes out. Backward reads both and the gradient, and writes one gradient, or
    # two with dropout.
    tensors = 8 if dropout_p > 0 else 7
    return compare(
        f"dropout {dropout_p}, add, layer norm forward and backward, {N} x {D}",
        contenders,
        reference=lambda: ours("reference", tuple(leaf.detach().double().requires_grad_() for leaf in leaves)),
        tolerance=tolerance,
        device=device,
        copy_limit=limits.copy_limit(tensors * tensor_bytes, 6 * tensor_bytes, device),
        budget_s=4,
    )


ROWS: Rows = {
    "dropout-add-layer-norm": partial(forward_and_backward, dropout_p=0.1),
    "add-layer-norm": partial(forward_and_backward, dropout_p=0.0),
}

if __name__ == "__main__":
    main(ROWS, __doc__)
