"""fastssl's attention inside Transformers' own encoders: `attn_implementation="fastssl"`."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.interop.calls import recorded_by
from fastssl.packing import Layout, PaddedRows

NAME = "fastssl"


def register_attention() -> None:
    """Register `attn_implementation="fastssl"` with Transformers: `ops.varlen_attention` over the valid frames only.

    Any bidirectional encoder that lets the user choose its attention can use it, for speech or not; WavLM cannot. The
    rest of the model still computes the padding; use `accelerate` to avoid that. The attention's output is zero at
    padding frames. The padding mask (B, T) may have gaps. Attention weights are not returned.

    Raises:
        ImportError: Transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,  # (B, T)
    **options: Any,
) -> PaddedRows | None:
    """Find the valid rows of a padding mask, once per forward pass; None without a mask.

    This is the only place where the host waits for the device.
    """
    from transformers.masking_utils import bidirectional_mask_function

    _refuse_recording(())
    if mask_function is not bidirectional_mask_function or q_length != kv_length:
        raise ValueError(
            f"attn_implementation: {NAME!r} supports only bidirectional self-attention with q, k and v of one shape; "
            "choose 'eager' for causal or cross-attention"
        )
    if attention_mask is None:
        return None
    return PaddedRows.from_mask(attention_mask.bool())


def _attend(
    module: nn.Module,
    query: Tensor,  # (B, H, T, E)
    key: Tensor,  # (B, H, T, E)
    value: Tensor,  # (B, H, T, E)
    attention_mask: PaddedRows | Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # (B, T, H, E)
    _refuse_recording((query,))
    if is_causal or getattr(module, "is_causal", False) or not query.shape == key.shape == value.shape:
        raise ValueError(
            f"attn_implementation: {NAME!r} supports only bidirectional self-attention with q, k and v of one shape; "
            "choose 'eager' for causal or cross-attention"
        )
    if isinstance(attention_mask, Tensor) or options.get("position_bias") is not None:
        raise ValueError(
            f"attn_implementation: {NAME!r} supports padding masks (B, T), but neither dense masks nor a position "
            "bias; choose 'eager' instead"
        )
    if options.get("output_attentions"):
        warnings.warn(f"attn_implementation={NAME!r} returns no attention weights; use 'eager' for them", stacklevel=2)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is None:
        B, T = q.shape[:2]
        cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=q.device) * T
        layout = Layout((T,) * B, cu_seqlens, T if B else 0, B * T)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return ops.varlen_attention(q, k, v, layout, scale=scaling, dropout_p=dropout).unflatten(0, (B, T)), None
    q, k, v = (attention_mask.pack(x) for x in (q, k, v))
    return attention_mask.pad(
        ops.varlen_attention(q, k, v, attention_mask.layout, scale=scaling, dropout_p=dropout)
    ), None


def _refuse_recording(arguments: Iterable[Any]) -> None:
    """Raise ValueError if a call is recorded, because the lengths of its batch would be constants."""
    if recorder := recorded_by(arguments):
        raise ValueError(
            f"attn_implementation: {NAME!r} cannot be recorded by {recorder}; load or set the model with 'sdpa' or "
            "'eager' first, for example by `model.set_attn_implementation('sdpa')`"
        )
