"""Transformers' speech encoders, run packed.

An accelerated encoder is of a subclass of its class, with the same name and another `forward`: `isinstance`, pickling,
`save_pretrained`, `copy.deepcopy` and every head see the model they know.
"""

import importlib
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import ops
from fastssl.interop import layers as L
from fastssl.interop.classes import NORM, AcceleratedClasses, compress
from fastssl.interop.layers import waveforms_of
from fastssl.models.folder import ACCELERATED_COMPRESSOR
from fastssl.nn.activation import sigmoid
from fastssl.packing import Layout, Packed


class _Architecture(NamedTuple):
    module: str  # of transformers.models
    masks_valid_frames_only: bool = True  # whether SpecAugment knows which frames are padding


_ARCHITECTURES = {
    "Wav2Vec2Model": _Architecture("wav2vec2.modeling_wav2vec2"),
    "HubertModel": _Architecture("hubert.modeling_hubert", masks_valid_frames_only=False),
    "WavLMModel": _Architecture("wavlm.modeling_wavlm"),
    "Data2VecAudioModel": _Architecture("data2vec.modeling_data2vec_audio"),
    "UniSpeechModel": _Architecture("unispeech.modeling_unispeech"),
    "UniSpeechSatModel": _Architecture("unispeech_sat.modeling_unispeech_sat"),
}
KNOWN = tuple(f"transformers.{name}" for name in _ARCHITECTURES)


def knows(module: nn.Module) -> bool:
    """Whether it is one of the encoders, accelerated or not."""
    return _CLASSES.original(module) is not None


def check(module: nn.Module) -> None:
    """Raise ValueError where an encoder has a part that is not served."""
    name, config = type(module).__name__, module.config
    for key, served in {"hidden_act": "gelu", "feat_extract_activation": "gelu"}.items():
        if getattr(config, key, served) != served:
            raise ValueError(f"model: {name} with config.{key}={getattr(config, key)!r} is not served, only {served!r}")
    if getattr(config, "conv_pos_batch_norm", False):
        raise ValueError(f"model: {name} with config.conv_pos_batch_norm is not served: it takes batch mates in")


def accelerate(module: nn.Module, norm: str) -> None:
    """Give an encoder our `forward`."""
    _CLASSES.put_on(module, norm)


def width(module: Any) -> int:
    """D."""
    return int(module.config.hidden_size)


def restore(module: nn.Module) -> None:
    """Give an encoder its own `forward` back."""
    _CLASSES.take_off(module)


