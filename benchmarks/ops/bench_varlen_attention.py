"""Measure `varlen_attention`: `python -m benchmarks.ops.bench_varlen_attention --device cpu|cuda [--only ROW]`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import limits, workloads
from benchmarks.harness import Contenders, Entry, Outputs, Row, backends, compare
from benchmarks.report import Rows, main
from fastssl import ops
from fastssl.packing import Layout, Packed

_HEADS, _WIDTH, _REACH = 12, 64, 400


def attention(
    workload: str,
    lengths_s: Callable[[torch.device], Sequence[float]],
    device: torch.device,
    *,
    backward: bool = True,
    dropout_p: float = 0.0,
    bias: bool = False,
) -> Row:
    """Measure attention with the heads of a base model, in fp32 on the CPU and in bf16 on a GPU.

    The gate always compares without dropout; the tests check dropout masks.

    Args:
        workload: Name of the lengths, for the title of the row.
        lengths_s: Returns the lengths of the utterances in seconds, given the device.
        device: Device to measure on.
        backward: Whether to time forward and backward, or only forward.
        dropout_p: Dropout probability of the attention weights.
        bias: Whether to add WavLM's gated distance bias (arXiv:2110.13900); rivals take it as a dense matrix.
    """
    frames = workloads.frames(lengths_s(device))
    dtype, tolerance = (torch.float32, 1e-4) if device.type == "cpu" else (torch.bfloat16, 0.03)
    layout = Layout.from_lengths(frames, device=device)
    generator = torch.Generator().manual_seed(0)
    shape = (layout.total, _HEADS, _WIDTH)
    q, k, v, grad_out = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    packed = [x.requires_grad_(backward) for x in (q, k, v)]
    padded = [Packed(x.detach(), layout).to_padded().requires_grad_(backward) for x in (q, k, v)]
    padded_grad_out = Packed(grad_out, layout).to_padded()
    extra: list[Tensor] = []
    if bias:
        table = torch.randn(_HEADS, 2 * _REACH + 1, generator=generator).to(device)
        gate = torch.rand(layout.total, _HEADS, generator=generator).to(device)
        extra = [table.requires_grad_(backward), gate.requires_grad_(backward)]

    def outputs(out: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))] if backward else [out]

    def ours(backend: str, dropout_p: float, inputs: Sequence[Tensor] = (*packed, *extra)) -> Outputs:
        q, k, v, *more = inputs
        given: dict[str, Any] = dict(zip(("distance_bias", "gate"), more, strict=False))
        out = ops.varlen_attention(q, k, v, layout, dropout_p=dropout_p, backend=backend, **given)
        return _named(outputs(out, inputs, grad_out))

    def check_ours(backend: str) -> Outputs:
        ours(backend, dropout_p)  # a backend that does not support the case must fail here, before it is timed
        return ours(backend, 0.0)

    def by_sdpa(mask_of: Callable[[], Tensor | None]) -> Entry:
        def run(dropout_p: float) -> list[Tensor]:
            q, k, v = (x.transpose(1, 2) for x in padded)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(), dropout_p=dropout_p)
            return outputs(out.transpose(1, 2), [*padded, *extra], padded_grad_out)

        def check() -> Outputs:
            found = run(0.0)
            return _named([Packed.from_padded(x, frames).values for x in found[:4]] + found[4:])

        return partial(run, dropout_p), check

    def by_packed(function: Callable[..., Tensor]) -> Entry:
        def run(dropout_p: float) -> list[Tensor]:
            return outputs(function(*packed, layout, dropout_p), packed, grad_out)

        def check() -> Outputs:
            run(dropout_p)  # a function that does not support the case must fail here, before it is timed
            return _named(run(0.0))

        return partial(run, dropout_p), check

    valid = torch.arange(layout.max_length, device=device) < layout.cu_seqlens.diff().unsqueeze(1)

    def dense_bias() -> Tensor:
        table, gate = extra
        positions = torch.arange(layout.max_length, device=device)
        distances = (positions - positions.unsqueeze(1)).clamp(-_REACH, _REACH) + _REACH
        gates = Packed(gate, layout).to_padded().transpose(1, 2).unsqueeze(3)
        return (table[:, distances] * gates).masked_fill(~valid[:, None, None], -torch.inf).to(dtype)

    contenders = Contenders()
    for backend in backends("varlen_attention", device):
        contenders.add(f"fastssl, {backend}", partial(ours, backend, dropout_p), partial(check_ours, backend))
    if bias:
        contenders.add("SDPA, dense bias", *by_sdpa(dense_bias))
    else:
        contenders.add("SDPA, padded, with a mask", *by_sdpa(lambda: valid[:, None, None]))
        if min(frames) == max(frames):
            contenders.add("SDPA, padded, without a mask", *by_sdpa(lambda: None))
        contenders.add("SDPA, one utterance at a time", *by_packed(_one_at_a_time))
        if device.type == "cuda":
            contenders.add("varlen_attn", *by_packed(_varlen_attn))
            contenders.add("FlashAttention", *by_packed(_flash_attention))
    work = "forward and backward" if backward else "forward"
    kind = (f", dropout {dropout_p:g}" if dropout_p else "") + (", gated distance bias" if bias else "")
    gemms = limits.attention(frames, _HEADS, _WIDTH, backward=backward)
    doubles = [x.detach().double().requires_grad_(backward) for x in (*packed, *extra)]
    return compare(
        f"varlen_attention {work}{kind}, {workload}, {len(frames)} sequences of {min(frames)} to {max(frames)} frames",
        contenders,
        reference=lambda: ours("reference", 0.0, doubles),
        tolerance=tolerance,
        device=device,
        limits=lambda: limits.gemm_limits(gemms, dtype, device),
        budget_s=8,
    )


def _named(tensors: Sequence[Tensor]) -> Outputs:
    names = ("out", "grad_q", "grad_k", "grad_v", "grad_distance_bias", "grad_gate")
    return dict(zip(names, tensors, strict=False))


def _one_at_a_time(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout_p: float) -> Tensor:
    """Run SDPA in a loop over utterances, which needs no padding."""
    outputs = []
    for query, key, value in zip(*(x.transpose(0, 1).split(layout.lengths, 1) for x in (q, k, v)), strict=True):
        out = F.scaled_dot_product_attention(query[None], key[None], value[None], dropout_p=dropout_p)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _varlen_attn(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout_p: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout_p:
        raise NotImplementedError("varlen_attn does not support dropout")
    longest = layout.max_length
    out: Tensor = varlen_attn(q, k, v, layout.cu_seqlens, layout.cu_seqlens, longest, longest)  # type: ignore[assignment]
    return out


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout_p: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    longest = layout.max_length
    out: Tensor = flash_attn_varlen_func(
        q, k, v, layout.cu_seqlens, layout.cu_seqlens, longest, longest, dropout_p=dropout_p
    )
    return out


def _batch(
    lengths_s: Callable[[int], Sequence[float]], on_cpu: int, on_gpu: int, device: torch.device
) -> Sequence[float]:
    return lengths_s(on_cpu if device.type == "cpu" else on_gpu)


_READ_SPEECH = partial(attention, "read-speech", partial(_batch, workloads.read_speech, 8, 65))
_COMPRESSED = partial(attention, "after-compression", partial(_batch, workloads.after_compression, 32, 256))
ROWS: Rows = {
    "attention-read-speech": _READ_SPEECH,
    "attention-dropout": partial(_READ_SPEECH, dropout_p=0.1),
    "attention-equal": partial(attention, "equal", partial(_batch, workloads.equal, 4, 51)),
    "attention-forward": partial(_READ_SPEECH, backward=False),
    "attention-bias": partial(_READ_SPEECH, bias=True),
    "attention-compressed": _COMPRESSED,
    "attention-forward-compressed": partial(_COMPRESSED, backward=False),
    "attention-short": partial(attention, "short", partial(_batch, workloads.short, 16, 256)),
    "attention-long": partial(attention, "long", partial(_batch, workloads.long, 1, 13)),
}

if __name__ == "__main__":
    main(ROWS, __doc__)
