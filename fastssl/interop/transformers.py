"""Run Transformers' speech encoders on packed batches.

Accelerating an encoder changes its class to a subclass with the same name and a different `forward`. `isinstance`,
pickling, `save_pretrained`, `copy.deepcopy` and every head therefore work as before.

Each row of a padded batch has F frames. An utterance of L frames has the first L of them if it is padded on the right,
and the last L if it is padded on the left. Both are computed from the utterance alone, so on the left they may be less
than one frame off their place in the row of samples. In `last_hidden_state`, padding repeats the nearest frame of the
utterance: its last one, or on the left its first one. In `hidden_states` and `extract_features`, padding is zero. The
whole row of an utterance without frames is zero everywhere. Heads that count frames get them at the beginning of
all rows, see `padding_side`.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.interop import call_through, encoders, padding_side, read_only
from fastssl.interop.calls import as_original, recorded_by
from fastssl.interop.classes import CALLS, NORM, AcceleratedClasses
from fastssl.kernels.autograd import is_transformed
from fastssl.models.folder import ACCELERATED_COMPRESSOR
from fastssl.nn import functional as F
from fastssl.nn.adapter import adapted, ask_for_conv
from fastssl.packing import Layout, Packed, kept_by_plan, send

_SOURCES = {
    "Wav2Vec2Model": "transformers.models.wav2vec2.modeling_wav2vec2",
    "HubertModel": "transformers.models.hubert.modeling_hubert",
    "WavLMModel": "transformers.models.wavlm.modeling_wavlm",
    "Data2VecAudioModel": "transformers.models.data2vec.modeling_data2vec_audio",
    "UniSpeechModel": "transformers.models.unispeech.modeling_unispeech",
    "UniSpeechSatModel": "transformers.models.unispeech_sat.modeling_unispeech_sat",
}


#: Parts that an encoder must have; a subclass may have built others.
_PARTS = ("feature_extractor", "feature_projection", "encoder.pos_conv_embed", "encoder.layer_norm", "encoder.layers")


def _check(module: Any) -> None:
    """Raise ValueError if an encoder lacks a part or has an unsupported one."""
    name, config = type(module).__name__, module.config
    for part in _PARTS:
        try:
            attrgetter(part)(module)
        except AttributeError:
            raise ValueError(
                f"model: {name} has no `{part}`, which every {CLASSES.original(module).__name__} of Transformers has; "
                "leave this model as it is, or give it the part"
            ) from None
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
        if replaced := CLASSES.replaced(self):
            reason = f"the model has a replaced `{replaced}`"
        layers = self.encoder.layers
        called_through = (self.feature_extractor, self.encoder, *layers)
        if encoders.original_runs(self, _modules_not_called(self), reason, layers, called_through):
            # Not `view.forward`, because the model may have a `forward` of its own that calls this one.
            return original.forward(_as_original(self), **given)
        return run(self, given)

    mask = padding_side.FRAME_MASK
    return {"forward": as_original(original.forward, forward), mask: padding_side.frame_mask(original)}


CLASSES = AcceleratedClasses(
    __name__,
    _SOURCES,
    _methods,
    check=_check,
    width=lambda encoder: int(encoder.config.hidden_size),
    layers=lambda encoder: encoder.encoder.layers,
    not_called=(
        "_mask_hidden_states",
        "_get_feature_vector_attention_mask",
        "_get_feat_extract_output_lengths",
    ),
)
__getattr__ = CLASSES.by_name  # for pickle


def _as_original(model: nn.Module) -> Any:
    """Return a view of the model with its class before it was accelerated, which Transformers needs to record outputs.

    The view shares all attributes with the model. The model's own class stays, so other threads see no change.
    """
    kind: Any = CLASSES.plain(type(model))
    view = object.__new__(kind)
    object.__setattr__(view, "__dict__", vars(model))
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
    over_padding = getattr(self, NORM) == "padded"
    lengths, left = [samples] * batch, tuple[bool, ...]()
    if attention_mask is not None:
        lengths, left = _valid_lengths(attention_mask, batch, samples, any_mask=over_padding)
    frames_left = () if left and padding_side.called_by_counting_head(self) else left
    convolutions = zip(self.config.conv_kernel, self.config.conv_stride, strict=True)
    frames, padded_frames = encoders.front_end(
        self,
        self.encoder,
        input_values,
        lengths,
        convolutions,
        lambda padded: self.feature_extractor(padded).transpose(1, 2),
        partial(_ask_for_what_follows, self, left=frames_left),
        left=left,
        frames_left=frames_left,
    )
    _need_gradient(self, frames.values)
    normalised = F.normalise(self.feature_projection, frames.values)
    projected = F.project(self.feature_projection, normalised)
    x = Packed(projected, frames.layout)
    given_mask, has_padding = given.get("mask_time_indices"), attention_mask is not None
    x = _mask(self, x, given_mask, padded_frames, has_padding=has_padding, left=frames_left)
    fewer, upsample = encoders.compress(self, self.encoder, x)
    over_padding = padded_frames if _positions_see_padding(self) else None
    encode = partial(_encode, call_through.unwrapped(self.encoder), fewer.layout, getattr(self, CALLS), over_padding)
    last, hidden_states = call_through.call(self.encoder, encode, fewer.values)

    def padded(values: Tensor) -> Tensor:  # (N, C) -> (B, F, C)
        return Packed(values, x.layout).to_padded(length=padded_frames, left=frames_left)

    output_class = _output_class(CLASSES.original(self).__name__)
    last_frames = Packed(upsample(last), x.layout)
    values: dict[str, Any] = {"last_hidden_state": _adapt(self, last_frames, padded_frames, frames_left)}
    if "extract_features" in output_class.__dataclass_fields__:
        values["extract_features"] = padded(normalised)
    if wanted := _wanted(_option(self, given, "output_hidden_states"), len(self.encoder.layers) + 1):
        values["hidden_states"] = tuple(
            padded(upsample(state)) if index in wanted else None for index, state in enumerate(hidden_states)
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
    if marks and torch.is_grad_enabled() and not frames.requires_grad and not is_transformed():
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


def _valid_lengths(mask: Tensor, batch: int, samples: int, *, any_mask: bool) -> tuple[list[int], tuple[bool, ...]]:
    """Return the number of valid samples of each row, and whether its padding is on the left.

    Args:
        mask: (B, T) of any dtype, 1 for samples and 0 for padding.
        batch: B, the number of waveforms.
        samples: T, the number of samples per waveform.
        any_mask: Whether to take any mask as the original does: as right padding of the same sum.

    Returns:
        B lengths; and for each row, whether its samples are at its end, or nothing if no row's are.

    Raises:
        ValueError: The mask has the wrong shape or values other than 0 and 1; or, unless `any_mask`, a row whose ones
            are not all at its beginning or all at its end.
    """
    if mask.shape != (batch, samples):
        raise ValueError(
            f"attention_mask: expected {(batch, samples)}, the shape of the waveforms, got {tuple(mask.shape)}"
        )
    mask = mask.detach()
    twice = mask.expand(2, -1, -1).sum((0, 2), dtype=torch.int64)  # two times the lengths
    if any_mask:
        expected = mask.bool().unsqueeze(0)
    else:
        # Each column's distance d from the row's end, and then from its beginning, as 2 d + 1. This is below 2 L in the
        # last L columns, and in the first L.
        distances = torch.arange(1 - 2 * samples, 2 * samples + 1, 2, device=mask.device).abs().view(2, 1, samples)
        expected = distances < twice.unsqueeze(1)
    fitting = twice.expand(len(expected), -1).masked_fill((mask != expected).any(2), -1)
    found: list[list[int]] = fitting.tolist()  # the only place where the host waits for the device
    at_begin, at_end = found[-1], found[0]
    if -1 in (either := [max(ends) for ends in zip(at_begin, at_end, strict=True)]):
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("attention_mask: must be 1 (a sample) or 0 (padding), got other values")
        raise ValueError(
            f"attention_mask: row {either.index(-1)} has padding between samples or on both sides of them; pad it on "
            'one side, or use `fastssl.accelerate(model, norm="padded")`, which takes any mask as the original does: '
            "as right padding of the same sum"
        )
    left = tuple(begin < 0 for begin in at_begin)
    return [length // 2 for length in either], left if any(left) else ()


def _mask(
    model: Any,
    x: Packed,
    mask_time_indices: Any,
    padded_frames: int,
    *,
    has_padding: bool,
    left: tuple[bool, ...] = (),
) -> Packed:
    """Mask frames as the model's own SpecAugment function does, with its random draws, but without a padded batch.

    A given mask is for the rows as they are returned. A drawn one has the frames of each utterance first, as always in
    the original.
    """
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
        mask = torch.as_tensor(mask_time_indices, device=getattr(mask_time_indices, "device", "cpu")).bool()
        if mask.shape != valid.shape:
            raise ValueError(
                f"mask_time_indices: expected {tuple(valid.shape)}, one per frame, got {tuple(mask.shape)}"
            )
        if left and not draws_times:
            valid = torch.where(torch.tensor(left, device="cpu").unsqueeze(1), valid.flip(1), valid)
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
            values = _embedded_where(x, mask, embedding, left)
    if draws_channels:
        values = values.masked_fill(sent["channels"].index_select(0, layout.sequence_ids), 0)
    return Packed(values, layout)


def _embedded_where(
    x: Packed,
    mask: Tensor,  # (B, F)
    embedding: Tensor,  # (D,)
    left: tuple[bool, ...] = (),
) -> Tensor:  # (N, D)
    """Replace frames where a mask on the GPU is True, without a wait for the number of such frames."""
    packed = mask.flatten().index_select(0, x.layout.padded_rows(mask.shape[1], left).rows)
    return torch.where(packed.unsqueeze(1), embedding, x.values)


def _positions_see_padding(model: Any) -> bool:
    """Return whether the positional embedding of a model is computed over the padding, as in the original.

    With one convolution this would change nothing, because the padding is zero before it. Data2Vec has several, with
    norms between them.
    """
    over_padding = getattr(model, NORM) == "padded" and not hasattr(model, ACCELERATED_COMPRESSOR)
    return over_padding and hasattr(model.encoder.pos_conv_embed, "layers")


def _positions_over_padding(encoder: Any, x: Packed, padded_frames: int | None) -> Tensor | None:
    """Return the positional embedding (N, D) of frames computed over the padding, or None if it is not to be."""
    if padded_frames is None or min(x.layout.lengths, default=padded_frames) == padded_frames:
        return None
    padded, rows = x.to_padded(length=padded_frames).flatten(0, 1), x.layout.padded_rows(padded_frames).rows
    positions = F.positional_embedding(encoder.pos_conv_embed, padded, _filled(x.layout, padded_frames))
    return positions.index_select(0, rows)


@kept_by_plan
def _filled(layout: Layout, length: int) -> Layout:
    """Return the layout of a padded batch, padding included."""
    return layout.map_lengths(lambda _: length, lambda lengths: torch.full_like(lengths, length))


def _encode(
    encoder: Any, layout: Layout, calls: bool, over_padding: int | None, values: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Run the transformer; return the last hidden state after the final norm, and all hidden states before it.

    Args:
        encoder: The transformer.
        layout: Layout of the frames.
        calls: Whether to call projections that the original only reads.
        over_padding: Number of frames of the padded batch, if the positional embedding is computed over the padding.
        values: (N, D) projected frames.
    """
    pre_norm = "StableLayerNorm" in type(encoder).__name__
    first = encoder.layers[0].attention if len(encoder.layers) else None
    has_bias = hasattr(first, "rel_attn_embed")
    bias: Tensor | None = None

    def run(layer: Any, values: Tensor) -> Tensor:
        nonlocal bias
        function: Callable[..., Any] = partial(_checkpointed, call_through.unwrapped(layer), layout, pre_norm, calls)
        if has_bias and bias is None:
            function = partial(encoders.with_distance_bias, function, call_through.unwrapped(layer).attention)
            output, bias = call_through.call(layer, function, values)
        else:
            output = call_through.call(layer, function, values, bias)
        return output  # type: ignore[no-any-return]

    first_skippable = 1 if has_bias else 0  # WavLM never skips the first layer, which holds the bias
    layers = (
        layer for index, layer in enumerate(encoder.layers) if index < first_skippable or not _skips(encoder, layer)
    )
    frames = Packed(values, layout)
    positions = _positions_over_padding(encoder, frames, over_padding)
    hidden_states = list(F.hidden_states(encoder, frames, layers, run, pre_norm=pre_norm, positions=positions))
    return (encoder.layer_norm(hidden_states[-1]) if pre_norm else hidden_states[-1]), hidden_states


