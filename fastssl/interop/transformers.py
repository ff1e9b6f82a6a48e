"""Run Transformers' speech encoders on packed batches.

Accelerating an encoder changes its class to a subclass with the same name and a different `forward`. `isinstance`,
pickling, `save_pretrained`, `copy.deepcopy` and every head therefore work as before.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.interop import encoders, read_only
from fastssl.interop.calls import as_original, recorded_by
from fastssl.interop.classes import CALLS, AcceleratedClasses
from fastssl.interop.shown_states import ShownStates
from fastssl.nn import functional as F
from fastssl.nn.activation import sigmoid
from fastssl.packing import Layout, Packed, kept_by_plan, send

_SOURCES = {
    "Wav2Vec2Model": "transformers.models.wav2vec2.modeling_wav2vec2",
    "HubertModel": "transformers.models.hubert.modeling_hubert",
    "WavLMModel": "transformers.models.wavlm.modeling_wavlm",
    "Data2VecAudioModel": "transformers.models.data2vec.modeling_data2vec_audio",
    "UniSpeechModel": "transformers.models.unispeech.modeling_unispeech",
    "UniSpeechSatModel": "transformers.models.unispeech_sat.modeling_unispeech_sat",
}


def _check(module: Any) -> None:
    """Raise ValueError if an encoder has an unsupported part."""
    name, config = type(module).__name__, module.config
    for key, served in {"hidden_act": "gelu", "feat_extract_activation": "gelu"}.items():
        if getattr(config, key, served) != served:
            raise ValueError(
                f"model: {name} with config.{key}={getattr(config, key)!r} is not supported, only {served!r}"
            )
    if getattr(config, "conv_pos_batch_norm", False):
        raise ValueError(
            f"model: {name} with config.conv_pos_batch_norm=True is not supported, because its results depend on the "
            "rest of the batch; use a model without it"
        )


def _methods(original: type[nn.Module]) -> dict[str, Any]:
    # Under torch.compile every new set of lengths would trigger a recompilation, and the ops are fused already.
    run = torch.compiler.disable(encoders.sharing_casts(_forward), reason="an accelerated encoder is not compiled")

    def forward(self: Any, **given: Any) -> Any:
        weights = _option(self, given, "output_attentions")
        reason = "only the original code computes attention weights" if weights else None
        if recorder := recorded_by(given.values()):
            reason = f"{recorder} records the call"
        if "_mask_hidden_states" in vars(self):
            reason = "the model has a replaced `_mask_hidden_states`"
        if encoders.original_runs(self, _modules_not_called(self), reason, self.encoder.layers):
            # Not `view.forward`, because the model may have a `forward` of its own that calls this one.
            return original.forward(_as_original(self, original), **given)
        return run(self, given)

    return {"forward": as_original(original.forward, forward)}


CLASSES = AcceleratedClasses(
    __name__,
    _SOURCES,
    _methods,
    check=_check,
    width=lambda encoder: int(encoder.config.hidden_size),
    layers=lambda encoder: encoder.encoder.layers,
)
__getattr__ = CLASSES.by_name  # for pickle


def _as_original(model: nn.Module, original: type[nn.Module]) -> Any:
    """Return a view of the model with its original class, which Transformers needs to record outputs.

    The view shares all attributes with the model. The model's own class stays, so other threads see no change.
    """
    view = original.__new__(original)
    object.__setattr__(view, "__dict__", vars(model))
    # Transformers notes by class, when a model is made, what it can record. Maybe only accelerated ones were made.
    registry = getattr(sys.modules.get("transformers.utils.output_capturing"), "_CAN_RECORD_REGISTRY", None)
    if registry is not None:
        registry.setdefault(str(original), getattr(original, "_can_record_outputs", None))
    return view


def _modules_not_called(model: Any) -> Iterator[nn.Module]:
    """Yield the modules that the original forward calls and fastssl's only reads."""
    yield model.feature_projection
    yield from encoders.modules_not_called(model, model.encoder)
    if getattr(model, "adapter", None) is not None:
        yield model.adapter
        for layer in model.adapter.layers:
            yield from (layer, layer.conv)


def _option(model: Any, given: dict[str, Any], name: str) -> Any:
    value = given.get(name)
    return getattr(model.config, name, None) if value is None else value


