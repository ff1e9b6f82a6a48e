"""The Gumbel quantiser: `python -m benchmarks.bench_quantizer --device cpu|cuda [--only ROW] [--output JSON]`."""

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import limits, rivals
from benchmarks.harness import Contenders, Outputs, Row, compare
from benchmarks.report import Rows, main
from fastssl.nn.quantizer import GumbelQuantizer
from fastssl.nn.random import draw_keys, gumbel

_TEMPERATURE = 2.0


def forward_and_backward(device: torch.device) -> Row:
    """From frames to quantised vectors and the probabilities' perplexity, with noise, and back; fp32."""
    M, C, G, V, width = (900 if device.type == "cpu" else 20_000), 512, 2, 320, 256
    torch.manual_seed(0)
    ours = GumbelQuantizer(C, groups=G, codes=V, width=width).to(device)
    theirs = rivals.transformers_quantizer(ours).train()
    theirs.temperature = _TEMPERATURE
    x = torch.randn(M, C, device=device, requires_grad=True)
    grad_out = torch.randn(M, width, device=device)
    counters = torch.arange(M * G * V, device=device).view(M, G * V)
    fixed_noise = gumbel(torch.zeros_like(counters), counters, stream=0)
    mask = torch.ones(1, M, dtype=torch.bool, device=device)

    def run_ours(module: GumbelQuantizer, x: Tensor, noise: Tensor) -> Outputs:
        quantized = module(x, temperature=_TEMPERATURE, noise=noise)
        mean = quantized.probabilities.mean(0)
        perplexity = torch.exp(-(mean * torch.log(mean + 1e-7)).sum(-1)).sum()
        return _gradients(module, x, quantized.values, perplexity, grad_out)

    def with_fresh_noise() -> Outputs:
        return run_ours(
            ours, x, gumbel(draw_keys(1, device=device).expand(M * G * V).view(M, G * V), counters, stream=3)
        )

    def run_theirs() -> Outputs:
        values, perplexity = theirs(x.unsqueeze(0), mask_time_indices=mask)
        return _gradients(theirs, x, values[0], perplexity, grad_out)

    def check_theirs() -> Outputs:
        with mock.patch.object(F, "gumbel_softmax", rivals.gumbel_softmax_with(fixed_noise)):
            return run_theirs()

    in_double: Any = rivals.in_double(ours)
    contenders = Contenders()
    contenders.add("fastssl", with_fresh_noise, lambda: run_ours(ours, x, fixed_noise))
    contenders.add("Transformers, eager", run_theirs, check_theirs)
    gemms = limits.quantizer(M, C, G, V, width)
    return compare(
        f"Gumbel quantiser forward and backward, {M} frames, {G} x {V} codes x {width // G}",
        contenders,
        reference=lambda: run_ours(in_double, x.detach().double().requires_grad_(), fixed_noise),
        tolerance=1e-4,
        device=device,
        limits=lambda: limits.gemm_limits(gemms, torch.float32, device),
        budget_s=5,
    )


def _gradients(module: nn.Module, x: Tensor, values: Tensor, perplexity: Tensor, grad_out: Tensor) -> Outputs:
    parameters = dict(module.named_parameters())
    loss = (values * grad_out.to(values.dtype)).sum() - perplexity
    grad_x, *grads = torch.autograd.grad(loss, [x, *parameters.values()])
    named = {f"gradient of {name}": grad for name, grad in zip(parameters, grads, strict=True)}
    return {"values": values, "perplexity": perplexity, "gradient of x": grad_x} | named


ROWS: Rows = {"quantizer": forward_and_backward}

if __name__ == "__main__":
    main(ROWS, __doc__)