def _skips(encoder: Any, layer: Any) -> bool:
    """Return whether layer drop skips the next layer; draws random numbers in the same order as the original."""
    dropped = encoder.training and encoder.config.layerdrop > 0
    dropped = dropped and bool(torch.rand([], device="cpu") < encoder.config.layerdrop)
    # As in the original: all processes must gather the parameters of all layers.
    return dropped and not getattr(layer, "_is_fsdp_managed_module", False)


def _checkpointed(
    layer: Any,
    layout: Layout,
    pre_norm: bool,
    calls: bool,
    x: Tensor,  # (N, D)
    bias: Tensor | None,
) -> Tensor:  # (N, D)
    arguments = layer, x, layout, bias, pre_norm, calls
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        output: Tensor = layer._gradient_checkpointing_func(_layer, *arguments)
        return output
    return _layer(*arguments)


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


def _adapt(model: Any, x: Packed, padded_frames: int, left: tuple[bool, ...]) -> Tensor:
    """Return the frames as a padded batch (B, F, D), after the convolutional adapter if the model has one.

    The adapter is applied to each utterance alone, without the padding.
    """
    adapter = getattr(model, "adapter", None)
    if adapter is None:
        return encoders.padded_by_last(x, padded_frames, left)
    padded = padded_frames

    def layers() -> Iterator[Any]:
        nonlocal padded
        for layer in adapter.layers:
            drawn = np.random.random()  # noqa: NPY002 (the original draws from this generator)
            if not adapter.training or drawn > adapter.layerdrop:
                padded = _adapter_frames(layer.conv, padded)
                yield layer

    return encoders.padded_by_last(adapted(adapter, x, layers()), padded, left)


def _ask_for_what_follows(model: Any, layout: Layout, padded_frames: int, *, left: tuple[bool, ...]) -> None:
    """Ask the layout of the frames for what the convolutional adapter computes with it, and data2vec over padding."""
    if _positions_see_padding(model):
        encoders.ask_for_positions(model.encoder, _filled(layout, padded_frames))
    adapter = getattr(model, "adapter", None)
    for layer in [] if adapter is None else adapter.layers:
        layout = ask_for_conv(layer.conv, layout)
        padded_frames = _adapter_frames(layer.conv, padded_frames)
        layout.ask_for_indices()
        encoders.ask_for_padding(layout, padded_frames, left)


def _adapter_frames(conv: nn.Conv1d, frames: int) -> int:
    length = frames + 2 * int(conv.padding[0]) if frames else 0
    return Layout.from_lengths([length]).after_conv(conv.kernel_size[0], conv.stride[0]).max_length
