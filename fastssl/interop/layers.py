"""The parts of other people's encoders over packed frames: their modules and parameters, our ops.

A linear layer, norm or dropout that is not the plain one of PyTorch (an adapter in its place, a hook on it) is called
as it is, on (N, C). Where anything else is not as its library made it, the original code runs: `foreign_code`.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import ops
from fastssl.nn.activation import sigmoid
from fastssl.nn.linear import packed_linear
from fastssl.packing import Layout, Packed


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly PyTorch's own, and nobody watches it."""
    return type(module) is kind and not _is_watched(module) and type(getattr(module, "weight", None)) in _PLAIN_WEIGHTS


_PLAIN_WEIGHTS = (nn.Parameter, Tensor, type(None))  # not a quantised or sharded one


def _is_watched(module: nn.Module) -> bool:
    """Whether a call of it does more than its class's `forward`."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks or "forward" in vars(module):
        return True
    return any(getattr(hook, "__module__", None) != _RECORDER for hook in module._forward_hooks.values())


#: Leaves hooks on the layers of every model once asked for hidden states or attention weights; they change nothing.
_RECORDER = "transformers.utils.output_capturing"


_LIBRARIES = ("transformers.", "torchaudio.", "torch.nn.", "fastssl.")


def foreign_code(modules: Iterable[nn.Module]) -> str | None:
    """Why ours may not stand in for the `forward` of these modules; None where it may.

    A hook on one of them, or a class of somebody else's in its place, would be left out without a word.
    """
    for module in modules:
        kind = type(module)
        if not kind.__module__.startswith(_LIBRARIES):
            return f"a {kind.__module__}.{kind.__name__} is in the place of a module of the original"
        if _is_watched(module):
            return f"a {kind.__name__} has a hook or a forward of its own"
    return None


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, or what stands in its place."""
    if is_plain(module, nn.Linear):
        return packed_linear(x, module.weight, module.bias)  # type: ignore[arg-type]
    out: Tensor = module(x)
    return out


def dropout_p(module: nn.Module) -> float:
    """The probability that a dropout module has just now."""
    return float(module.p) if module.training else 0.0  # type: ignore[arg-type]


def add_and_norm(branch: Tensor, residual: Tensor, norm: Any, dropout: Any) -> Tensor:
    """`norm(residual + dropout(branch))`."""
    if is_plain(norm, nn.LayerNorm) and is_plain(dropout, nn.Dropout):
        out: Tensor = ops.dropout_add_layer_norm(
            branch, residual, weight=norm.weight, bias=norm.bias, eps=norm.eps, dropout_p=dropout_p(dropout)
        )
        return out
    normalised: Tensor = norm(residual + dropout(branch))
    return normalised


def sum_and_norm(branch: Tensor, residual: Tensor, norm: Any, dropout: Any) -> tuple[Tensor, Tensor]:
    """`residual + dropout(branch)`, and its norm."""
    if is_plain(norm, nn.LayerNorm) and is_plain(dropout, nn.Dropout):
        normalised, total = ops.dropout_add_layer_norm(
            branch,
            residual,
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
            dropout_p=dropout_p(dropout),
            prenorm=True,
        )
        return total, normalised
    total = residual + dropout(branch)
    return total, norm(total)


def gelu_dropout(x: Tensor, dropout: nn.Module) -> Tensor:
    """`dropout(gelu(x))`."""
    if is_plain(dropout, nn.Dropout):
        return ops.bias_gelu_dropout(x, None, dropout_p=dropout_p(dropout))
    out: Tensor = dropout(F.gelu(x))
    return out


def feed_forward(dense: nn.Module, dropout: nn.Module, output: nn.Module, x: Tensor) -> Tensor:
    """Two linear layers with GELU and dropout between them."""
    return linear(output, gelu_dropout(linear(dense, x), dropout))


def attention(
    modules: Any,
    x: Tensor,  # (N, D)
    layout: Layout,
    *,
    heads: int,
    dropout: float,
    distance_bias: Tensor | None = None,  # (H, 2R + 1)
    gate: Tensor | None = None,  # (N, H)
) -> Tensor:  # (N, D)
    """Self-attention by the linear layers `q_proj`, `k_proj`, `v_proj` and `out_proj` of a module."""
    q, k, v = (
        linear(module, x).unflatten(1, (heads, -1)) for module in (modules.q_proj, modules.k_proj, modules.v_proj)
    )
    attended = ops.varlen_attention(q, k, v, layout, dropout_p=dropout, distance_bias=distance_bias, gate=gate)
    return linear(modules.out_proj, attended.flatten(1))


