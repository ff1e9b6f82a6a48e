"""The public function of `varlen_attention`, its schema and its checks."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastssl.kernels.dispatch import Schemas, choose_backend, define_op
from fastssl.kernels.varlen_attention import reference
from fastssl.packing import Layout

_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_length, float scale, float dropout_p, Tensor? seed,"
    " Tensor? distance_bias, Tensor? gate) -> (Tensor out, Tensor logsumexp)"
)
_BACKWARD = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, Tensor cu_seqlens,"
    " SymInt max_length, float scale, float dropout_p, Tensor? seed, Tensor? distance_bias, Tensor? gate)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_distance_bias, Tensor grad_gate)"
)


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    distance_bias: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    logsumexp = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), logsumexp


def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    distance_bias: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # A schema cannot return None: the gradient of an argument that was not given is empty.
    grad_distance_bias, grad_gate = (
        q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (distance_bias, gate)
    )
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), grad_distance_bias, grad_gate


define_op(
    "varlen_attention",
    schemas=Schemas(_FORWARD, _BACKWARD, _fake_forward, _fake_backward),
    torch_devices=("cuda",),
    triton_kernels="fastssl.kernels.varlen_attention.triton_kernel",
)
_KERNELS = {"native": torch.ops.fastssl_native, "triton": torch.ops.fastssl_triton}


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        distance_bias: Tensor | None,
        gate: Tensor | None,
        seed: Tensor | None,
        cu_seqlens: Tensor,
        max_length: int,
        scale: float,
        dropout_p: float,
        backend: str,
    ) -> Tensor:
        out, logsumexp = _KERNELS[backend].varlen_attention_fwd(
            q, k, v, cu_seqlens, max_length, scale, dropout_p, seed, distance_bias, gate
        )
        ctx.save_for_backward(q, k, v, out, logsumexp, cu_seqlens, seed, distance_bias, gate)
        ctx.settings = max_length, scale, dropout_p, backend
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp, cu_seqlens, seed, distance_bias, gate = ctx.saved_tensors
        max_length, scale, dropout_p, backend = ctx.settings
        *grads, grad_distance_bias, grad_gate = _KERNELS[backend].varlen_attention_bwd(
            grad_out.contiguous(),
            q,
            k,
            v,
            out,
            logsumexp,
            cu_seqlens,
            max_length,
            scale,
            dropout_p,
            seed,
            distance_bias,
            gate,
        )
        return (
            *grads,
            None if distance_bias is None else grad_distance_bias,
            None if gate is None else grad_gate,
            *(None,) * 6,
        )


def varlen_attention(
    q: Tensor,  # (N, H, E)
    k: Tensor,  # (N, H, E)
    v: Tensor,  # (N, H, E)
    layout: Layout,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # ()
    distance_bias: Tensor | None = None,  # (H, 2R+1)
    gate: Tensor | None = None,  # (N, H)
    backend: str | None = None,
) -> Tensor:  # (N, H, E)
    """Attention of every frame to all frames of its own sequence (arXiv 1706.03762, equation 1), not causal.

    With `distance_bias` the logit of query i and key j gains gate[i, h] * distance_bias[h, clamp(j - i, -R, R) + R]
    (WavLM, arXiv 2110.13900, section III-B). The README says which hash decides what dropout keeps.

    Args:
        q: (N, H, E) queries.
        k: (N, H, E) keys, in the dtype of `q`.
        v: (N, H, E) values, in the dtype of `q`.
        layout: Where each sequence begins.
        scale: Factor of the products of queries and keys; None is E ** -0.5.
        dropout_p: Probability of dropping an attention weight; the kept ones are scaled by 1 / (1 - dropout_p).
        seed: () int64 on the device of `q`: the same seed and layout drop the same weights. None draws one from
            PyTorch's generator of that device, without waiting for it, so activation checkpointing repeats it.
        distance_bias: (H, 2R + 1), by key position minus query position, the ends standing for everything beyond.
        gate: (N, H) factor of a query's distance bias; None is 1. Only with `distance_bias`.
        backend: See `fastssl.ops`; None takes the fastest there is. "torch", on CUDA only, serves neither bias nor
            dropout and needs fp16 or bf16, the default scale, and E a multiple of 8 up to 256. "triton" takes fp32,
            fp16 and bf16 and E up to 128.

    Returns:
        (N, H, E) in the dtype of `q`, which under autocast is autocast's for all three. Logits, softmax, bias and sums
        are computed in at least fp32.

    Raises:
        ValueError: Shapes, dtypes or options do not fit, or `backend` cannot serve the call.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, layout, dropout_p, seed, distance_bias, gate)
    why_not = {"torch": _why_not_torch(q, layout, scale, dropout_p, distance_bias), "triton": _why_not_triton(q)}
    unsupported = {name: why for name, why in why_not.items() if why is not None}
    chosen = choose_backend("varlen_attention", q, backend, unsupported=unsupported)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (), device=q.device)
    with torch.autocast(device, enabled=False):
        if chosen == "torch":
            return _torch_kernel(q, k, v, layout)
        if chosen in _KERNELS:
            inputs = (None if x is None else x.contiguous() for x in (q, k, v, distance_bias, gate))
            out: Tensor = _VarlenAttention.apply(
                *inputs, seed, layout.cu_seqlens, layout.max_length, scale, dropout_p, chosen
            )
            return out
        assert chosen == "reference"
        return reference.varlen_attention(
            q, k, v, layout, scale=scale, dropout_p=dropout_p, seed=seed, distance_bias=distance_bias, gate=gate
        )


