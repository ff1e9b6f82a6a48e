"""Run the Conformer of Transformers' wav2vec 2.0 (`Wav2Vec2ConformerModel`) on packed batches, in evaluation.

Each utterance is computed as the original computes it alone: the depthwise convolutions see zeros beyond its ends.
Batch norm uses its running statistics in evaluation. In training, it would use those of the whole batch, so
`accelerate` refuses a model in training mode, and one that is trained later runs the original code, with one warning.

Positions are rotary or none; the relative ones add a bias to the logits that depends on the query. The angles are
computed in at least fp32, from the original's frequencies, also where a model in bf16 rounds the positions to bf16.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.interop import encoders, transformers
from fastssl.interop.shown_states import ShownStates
from fastssl.nn import functional as F
from fastssl.nn.activation import glu, silu
from fastssl.nn.linear import packed_linear
from fastssl.nn.rotary import Rotation, rotate, rotation_by
from fastssl.packing import Layout, Packed

_SOURCES = {"Wav2Vec2ConformerModel": "transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer"}
_BATCH_NORM = "batch norm in training mode uses the statistics of the whole batch"


def _check(module: Any) -> None:
    """Raise ValueError if an encoder lacks a part, has an unsupported one, or is in training mode."""
    transformers.check_parts(module, "feature_extractor", "feature_projection", "encoder.layer_norm", "encoder.layers")
    name, config = type(module).__name__, module.config
    if config.position_embeddings_type not in ("rotary", None):
        raise ValueError(
            f"model: {name} with config.position_embeddings_type={config.position_embeddings_type!r} is not supported, "
            "because fastssl's attention has no bias that depends on the query; only 'rotary' and None are supported"
        )
    if config.hidden_act not in ("gelu", "silu", "swish"):
        raise ValueError(
            f"model: {name} with config.hidden_act={config.hidden_act!r} is not supported, only 'gelu', 'silu' and "
            "'swish'"
        )
    transformers.check_activations(module, "feat_extract_activation")
    if (reason := _refuses(module)) is not None:
        raise ValueError(
            f"model: {name} is in training mode, but {reason}, so that only evaluation can be accelerated; call "
            "`model.eval()` first"
        )


def _refuses(model: Any) -> str | None:
    parts = [part for layer in model.encoder.layers for part in (layer.self_attn, layer.conv_module.batch_norm)]
    return _BATCH_NORM if model.training or any(part.training for part in parts) else None


def _modules_not_called(model: Any) -> Iterator[nn.Module]:
    stack = model.encoder
    yield from encoders.front_end_not_called(model)
    yield from (model.feature_projection, stack)
    yield from encoders.parts(stack, "embed_positions")
    for layer in stack.layers:
        convolution = layer.conv_module
        yield from (layer, layer.ffn1, layer.ffn2, layer.self_attn, convolution)
        yield from (convolution.pointwise_conv1, convolution.depthwise_conv, convolution.pointwise_conv2)
    yield from transformers.adapter_not_called(model)


def _called_through(model: Any) -> tuple[nn.Module, ...]:
    return (model.feature_extractor,)


def _ask(model: Any, layout: Layout, padded_frames: int, left: tuple[bool, ...]) -> None:
    encoders.ask_for_layers(model, partial(_ask_for_layers, model.encoder), layout)
    transformers.ask_for_adapter(model, layout, padded_frames, left)


def _ask_for_layers(stack: Any, layout: Layout) -> None:
    """Ask a layout for what the layers compute with it."""
    layout.ask_for_indices()
    for layer in stack.layers:
        layout.rows_with_gaps(0, layer.conv_module.depthwise_conv.kernel_size[0] // 2)


def _encode(model: Any, x: Packed, padded_frames: int, left: tuple[bool, ...], *, shows: bool) -> transformers.Encoded:
    stack = model.encoder
    fewer, repeat = encoders.compress(model, partial(_ask_for_layers, stack), x)
    turn = _rotation(stack.embed_positions, fewer.layout)
    shown = ShownStates(lambda state: Packed(repeat(state), x.layout).to_padded(length=padded_frames, left=left))
    through = shown.through if shows and fewer is x else _unchanged  # a compressor's states are repeated ones

    def run(layer: Any, values: Tensor) -> Tensor:
        return _layer(layer, through(values), fewer.layout, turn)

    states = list(F.hidden_states(stack, fewer.values, stack.layers, run, pre_norm=True))
    last = stack.layer_norm(through(states[-1]))
    return transformers.Encoded(Packed(repeat(last), x.layout), states, shown.padded)


def _unchanged(values: Tensor) -> Tensor:
    return values


def _rotation(positions: Any, layout: Layout) -> Rotation | None:
    if positions is None:
        return None
    frequencies = positions.inv_freq.to(torch.promote_types(positions.inv_freq.dtype, torch.float32))
    return rotation_by(layout, frequencies, frequencies.dtype)


def _layer(layer: Any, x: Tensor, layout: Layout, turn: Rotation | None) -> Tensor:  # (N, D) -> (N, D)
    convolution = layer.conv_module
    branch = _half_feed_forward(layer.ffn1, layer.ffn1_layer_norm(x))
    x, normalised = F.sum_and_norm(branch, x, layer.self_attn_layer_norm)
    attended = _attention(layer.self_attn, normalised, layout, turn)
    x, normalised = F.sum_and_norm(attended, x, convolution.layer_norm, layer.self_attn_dropout)
    mixed = _convolution(convolution, normalised, layout)
    x, normalised = F.sum_and_norm(mixed, x, layer.ffn2_layer_norm, convolution.dropout)
    return F.add_and_norm(_half_feed_forward(layer.ffn2, normalised), x, layer.final_layer_norm)


def _half_feed_forward(module: Any, x: Tensor) -> Tensor:  # (N, D) -> (N, D)
    activation = module.intermediate_act_fn
    if encoders.activation_name(activation) == "gelu" and not F.is_watched(activation):
        out = F.feed_forward(module, x)
    else:
        inner = _activate(activation, F.linear(module.intermediate_dense, x))
        out = F.linear(module.output_dense, F.dropout(module.intermediate_dropout, inner))
    return 0.5 * F.dropout(module.output_dropout, out)


def _activate(activation: Any, x: Tensor) -> Tensor:  # (N, C) -> (N, C)
    if encoders.activation_name(activation) == "silu" and not F.is_watched(activation):
        return silu(x)
    out: Tensor = activation(x)
    return out


def _attention(module: Any, x: Tensor, layout: Layout, turn: Rotation | None) -> Tensor:  # (N, D) -> (N, D)
    """Apply self-attention. The original rotates the frames before it projects them, not queries and keys."""
    heads = partial(Tensor.unflatten, dim=1, sizes=(module.num_heads, -1))
    if turn is None:
        projected = F.linears((module.linear_q, module.linear_k, module.linear_v), x)
    else:
        turned = rotate(heads(x), turn).flatten(1)
        projected = [*F.linears((module.linear_q, module.linear_k), turned), F.linear(module.linear_v, x)]
    return F.linear(module.linear_out, F.attend(module, map(heads, projected), layout))


def _convolution(module: Any, x: Tensor, layout: Layout) -> Tensor:  # (N, D) -> (N, D)
    first, depthwise, last = module.pointwise_conv1, module.depthwise_conv, module.pointwise_conv2
    widen, kernels, narrow = map(F.convolution_weight, (first, depthwise, last))
    doubled = packed_linear(x, widen.squeeze(2), first.bias)
    gated = glu(doubled) if F.is_plain(module.glu, nn.GLU) else module.glu(doubled)
    mixed = ops.positional_conv(gated, kernels, layout, bias=depthwise.bias)
    return packed_linear(_activate(module.activation, module.batch_norm(mixed)), narrow.squeeze(2), last.bias)


CLASSES = transformers.accelerated_classes(
    __name__,
    _SOURCES,
    transformers.Architecture(_modules_not_called, transformers.project, _encode, _ask, _called_through, _refuses),
    _check,
    trains=False,
)
__getattr__ = CLASSES.by_name  # for pickle