def distance_bias(attention: Any) -> Tensor:
    """WavLM's relative position bias (arXiv 2110.13900, section 2.2) by distance, (H, 2R + 1): constant beyond R."""
    # The buckets are found on the host, as the originals do: a logarithm elsewhere may round to another one.
    distances = torch.arange(-attention.max_distance, attention.max_distance + 1)
    embedding = attention.rel_attn_embed
    bias: Tensor = embedding(attention._relative_positions_bucket(distances).to(embedding.weight.device))
    return bias.t()


def gate(attention: Any, x: Tensor) -> Tensor:  # (N, D) -> (N, H)
    """What WavLM multiplies that bias with, by frame and head."""
    heads = x.unflatten(1, (attention.num_heads, -1)).flatten(0, 1)  # (N * H, E)
    projected = linear(attention.gru_rel_pos_linear, heads).unflatten(1, (2, 4)).sum(-1)
    gate_a, gate_b = sigmoid(projected).unflatten(0, (len(x), attention.num_heads)).unbind(-1)
    gate: Tensor = gate_a * (gate_b * attention.gru_rel_pos_const.view(-1) - 1.0) + 2.0
    return gate


def front_end(conv_layers: Any, waveforms: Packed) -> Packed:
    """Strided convolutions, each a module with `conv` and perhaps `layer_norm`; GELU after each."""
    layers = []
    for module in conv_layers:
        conv, norm = module.conv, getattr(module, "layer_norm", None)
        kind: Literal["none", "group", "layer"] = "none"
        if norm is not None:
            kind = "group" if isinstance(norm, nn.GroupNorm) else "layer"
        layers.append(
            ops.StridedConvLayer(
                conv.weight,
                conv.stride[0],
                conv.bias,
                kind,
                None if norm is None else norm.weight,
                None if norm is None else norm.bias,
                1e-5 if norm is None else norm.eps,
            )
        )
    return Packed(*ops.strided_conv_stack(waveforms.values, layers, waveforms.layout))


def positional_conv(conv: Any, x: Tensor, layout: Layout) -> Tensor:
    """A grouped convolution as long as its input, before its activation; `conv` may have a parametrized weight."""
    return ops.positional_conv(x, conv.weight, layout, bias=conv.bias)


def dropout(module: nn.Module, x: Tensor) -> Tensor:
    """A dropout module, skipped where it does nothing."""
    if is_plain(module, nn.Dropout) and dropout_p(module) == 0:
        return x
    out: Tensor = module(x)
    return out


def padded_by_last(x: Packed, length: int) -> Tensor:  # (N, D) -> (B, length, D)
    """A padded batch with each utterance's last frame behind it, and zeros where there is none.

    Greedy CTC decoding of the whole row gives the text of the utterance then. No gradient comes from the padding.
    """
    padded = x.to_padded(length=length)
    lengths = x.layout.cu_seqlens.diff()
    if not x.layout.total or min(x.layout.lengths) == length:
        return padded
    last = x.values.detach()[(x.layout.cu_seqlens[1:].long() - 1).clamp(min=0)]
    last = torch.where(lengths.unsqueeze(1) > 0, last, 0)
    valid = torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)
    return torch.where(valid.unsqueeze(2), padded, last.unsqueeze(1))


def waveforms_of(x: Tensor, lengths: list[int]) -> Packed:
    """(B, T) padded samples as (N, 1) packed ones."""
    packed = Packed.from_padded(x, lengths)
    return Packed(packed.values.unsqueeze(1), packed.layout)


def valid_lengths(mask: Tensor, samples: int, batch: int, *, name: str) -> list[int]:
    """How many samples of each row are valid.

    Args:
        mask: (B, T) 1 for samples and 0 for padding, bool, integer or floating.
        samples: T.
        batch: B.
        name: Of the argument, for errors.

    Raises:
        ValueError: Another shape, other values, or padding that is not at the end.
    """
    if mask.shape != (batch, samples):
        raise ValueError(f"{name}: expected {(batch, samples)} as the waveforms, got {tuple(mask.shape)}")
    valid = mask != 0
    lengths = valid.sum(1)
    positions = torch.arange(samples, device=mask.device)
    as_expected = valid == (positions < lengths.unsqueeze(1))
    ones = (mask == 1) | ~valid
    host = torch.cat([lengths, (as_expected.all() & ones.all()).long().unsqueeze(0)]).tolist()  # the device, once
    if not host.pop():
        if not bool(ones.all()):
            raise ValueError(f"{name}: must be 1 (a sample) or 0 (padding)")
        row = int((~as_expected).any(1).nonzero()[0])
        raise ValueError(f"{name}: row {row} has padding before or between samples; only padding at the end is served")
    return [int(length) for length in host]