def _forward(self: Any, given: dict[str, Any]) -> Any:
    """Compute on packed frames what the original forward returns for these arguments."""
    read_only.warn_once(self, self.encoder.layers, stacklevel=5)
    input_values: Tensor = given["input_values"]  # (B, T)
    attention_mask: Tensor | None = given.get("attention_mask")  # (B, T)
    if input_values.dim() != 2:
        raise ValueError(f"input_values: expected (B, T) samples, got {tuple(input_values.shape)}")
    batch, samples = input_values.shape
    if attention_mask is None:
        lengths = [samples] * batch
    else:
        lengths = _valid_lengths(attention_mask, batch, samples)
    convolutions = zip(self.config.conv_kernel, self.config.conv_stride, strict=True)
    frames, padded_frames = encoders.front_end(
        self,
        self.encoder,
        input_values,
        lengths,
        convolutions,
        lambda padded: self.feature_extractor(padded).transpose(1, 2),
        partial(_ask_for_adapter, getattr(self, "adapter", None)),
    )
    _need_gradient(self, frames.values)
    normalised = F.normalise(self.feature_projection, frames.values)
    projected = F.project(self.feature_projection, normalised)
    x = Packed(projected, frames.layout)
    x = _mask(self, x, given.get("mask_time_indices"), padded_frames, has_padding=attention_mask is not None)
    fewer, upsample = encoders.compress(self, self.encoder, x)
    wanted = _wanted(_option(self, given, "output_hidden_states"), len(self.encoder.layers) + 1)
    shown = ShownStates(lambda state: Packed(upsample(state), x.layout).to_padded(length=padded_frames))
    through = shown.through if wanted and fewer is x else None  # a compressor's states are repeated ones
    last, hidden_states = _encode(self.encoder, fewer, calls=getattr(self, CALLS), through=through)

    output_class = _output_class(CLASSES.original(self).__name__)
    values: dict[str, Any] = {"last_hidden_state": _adapt(self, Packed(upsample(last), x.layout), padded_frames)}
    if "extract_features" in output_class.__dataclass_fields__:
        values["extract_features"] = Packed(normalised, frames.layout).to_padded(length=padded_frames)
    if wanted:
        values["hidden_states"] = tuple(
            shown.padded(state) if index in wanted else None for index, state in enumerate(hidden_states)
        )
    output = output_class(**values)
    return output.to_tuple() if _option(self, given, "return_dict") is False else output


def _need_gradient(model: Any, frames: Tensor) -> None:  # (N, C)
    """Mark the convolutions' frames as needing a gradient where the original marks the waveforms.

    It does so in training, unless its front end was frozen by `freeze_feature_encoder`. Re-entrant checkpointing gives
    gradients only to layers whose input needs one, so adapters above frozen parameters depend on it. Marking frames has
    the same effect, without a backward pass through frozen convolutions.
    """
    marks = model.training and getattr(model.feature_extractor, "_requires_grad", False)
    if marks and torch.is_grad_enabled() and not frames.requires_grad:
        frames.requires_grad_()


@cache
def _output_class(name: str) -> Any:
    """Return the class of an encoder's output.

    It is the model's own output class if it defines one, else Transformers' common class, with `extract_features`
    except for HuBERT.
    """
    modeling = importlib.import_module(_SOURCES[name])
    outputs = importlib.import_module("transformers.modeling_outputs")
    own = getattr(modeling, name.replace("Model", "BaseModelOutput"), None)
    return own or (outputs.BaseModelOutput if name == "HubertModel" else outputs.Wav2Vec2BaseModelOutput)


def _wanted(hidden_states: bool | int | list[int] | None, count: int) -> set[int]:
    """Return the indices of the requested hidden states, out of `count`; the request is a flag, an index or a list."""
    if hidden_states is None or isinstance(hidden_states, bool):
        return set(range(count)) if hidden_states else set()
    indices = [hidden_states] if isinstance(hidden_states, int) else hidden_states
    return {index % count for index in indices if -count <= index < count}


def _valid_lengths(mask: Tensor, batch: int, samples: int) -> list[int]:
    """Return the number of valid samples of each row of a mask (B, T) of any dtype, with ones before zeros.

    Raises:
        ValueError: The mask has the wrong shape, values other than 0 and 1, or padding before or between samples.
    """
    if mask.shape != (batch, samples):
        raise ValueError(
            f"attention_mask: expected {(batch, samples)}, the shape of the waveforms, got {tuple(mask.shape)}"
        )
    lengths = mask.detach().sum(1, dtype=torch.int64)
    expected = torch.arange(samples, device=mask.device) < lengths.unsqueeze(1)
    fits = (mask == expected).all().long().unsqueeze(0)
    host: list[int] = torch.cat([lengths, fits]).tolist()  # the only place where the host waits for the device
    if not host.pop():
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("attention_mask: must be 1 (a sample) or 0 (padding), got other values")
        row = int((mask != expected).any(1).nonzero()[0])
        raise ValueError(
            f"attention_mask: row {row} has padding before or between samples; only padding at the end is supported"
        )
    return host


