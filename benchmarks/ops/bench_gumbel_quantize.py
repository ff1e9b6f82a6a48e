"""Measure `gumbel_quantize`: `python -m benchmarks.ops.bench_gumbel_quantize --device cpu|cuda [--only ROW]`."""

from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import limits, rivals
from benchmarks.harness import Contenders, Outputs, Row, backends, compare
from benchmarks.report import Rows, main
from fastssl import ops
from fastssl.kernels.gumbel_quantize import reference
from fastssl.nn.quantizer import GumbelQuantizer

_TEMPERATURE = 2.0


def forward_and_backward(device: torch.device) -> Row:
    """Measure the whole quantiser in fp32: frames to code vectors and perplexity, with new noise, and all gradients."""
    M, C, G, V, width = (900 if device.type == "cpu" else 20_000), 512, 2, 320, 256
    torch.manual_seed(0)
    module = GumbelQuantizer(C, groups=G, codes=V, width=width).to(device)
    theirs = rivals.transformers_quantizer(module).train()
    theirs.temperature = _TEMPERATURE
    in_double = rivals.in_double(module)
    x = torch.randn(M, C, device=device, requires_grad=True)
    grad_out = torch.randn(M, width, device=device)
    seeds = torch.randint(2**62, (M,), device=device)
    mask = torch.ones(1, M, dtype=torch.bool, device=device)

    def ours(backend: str, module: Any = module, x: Tensor = x) -> Outputs:
        quantized = ops.gumbel_quantize(
            module.weight_proj(x).unflatten(1, (G, V)),
            module.codevectors.view(G, V, -1),
            seeds=seeds,
            temperature=_TEMPERATURE,
            backend=backend,
        )
        mean = quantized.probability_sums / M
        perplexity = torch.exp(-(mean * torch.log(mean + 1e-7)).sum(-1)).sum()
        return gradients(module, x, quantized.values, perplexity)

    def transformers() -> Outputs:
        values, perplexity = theirs(x.unsqueeze(0), mask_time_indices=mask)
        return gradients(theirs, x, values[0], perplexity)

    def check_transformers() -> Outputs:
        noise = reference.gumbel_noise(seeds, G, V)
        with mock.patch.object(F, "gumbel_softmax", rivals.gumbel_softmax_with(noise)):
            return transformers()

    def gradients(module: Any, x: Tensor, values: Tensor, perplexity: Tensor) -> Outputs:
        parameters = dict(module.named_parameters())
        loss = (values * grad_out.to(values.dtype)).sum() - perplexity
        grad_x, *grads = torch.autograd.grad(loss, [x, *parameters.values()])
        named = {f"gradient of {name}": grad for name, grad in zip(parameters, grads, strict=True)}
        return {"values": values, "perplexity": perplexity, "gradient of x": grad_x} | named

    contenders = Contenders()
    for backend in backends("gumbel_quantize", device):
        contenders.add(f"fastssl, {backend}", partial(ours, backend))
    contenders.add("Transformers, eager", transformers, check_transformers)
    gemms = limits.quantizer(M, C, G, V, width)
    return compare(
        f"Gumbel quantiser forward and backward, {M} frames, {G} x {V} codes x {width // G}",
        contenders,
        reference=lambda: ours("reference", in_double, x.detach().double().requires_grad_()),
        tolerance=1e-4,
        device=device,
        limits=lambda: limits.gemm_limits(gemms, torch.float32, device),
        budget_s=5,
    )


ROWS: Rows = {"gumbel-quantize": forward_and_backward}

if __name__ == "__main__":
    main(ROWS, __doc__)