def _methods(original: type[nn.Module]) -> dict[str, Any]:
    # Traced, every new set of lengths would be compiled anew, and the ops are fused already.
    run = torch.compiler.disable(_forward, reason="an accelerated encoder runs as it is")

    def forward(
        self: Any,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        reason = L.foreign_code(_modules_not_called(self))
        if _option(self, kwargs, "output_attentions"):
            reason = "attention weights exist in the original code only"
        if reason is not None and hasattr(self, ACCELERATED_COMPRESSOR):
            raise ValueError(f"{reason}, which has no place for the compressor")
        if reason is not None:
            warnings.warn(f"{reason}, so the original code runs, padded", stacklevel=2)
            return _as_original(self, original).forward(input_values, attention_mask, mask_time_indices, **kwargs)
        return run(self, original, input_values, attention_mask, mask_time_indices, kwargs)

    return {"forward": forward}


_CLASSES = AcceleratedClasses(
    __name__,
    {name: f"transformers.models.{architecture.module}" for name, architecture in _ARCHITECTURES.items()},
    _methods,
)
__getattr__ = _CLASSES.by_name  # for pickle


def _as_original(model: nn.Module, original: type[nn.Module]) -> Any:
    """The same model, of its own class, by which Transformers records outputs; other threads see no change."""
    view = original.__new__(original)
    object.__setattr__(view, "__dict__", vars(model))
    return view


def _modules_not_called(model: Any) -> Iterator[nn.Module]:
    """Those that the original calls and this code only reads."""
    if getattr(model, NORM) == "valid":
        yield model.feature_extractor
        for block in model.feature_extractor.conv_layers:
            yield from (block, block.conv)
            if hasattr(block, "layer_norm"):
                yield block.layer_norm
    encoder, position = model.encoder, model.encoder.pos_conv_embed
    yield from (encoder, model.feature_projection, position)
    for block in getattr(position, "layers", [position]):
        yield from (block, block.conv)
    for layer in encoder.layers:
        yield from (layer, layer.attention, layer.feed_forward)
    if getattr(model, "adapter", None) is not None:
        yield model.adapter
        for layer in model.adapter.layers:
            yield from (layer, layer.conv)


def _option(model: Any, given: dict[str, Any], name: str) -> Any:
    value = given.get(name)
    return getattr(model.config, name, None) if value is None else value


def _forward(
    self: Any,
    original: type[nn.Module],
    input_values: Tensor,  # (B, T)
    attention_mask: Tensor | None,  # (B, T)
    mask_time_indices: Tensor | None,  # (B, F)
    options: dict[str, Any],
) -> Any:
    """What the original returns, from packed frames."""
    if input_values.dim() != 2:
        raise ValueError(f"input_values: expected (B, T) samples, got {tuple(input_values.shape)}")
    batch, samples = input_values.shape
    if attention_mask is None:
        lengths = [samples] * batch
    else:
        lengths = L.valid_lengths(attention_mask, samples, batch, name="attention_mask")
    padded_frames = _frames_after(self, samples)

    frames = _front_end(self, input_values, lengths)
    projected, normalised = _project(self.feature_projection, frames.values)
    x = _mask(
        self,
        original,
        Packed(projected, frames.layout),
        mask_time_indices,
        padded_frames,
        has_padding=attention_mask is not None,
    )
    fewer, upsample = compress(self, x)
    last, hidden_states = _encode(self.encoder, fewer)

    output_class = _output_class(original.__name__)
    values: dict[str, Any] = {"last_hidden_state": _adapt(self, Packed(upsample(last), x.layout), padded_frames)}
    if "extract_features" in output_class.__dataclass_fields__:
        values["extract_features"] = Packed(normalised, frames.layout).to_padded(length=padded_frames)
    if wanted := _wanted(_option(self, options, "output_hidden_states"), len(self.encoder.layers) + 1):
        values["hidden_states"] = tuple(
            Packed(upsample(state), x.layout).to_padded(length=padded_frames) if index in wanted else None
            for index, state in enumerate(hidden_states)
        )
    output = output_class(**values)
    return output.to_tuple() if _option(self, options, "return_dict") is False else output


@cache
def _output_class(name: str) -> Any:
    """What an encoder returns: its own class, or the one with `extract_features`, or the one without."""
    modeling = importlib.import_module(f"transformers.models.{_ARCHITECTURES[name].module}")
    outputs = importlib.import_module("transformers.modeling_outputs")
    own = getattr(modeling, name.replace("Model", "BaseModelOutput"), None)
    return own or (outputs.BaseModelOutput if name == "HubertModel" else outputs.Wav2Vec2BaseModelOutput)


def _wanted(hidden_states: bool | int | list[int] | None, count: int) -> set[int]:
    """Which of so many hidden states are asked for, by a flag or by indices."""
    if hidden_states is None or isinstance(hidden_states, bool):
        return set(range(count)) if hidden_states else set()
    indices = [hidden_states] if isinstance(hidden_states, int) else hidden_states
    return {index % count for index in indices if -count <= index < count}


def _frames_after(model: Any, samples: int) -> int:
    layout = Layout.from_lengths([samples])
    for kernel, stride in zip(model.config.conv_kernel, model.config.conv_stride, strict=True):
        layout = layout.after_conv(kernel, stride)
    return layout.max_length


def _front_end(model: Any, input_values: Tensor, lengths: list[int]) -> Packed:
    extractor = model.feature_extractor
    if getattr(model, NORM) == "valid":
        return L.front_end(extractor.conv_layers, waveforms_of(input_values, lengths))
    padded = extractor(input_values).transpose(1, 2)
    frames = [_frames_after(model, length) for length in lengths]
    return Packed.from_padded(padded, frames)


def _project(projection: Any, frames: Tensor) -> tuple[Tensor, Tensor]:
    normalised = projection.layer_norm(frames) if getattr(projection, "layer_norm", None) is not None else frames
    return L.dropout(projection.dropout, L.linear(projection.projection, normalised)), normalised


def _mask(
    model: Any,
    original: type[nn.Module],
    x: Packed,
    mask_time_indices: Tensor | None,
    padded_frames: int,
    *,
    has_padding: bool,
) -> Packed:
    """SpecAugment by the model's own function, which takes a padded batch."""
    config = model.config
    augments = model.training and (config.mask_time_prob > 0 or config.mask_feature_prob > 0)
    if not getattr(config, "apply_spec_augment", True) or (mask_time_indices is None and not augments):
        return x
    valid = None
    if has_padding and _ARCHITECTURES[original.__name__].masks_valid_frames_only:
        positions = torch.arange(padded_frames, device=x.values.device)
        valid = positions < x.layout.cu_seqlens.diff().unsqueeze(1)
    padded = x.to_padded(length=padded_frames)
    masked = model._mask_hidden_states(padded, mask_time_indices=mask_time_indices, attention_mask=valid)
    return Packed.from_padded(masked, x.layout.lengths)


def _encode(encoder: Any, x: Packed) -> tuple[Tensor, list[Tensor]]:
    """The last hidden state, and the hidden states as Transformers has them, before a last norm."""
    layout, stable = x.layout, "StableLayerNorm" in type(encoder).__name__
    values = x.values + _position(encoder.pos_conv_embed, x)
    if not stable:
        values = encoder.layer_norm(values)
    values = L.dropout(encoder.dropout, values)
    first = encoder.layers[0].attention if len(encoder.layers) else None
    bias = L.distance_bias(first) if hasattr(first, "rel_attn_embed") else None
    run = _pre_norm_layer if stable else _post_norm_layer
    hidden_states = [values]
    for index, layer in enumerate(encoder.layers):
        if _skips(encoder, index, has_bias=bias is not None):
            continue
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            values = layer._gradient_checkpointing_func(run, layer, values, layout, bias)
        else:
            values = run(layer, values, layout, bias)
        hidden_states.append(values)
    return (encoder.layer_norm(values) if stable else values), hidden_states


def _skips(encoder: Any, index: int, *, has_bias: bool) -> bool:
    """Layer drop, by the same draws as the original's; WavLM never skips the first layer, which has the bias."""
    if not encoder.training or encoder.config.layerdrop <= 0 or (has_bias and index == 0):
        return False
    return bool(torch.rand([]) < encoder.config.layerdrop)


def _post_norm_layer(layer: Any, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    x = L.add_and_norm(_attention(layer.attention, x, layout, bias), x, layer.layer_norm, layer.dropout)
    branch, dropout = _feed_forward(layer.feed_forward, x)
    return L.add_and_norm(branch, x, layer.final_layer_norm, dropout)


def _pre_norm_layer(layer: Any, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    attended = _attention(layer.attention, layer.layer_norm(x), layout, bias)
    x, normalised = L.sum_and_norm(attended, x, layer.final_layer_norm, layer.dropout)
    branch, dropout = _feed_forward(layer.feed_forward, normalised)
    x = x + L.dropout(dropout, branch)
    adapter = getattr(layer, "adapter_layer", None)
    return x if adapter is None else x + adapter(x)


def _feed_forward(module: Any, x: Tensor) -> tuple[Tensor, nn.Module]:
    """The output before its dropout, and that dropout."""
    branch = L.feed_forward(module.intermediate_dense, module.intermediate_dropout, module.output_dense, x)
    return branch, module.output_dropout


def _attention(module: Any, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    gate = None if bias is None else L.gate(module, x)
    dropout = module.dropout if module.training else 0.0
    return L.attention(module, x, layout, heads=module.num_heads, dropout=dropout, distance_bias=bias, gate=gate)


def _position(embedding: Any, x: Packed) -> Tensor:
    """The positional convolution, or Data2Vec's stack of them."""
    if not hasattr(embedding, "layers"):
        return F.gelu(L.positional_conv(embedding.conv, x.values, x.layout))
    values = x.values
    for layer in embedding.layers:
        values = F.gelu(layer.layer_norm(L.positional_conv(layer.conv, values, x.layout)))
    return values


def _adapt(model: Any, x: Packed, padded_frames: int) -> Tensor:
    """The convolutional adapter, if there is one, on each utterance alone; else the frames, padded."""
    adapter = getattr(model, "adapter", None)
    if adapter is None:
        return L.padded_by_last(x, padded_frames)
    values = x.values
    if adapter.proj is not None:
        values = adapter.proj_layer_norm(L.linear(adapter.proj, values))
    x, padded = Packed(values, x.layout), padded_frames
    for layer in adapter.layers:
        drawn = np.random.random()  # noqa: NPY002 (the generator that the original draws from)
        if not adapter.training or drawn > adapter.layerdrop:
            x = _adapter_layer(layer.conv, x)
            padded = _adapter_frames(layer.conv, padded)
    return L.padded_by_last(x, padded)


def _adapter_layer(conv: nn.Conv1d, x: Packed) -> Packed:
    """A strided convolution with a gated linear unit; around each utterance lies the frame of zeros that pads it."""
    padding = int(conv.padding[0])
    lengths = [length + 2 * padding if length else 0 for length in x.layout.lengths]
    framed = Layout.from_lengths(lengths, device=x.values.device)
    rows = framed.cu_seqlens[:-1].long()[x.layout.sequence_ids] + x.layout.positions + padding
    values = x.values.new_zeros(framed.total, x.values.shape[1]).index_copy(0, rows, x.values)
    out, layout = ops.strided_conv(
        values, conv.weight, framed, stride=conv.stride[0], bias=conv.bias, norm="none", activation="none"
    )
    kept, gate = out.chunk(2, dim=1)
    return Packed(kept * sigmoid(gate), layout)


def _adapter_frames(conv: nn.Conv1d, frames: int) -> int:
    length = frames + 2 * int(conv.padding[0]) if frames else 0
    return Layout.from_lengths([length]).after_conv(conv.kernel_size[0], conv.stride[0]).max_length