def _torch_kernel(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """PyTorch's own attention: `varlen_attn`, default scale only."""
    from torch.nn.attention.varlen import varlen_attn

    longest = layout.max_length
    out = varlen_attn(q, k, v, layout.cu_seqlens, layout.cu_seqlens, longest, longest)
    assert isinstance(out, Tensor)
    return out


def _why_not_torch(
    q: Tensor, layout: Layout, scale: float | None, dropout_p: float, distance_bias: Tensor | None
) -> str | None:
    if distance_bias is not None:
        return "PyTorch's kernel has no distance bias"
    if dropout_p > 0:
        return "PyTorch's kernel has no dropout that could be repeated"
    if q.device.type == "cuda":
        if q.dtype not in (torch.float16, torch.bfloat16):
            return f"varlen_attn takes float16 and bfloat16, not {q.dtype}"
        if q.shape[2] % 8 or q.shape[2] > 256:
            return f"varlen_attn takes E a multiple of 8 up to 256, not {q.shape[2]}"
        if scale is not None:
            return "varlen_attn of PyTorch 2.10 has the default scale only"
        if layout.total == 0:
            return "varlen_attn takes no empty batch"
        if torch.cuda.get_device_properties(q.device).major < 8:  # the compiler takes it for a constant
            return "varlen_attn needs compute capability 8.0"
    return None


def _why_not_triton(q: Tensor) -> str | None:
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels take float32, float16 and bfloat16, not {q.dtype}"
    return f"its kernels take E up to 128, not {q.shape[2]}" if q.shape[2] > 128 else None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    dropout_p: float,
    seed: Tensor | None,
    distance_bias: Tensor | None,
    gate: Tensor | None,
) -> None:
    if q.dim() != 3 or q.shape[0] != layout.total:
        raise ValueError(f"q: expected ({layout.total}, H, E) for this layout, got {tuple(q.shape)}")
    if layout.cu_seqlens.device != q.device:
        raise ValueError(f"layout: is on {layout.cu_seqlens.device}, q on {q.device}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{name}: expected {tuple(q.shape)} {q.dtype}, as q, got {tuple(x.shape)} {x.dtype}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: must be at least 0 and less than 1, got {dropout_p}")
    if seed is not None and (seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != q.device):
        raise ValueError(
            f"seed: expected () torch.int64 on {q.device}, got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )
    heads = q.shape[1]
    if distance_bias is None:
        if gate is not None:
            raise ValueError("gate: given, but there is no distance_bias")
        return
    if distance_bias.dim() != 2 or distance_bias.shape[0] != heads or distance_bias.shape[1] % 2 == 0:
        raise ValueError(f"distance_bias: expected ({heads}, 2R+1), got {tuple(distance_bias.shape)}")
    if gate is not None and gate.shape != q.shape[:2]:
        raise ValueError(f"gate: expected {tuple(q.shape[:2])}, got {tuple(gate.shape)}")