def _mask(model: Any, x: Packed, mask_time_indices: Any, padded_frames: int, *, has_padding: bool) -> Packed:
    """Mask frames as the model's own SpecAugment function does, with its random draws, but without a padded batch."""
    config, (values, layout) = model.config, x
    draws_times = model.training and config.mask_time_prob > 0 and mask_time_indices is None
    draws_channels = model.training and config.mask_feature_prob > 0
    if not getattr(config, "apply_spec_augment", True) or (
        mask_time_indices is None and not draws_times | draws_channels
    ):
        return x
    if layout.total == 0:  # the model's function refuses rows without frames
        return x
    original = CLASSES.original(model)
    draw = importlib.import_module(_SOURCES[original.__name__])._compute_mask_indices
    valid = torch.arange(padded_frames, device="cpu") < torch.tensor(layout.lengths, device="cpu").unsqueeze(1)
    if draws_times:
        # HuBERT masks padding frames too, instead of valid ones.
        within = {"attention_mask": valid} if has_padding and original.__name__ != "HubertModel" else {}
        mask_time_indices = torch.from_numpy(
            draw(
                valid.shape,
                mask_prob=config.mask_time_prob,
                mask_length=config.mask_time_length,
                min_masks=config.mask_time_min_masks,
                **within,
            )
        )
    host: dict[str, Tensor] = {}  # sent in one copy
    if mask_time_indices is not None:
        mask = torch.as_tensor(mask_time_indices).bool()
        if mask.shape != valid.shape:
            raise ValueError(
                f"mask_time_indices: expected {tuple(valid.shape)}, one per frame, got {tuple(mask.shape)}"
            )
        if mask.device.type == "cpu":
            host["rows"] = mask[valid].nonzero().squeeze(1)
    if draws_channels:
        host["channels"] = torch.from_numpy(
            draw(
                (len(valid), values.shape[1]),
                mask_prob=config.mask_feature_prob,
                mask_length=config.mask_feature_length,
                min_masks=config.mask_feature_min_masks,
            )
        )
    sent = dict(zip(host, send(list(host.values()), values.device), strict=True))
    if mask_time_indices is not None:
        embedding = model.masked_spec_embed.to(values.dtype)
        if "rows" in sent:
            values = values.index_put((sent["rows"],), embedding)
        else:
            values = _embedded_where(x, mask, embedding)
    if draws_channels:
        values = values.masked_fill(sent["channels"].index_select(0, layout.sequence_ids), 0)
    return Packed(values, layout)


def _embedded_where(x: Packed, mask: Tensor, embedding: Tensor) -> Tensor:  # (N, D), (B, F), (D,) -> (N, D)
    """Replace frames where a mask on the GPU is True, without a wait for the number of such frames."""
    packed = mask.flatten().index_select(0, x.layout.padded_rows(mask.shape[1]).rows)
    return torch.where(packed.unsqueeze(1), embedding, x.values)


