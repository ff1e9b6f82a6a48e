"""The public function of `varlen_attention`, its operators and its checks."""

from typing import Any

import torch
from torch import Tensor

from fastssl.kernels import philox
from fastssl.kernels.autograd import once_differentiable
from fastssl.kernels.dispatch import Op, autocast_off, contiguous, to_autocast_dtype
from fastssl.kernels.randomness import resolve_randomness
from fastssl.kernels.varlen_attention import reference
from fastssl.packing import Layout


def _fake_forward(
    q: Tensor,  # (N, H, E)
    k: Tensor,  # (N, H, E)
    v: Tensor,  # (N, H, E)
    cu_seqlens: Tensor,  # (B + 1,)
    max_length: int,
    scale: float,
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,  # ()
    distance_bias: Tensor | None,  # (H, 2R+1)
    gate: Tensor | None,  # (N, H)
) -> tuple[Tensor, Tensor]:  # out, logsumexp
    logsumexp = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), logsumexp


def _fake_backward(
    grad_out: Tensor,  # (N, H, E)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # (N, H, E)
    logsumexp: Tensor,  # (H, N)
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    dropout_p: float,
    randomness: int,
    seed: Tensor | None,
    distance_bias: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # A schema cannot return None, so the gradient of a missing argument is an empty tensor.
    grad_bias, grad_gate = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (distance_bias, gate))
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), grad_bias, grad_gate


_OP = Op(
    "varlen_attention",
    _fake_forward,
    _fake_backward,
    torch_devices=("cuda",),
    triton_kernels="fastssl.kernels.varlen_attention.triton_kernel",
)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *inputs: Any) -> Any:  # inputs as in `_fake_forward`
        inputs = contiguous(inputs)
        out, logsumexp = _OP.forward[backend](*inputs)
        q, k, v, cu_seqlens, *settings, seed, distance_bias, gate = inputs
        ctx.save_for_backward(q, k, v, out, logsumexp, cu_seqlens, seed, distance_bias, gate)
        ctx.backend, ctx.settings = backend, settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, seed, distance_bias, gate = contiguous(ctx.saved_tensors)
        *grads_qkv, grad_distance_bias, grad_gate = _OP.backward[ctx.backend](
            *contiguous(grads), *saved, *ctx.settings, seed, distance_bias, gate
        )
        optional = None if distance_bias is None else grad_distance_bias, None if gate is None else grad_gate
        return None, *grads_qkv, *(None,) * 6, *optional


def varlen_attention(
    q: Tensor,  # (N, H, E)
    k: Tensor,  # (N, H, E)
    v: Tensor,  # (N, H, E)
    layout: Layout,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # ()
    randomness: int | None = None,
    distance_bias: Tensor | None = None,  # (H, 2R+1)
    gate: Tensor | None = None,  # (N, H)
    backend: str | None = None,
) -> Tensor:  # (N, H, E)
    """Let each frame attend to all frames of its own sequence (arXiv 1706.03762, equation 1); not causal.

    With `distance_bias`, gate[i, h] * distance_bias[h, clamp(j - i, -R, R) + R] is added to the logit of query i and
    key j in head h (WavLM, arXiv 2110.13900, section III-B). The README of the op specifies the dropout mask.

    Args:
        q: (N, H, E) queries, for H heads of E channels.
        k: (N, H, E) keys, in the dtype of `q`.
        v: (N, H, E) values, in the dtype of `q`.
        layout: Where each sequence begins.
        scale: Factor of the dot products of queries and keys; None uses E ** -0.5.
        dropout_p: Probability of dropping an attention weight; the kept ones are multiplied by 1 / (1 - dropout_p).
            Version 2 of the randomness rounds the probability to a multiple of 2^-16.
        seed: () int64 on the device of `q`; the same seed and layout drop the same weights. None draws a seed from
            PyTorch's generator of that device; the host does not wait for the seed. Activation checkpointing restores
            that generator.
        randomness: Version of the random draws, 1 or 2 (`fastssl.kernels.randomness`); None uses the version in force.
        distance_bias: (H, 2R + 1) bias of any floating dtype, indexed by key position minus query position plus R. The
            first and last entries also apply to all larger distances.
        gate: (N, H) factor of the bias for each query and head; None uses 1. Requires `distance_bias`.
        backend: Implementation to run, see `fastssl.ops`; None picks the fastest available. "torch" exists on CUDA
            only; it supports neither bias nor dropout, and needs fp16 or bf16, the default scale, and E a multiple of 8
            up to 256. "triton" supports fp32, fp16 and bf16, and E up to 128.

    Returns:
        (N, H, E) in the dtype of `q`. Under autocast, `q`, `k` and `v` are cast to autocast's dtype first. Logits,
        softmax, bias and sums are computed in at least fp32.

    Raises:
        ValueError: A shape, dtype or option is invalid, or `backend` cannot run this call.
    """
    q, k, v = to_autocast_dtype(q, k, v)
    _check(q, k, v, layout, distance_bias, gate)
    unsupported = {"torch": _why_not_torch(q, layout, scale, dropout_p, distance_bias), "triton": _why_not_triton(q)}
    chosen = _OP.choose(q, backend, unsupported)
    randomness = resolve_randomness(randomness)
    seed = philox.resolve_seed(seed, dropout_p=dropout_p, device=q.device)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    with autocast_off(q):
        if chosen == "torch":
            return _torch_kernel(q, k, v, layout)
        if chosen == "reference":
            return reference.varlen_attention(
                q,
                k,
                v,
                layout,
                scale=scale,
                dropout_p=dropout_p,
                randomness=randomness,
                seed=seed,
                distance_bias=distance_bias,
                gate=gate,
            )
        settings = layout.cu_seqlens, layout.max_length, scale, dropout_p, randomness
        out: Tensor = _VarlenAttention.apply(chosen, q, k, v, *settings, seed, distance_bias, gate)
        return out


