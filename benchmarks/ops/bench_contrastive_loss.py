"""Measure `contrastive_loss`: `python -m benchmarks.ops.bench_contrastive_loss --device cpu|cuda [--only ROW]`."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from benchmarks import limits, rivals, workloads
from benchmarks.harness import Contenders, Outputs, Row, backends, compare
from benchmarks.report import Rows, main
from fastssl import ops

_TEMPERATURE = 0.1


def forward_and_backward(device: torch.device) -> Row:
    """Measure the op on 900 masked frames of two utterances on the CPU, or on those of 800 s of audio on a GPU."""
    K, D = 100, 256
    if device.type == "cpu":
        masked = [520, 380]
    else:
        masked = [round(0.49 * n) for n in workloads.frames(workloads.read_speech(workloads.utterances_for(800)))]
    N = sum(masked)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(2000, D, generator=generator)  # few enough that some negatives equal the target
    context = torch.randn(N, D, generator=generator).to(device).requires_grad_()
    targets = codes[torch.randint(2000, (N,), generator=generator)].to(device).requires_grad_()
    firsts = [0, *accumulate(masked)]
    rows = [torch.randint(a, b, (b - a, K), generator=generator) for a, b in pairwise(firsts)]
    negatives = torch.cat(rows).to(device)
    grad_loss = torch.rand(N, generator=generator).to(device)

    def gradients(loss: Tensor, context: Tensor, targets: Tensor) -> Outputs:
        grad_context, grad_targets = torch.autograd.grad(loss, (context, targets), grad_loss.to(loss.dtype))
        return {"loss": loss, "grad_context": grad_context, "grad_targets": grad_targets}

    def ours(backend: str, context: Tensor = context, targets: Tensor = targets) -> Outputs:
        loss, _ = ops.contrastive_loss(context, targets, negatives, temperature=_TEMPERATURE, backend=backend)
        return gradients(loss, context, targets)

    def gathered(function: Callable[..., Tensor]) -> Callable[[], Outputs]:
        return lambda: gradients(function(context, targets, negatives, temperature=_TEMPERATURE), context, targets)

    contenders = Contenders()
    for backend in backends("contrastive_loss", device):
        contenders.add(f"fastssl, {backend}", partial(ours, backend))
    contenders.add("Transformers' formula", gathered(rivals.contrastive_loss))
    by_compiler = torch.compile(rivals.contrastive_loss, dynamic=False)
    contenders.add("Transformers' formula, torch.compile", gathered(by_compiler))
    gemms = [gemm for frames in masked for gemm in limits.linear(frames, D, frames, backward=True)]
    return compare(
        f"contrastive loss forward and backward, {N} masked frames, {K} negatives, {D} wide",
        contenders,
        reference=lambda: ours("reference", *(x.detach().double().requires_grad_() for x in (context, targets))),
        tolerance=1e-4,
        device=device,
        limits=lambda: limits.gemm_limits(gemms, torch.float32, device),
        budget_s=5,
    )


ROWS: Rows = {"contrastive-loss": forward_and_backward}

if __name__ == "__main__":
    main(ROWS, __doc__)