def _encode(
    encoder: Any, x: Packed, *, calls: bool, through: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Run the transformer; return the last hidden state after the final norm, and all hidden states before it.

    Args:
        encoder: The transformer.
        x: (N, D) projected frames.
        calls: Whether to call projections that the original only reads.
        through: Function that each hidden state goes through before it is used, see `ShownStates`.
    """
    pre_norm = "StableLayerNorm" in type(encoder).__name__
    first = encoder.layers[0].attention if len(encoder.layers) else None
    bias = encoders.distance_bias(first) if hasattr(first, "rel_attn_embed") else None

    def run(layer: Any, values: Tensor) -> Tensor:
        values = values if through is None else through(values)
        arguments = layer, values, x.layout, bias, pre_norm, calls
        if getattr(layer, "gradient_checkpointing", False) and layer.training:
            output: Tensor = layer._gradient_checkpointing_func(_layer, *arguments)
            return output
        return _layer(*arguments)

    first_skippable = 0 if bias is None else 1  # WavLM never skips the first layer, which holds the bias
    layers = (layer for index, layer in enumerate(encoder.layers) if index < first_skippable or not _skips(encoder))
    hidden_states = list(F.hidden_states(encoder, x, layers, run, pre_norm=pre_norm))
    last = hidden_states[-1] if through is None else through(hidden_states[-1])
    return (encoder.layer_norm(last) if pre_norm else last), hidden_states


def _skips(encoder: Any) -> bool:
    """Return whether layer drop skips the next layer; draws random numbers in the same order as the original."""
    return encoder.training and encoder.config.layerdrop > 0 and bool(torch.rand([]) < encoder.config.layerdrop)


def _layer(layer: Any, x: Tensor, layout: Layout, bias: Tensor | None, pre_norm: bool, calls: bool) -> Tensor:
    attention = partial(_attention, layer.attention, layout=layout, bias=bias, calls=calls)
    x = encoders.run_layer(layer, x, attention, pre_norm=pre_norm)
    adapter = getattr(layer, "adapter_layer", None)
    return x if adapter is None else x + adapter(x)


def _attention(
    module: Any,
    x: Tensor,  # (N, D)
    layout: Layout,
    bias: Tensor | None,
    calls: bool,
) -> Tensor:  # (N, D)
    # The gate comes before the projections, as in the original, because this fixes the order in which the gradients
    # with respect to `x` are added.
    gate = None if bias is None else F.gate(module, x)
    reads = not calls and type(module).__name__ in read_only.READ_ONLY
    projected = read_only.queries_keys_values(module, x) if reads else F.queries_keys_values(module, x)
    attended = F.attend(module, projected, layout, distance_bias=bias, gate=gate)
    return read_only.output(module, attended) if reads else F.linear(module.out_proj, attended)


def _adapt(model: Any, x: Packed, padded_frames: int) -> Tensor:
    """Return the frames as a padded batch (B, F, D), after the convolutional adapter if the model has one.

    The adapter is applied to each utterance alone, without the padding.
    """
    adapter = getattr(model, "adapter", None)
    if adapter is None:
        return encoders.padded_by_last(x, padded_frames)
    values = x.values
    if adapter.proj is not None:
        values = adapter.proj_layer_norm(F.linear(adapter.proj, values))
    x, padded = Packed(values, x.layout), padded_frames
    for layer in adapter.layers:
        drawn = np.random.random()  # noqa: NPY002 (the original draws from this generator)
        if not adapter.training or drawn > adapter.layerdrop:
            x = _adapter_layer(layer.conv, x)
            padded = _adapter_frames(layer.conv, padded)
    return encoders.padded_by_last(x, padded)


def _ask_for_adapter(adapter: Any, layout: Layout, padded_frames: int) -> None:
    """Ask the layout of the encoder's frames for what the convolutional adapter, if there is one, computes with it."""
    for layer in [] if adapter is None else adapter.layers:
        conv = layer.conv
        _framed_rows(layout, int(conv.padding[0]))
        layout = _framed(layout, int(conv.padding[0])).after_conv(conv.kernel_size[0], conv.stride[0])
        padded_frames = _adapter_frames(conv, padded_frames)
        layout.ask_for_indices()
        encoders.ask_for_padding(layout, padded_frames)


@kept_by_plan
def _framed(layout: Layout, padding: int) -> Layout:
    """Return the layout with `padding` rows at both ends of each utterance that has frames."""
    return layout.map_lengths(
        lambda length: length + 2 * padding if length else 0, lambda lengths: (lengths + 2 * padding) * (lengths > 0)
    )


@kept_by_plan
def _framed_rows(layout: Layout, padding: int) -> Tensor:  # (N,)
    return _framed(layout, padding).rows(layout.sequence_ids, layout.positions + padding)


def _adapter_layer(conv: nn.Conv1d, x: Packed) -> Packed:
    """Pad each utterance with zeros at both ends, then apply a strided convolution and a gated linear unit."""
    padding = int(conv.padding[0])
    framed = _framed(x.layout, padding)
    values = x.values.new_zeros(framed.total, x.values.shape[1])
    values = values.index_copy_(0, _framed_rows(x.layout, padding), x.values)
    out, layout = ops.strided_conv(
        values, conv.weight, framed, stride=conv.stride[0], bias=conv.bias, norm="none", activation="none"
    )
    kept, gate = out.chunk(2, dim=1)
    return Packed(kept * sigmoid(gate), layout)


def _adapter_frames(conv: nn.Conv1d, frames: int) -> int:
    length = frames + 2 * int(conv.padding[0]) if frames else 0
    return Layout.from_lengths([length]).after_conv(conv.kernel_size[0], conv.stride[0]).max_length