def _torch_kernel(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Compute attention with PyTorch's `varlen_attn` and the default scale."""
    from torch.nn.attention.varlen import varlen_attn

    longest = layout.max_length
    out = varlen_attn(q, k, v, layout.cu_seqlens, layout.cu_seqlens, longest, longest)
    assert isinstance(out, Tensor)
    return out


def _why_not_torch(
    q: Tensor, layout: Layout, scale: float | None, dropout_p: float, distance_bias: Tensor | None
) -> str | None:
    """Return why PyTorch's `varlen_attn` cannot run this call, or None if it can."""
    if distance_bias is not None:
        return "PyTorch's kernel has no distance bias"
    if dropout_p > 0:
        return "PyTorch's kernel has no dropout with a reproducible mask"
    if q.device.type == "cuda":
        if q.dtype not in (torch.float16, torch.bfloat16):
            return f"varlen_attn supports float16 and bfloat16, not {q.dtype}"
        if q.shape[2] % 8 or q.shape[2] > 256:
            return f"varlen_attn needs E to be a multiple of 8 up to 256, got {q.shape[2]}"
        if scale is not None:
            return "varlen_attn of PyTorch 2.10 supports the default scale only"
        if layout.total == 0:
            return "varlen_attn does not support an empty batch"
        if torch.cuda.get_device_properties(q.device).major < 8:  # torch.compile treats it as a constant
            return "varlen_attn needs a GPU of compute capability 8.0 or above"
    return None


def _why_not_triton(q: Tensor) -> str | None:
    """Return why the Triton kernels cannot run this call, or None if they can."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels support float32, float16 and bfloat16, not {q.dtype}"
    return f"its kernels support E up to 128, not {q.shape[2]}" if q.shape[2] > 128 else None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    distance_bias: Tensor | None,
    gate: Tensor | None,
) -> None:
    if q.dim() != 3 or q.shape[0] != layout.total:
        raise ValueError(f"q: expected ({layout.total}, H, E) for this layout, got {tuple(q.shape)}")
    if layout.cu_seqlens.device != q.device:
        raise ValueError(f"layout: is on {layout.cu_seqlens.device}, must be on {q.device} like q")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{name}: expected {tuple(q.shape)} {q.dtype} like q, got {tuple(x.shape)} {x.dtype}")
    heads = q.shape[1]
    if distance_bias is None:
        if gate is not None:
            raise ValueError("gate: given, but distance_bias is None; pass distance_bias as well, or no gate")
        return
    if distance_bias.dim() != 2 or distance_bias.shape[0] != heads or distance_bias.shape[1] % 2 == 0:
        raise ValueError(f"distance_bias: expected ({heads}, 2R+1), got {tuple(distance_bias.shape)}")
    if gate is not None and gate.shape != q.shape[:2]:
        raise ValueError(f"gate: expected {tuple(q.shape[:2])}, got {tuple(gate.shape)}")
