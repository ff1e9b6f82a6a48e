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
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.interop import call_through, encoders, padding_side, read_only
from fastssl.interop.calls import as_original, recorded_by
from fastssl.interop.classes import CALLS, NORM, AcceleratedClasses, maker_of, original_class
from fastssl.interop.shown_states import ShownStates
from fastssl.interop.spec_augment import mask_frames
from fastssl.kernels.autograd import is_transformed
from fastssl.models.folder import ACCELERATED_COMPRESSOR
from fastssl.nn import functional as F
from fastssl.nn.adapter import adapted, ask_for_conv, in_layer
from fastssl.packing import Layout, Packed, kept_by_plan

_SOURCES = {
    "Wav2Vec2Model": "transformers.models.wav2vec2.modeling_wav2vec2",
    "HubertModel": "transformers.models.hubert.modeling_hubert",
    "WavLMModel": "transformers.models.wavlm.modeling_wavlm",
    "Data2VecAudioModel": "transformers.models.data2vec.modeling_data2vec_audio",
    "UniSpeechModel": "transformers.models.unispeech.modeling_unispeech",
    "UniSpeechSatModel": "transformers.models.unispeech_sat.modeling_unispeech_sat",
}
#: Parts of the transformer that every encoder has.
_PARTS = ("pos_conv_embed", "layer_norm", "layers")


class Encoded(NamedTuple):
    """What an encoder computes from its N projected frames."""

    #: (N, D) last hidden state, in the layout of the projected frames.
    last: Packed
    #: (M, D) input of the first layer, then the output of each layer.
    states: list[Tensor]
    #: Function from such a state to the padded hidden state (B, F, D) that the original returns.
    padded: Callable[[Tensor], Tensor]


class Architecture(NamedTuple):
    """The parts of an encoder's forward pass in which architectures differ.

    Each function gets the model first. F is the number of frames of each row of the padded batch.
    """

    #: Yields the modules that the original forward calls and fastssl's only reads.
    modules_not_called: Callable[[Any], Iterator[nn.Module]]
    #: Normalises and projects the front end's frames: (N, C) to (N, C) and (N, D).
    project: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    #: Runs the transformer on the projected frames (N, D), given F and `left` of `ask`; `shows` says that hidden states
    #: will be returned.
    encode: Callable[..., Encoded]
    #: Asks the layout of the projected frames for what `encode` computes with it, given F, and for each row whether its
    #: frames are at the end; nothing if no row's are.
    ask: Callable[[Any, Layout, int, tuple[bool, ...]], None]
    #: Returns those of `modules_not_called` that run within what tools put around them (`call_through`).
    called_through: Callable[[Any], Iterable[nn.Module]]
    #: Returns why the original code must run in the model's current mode, or None.
    refuses: Callable[[Any], str | None] = lambda model: None


def check_parts(module: Any, *names: str) -> None:
    """Raise ValueError if an encoder lacks a part that the original has; a subclass may have built others."""
    for name in names:
        try:
            attrgetter(name)(module)
        except AttributeError:
            raise ValueError(
                f"model: {type(module).__name__} has no `{name}`, which every {original_class(module).__name__} of "
                "Transformers has; leave this model as it is, or give it the part"
            ) from None


def check_activations(module: Any, *keys: str) -> None:
    """Raise ValueError if a setting of an encoder's config names an activation other than GELU."""
    for key in keys:
        if getattr(module.config, key, "gelu") != "gelu":
            raise ValueError(
                f"model: {type(module).__name__} with config.{key}={getattr(module.config, key)!r} is not supported, "
                "only 'gelu'"
            )


def _check(module: Any) -> None:
    """Raise ValueError if an encoder lacks a part or has an unsupported one."""
    check_parts(module, "feature_extractor", "feature_projection", *(f"encoder.{part}" for part in _PARTS))
    check_activations(module, "hidden_act", "feat_extract_activation")
    if getattr(module.config, "conv_pos_batch_norm", False):
        raise ValueError(
            f"model: {type(module).__name__} with config.conv_pos_batch_norm=True is not supported, because its "
            "results depend on the rest of the batch; use a model without it"
        )


def _methods(architecture: Architecture, original: type[nn.Module]) -> dict[str, Any]:
    # Under torch.compile every new set of lengths would trigger a recompilation, and the ops are fused already.
    run = torch.compiler.disable(encoders.sharing_casts(_forward), reason="an accelerated encoder is not compiled")

    def forward(self: Any, **given: Any) -> Any:
        if not hasattr(type(self), NORM):  # restored, but somebody else's wrapper still calls this function
            return original.forward(self, **given)
        weights = _option(self, given, "output_attentions")
        reason = "only the original code computes attention weights" if weights else None
        if recorder := recorded_by(given.values()):
            reason = f"{recorder} records the call"
        if replaced := maker_of(self).replaced(self):
            reason = f"the model has a replaced `{replaced}`"
        modules, lasting = architecture.modules_not_called(self), architecture.refuses(self)
        called_through = architecture.called_through(self)
        if encoders.original_runs(self, modules, reason, self.encoder.layers, called_through, lasting=lasting):
            # Not `view.forward`, because the model may have a `forward` of its own that calls this one.
            return original.forward(_as_original(self), **given)
        return run(self, architecture, given)

    mask = padding_side.FRAME_MASK
    return {"forward": as_original(original.forward, forward), mask: padding_side.frame_mask(original)}


def accelerated_classes(
    home: str,
    sources: Mapping[str, str],
    architecture: Architecture,
    check: Callable[[Any], None],
    *,
    trains: bool = True,
) -> AcceleratedClasses:
    """Return accelerated subclasses of encoders of Transformers; the arguments are those of `AcceleratedClasses`."""
    return AcceleratedClasses(
        home,
        sources,
        partial(_methods, architecture),
        check=check,
        width=lambda encoder: int(encoder.config.hidden_size),
        layers=lambda encoder: encoder.encoder.layers,
        not_called=(
            "_mask_hidden_states",
            "_get_feature_vector_attention_mask",
            "_get_feat_extract_output_lengths",
        ),
        trains=trains,
    )


def _as_original(model: nn.Module) -> Any:
    """Return a view of the model with its class before it was accelerated, which Transformers needs to record outputs.

    The view shares all attributes with the model. The model's own class stays, so other threads see no change.
    """
    kind: Any = maker_of(model).plain(type(model))
    view = object.__new__(kind)
    object.__setattr__(view, "__dict__", vars(model))
    # Transformers notes by class, when a model is made, what it can record. Maybe only accelerated ones were made.
    registry = getattr(sys.modules.get("transformers.utils.output_capturing"), "_CAN_RECORD_REGISTRY", None)
    if registry is not None:
        registry.setdefault(str(kind), getattr(kind, "_can_record_outputs", None))
    return view


def _modules_not_called(model: Any) -> Iterator[nn.Module]:
    """Yield the modules that the original forward calls and fastssl's only reads."""
    yield model.feature_projection
    yield from encoders.modules_not_called(model, model.encoder)
    yield from adapter_not_called(model)


def adapter_not_called(model: Any) -> Iterator[nn.Module]:
    """Yield those of `modules_not_called` that belong to the convolutional adapter, if there is one."""
    if getattr(model, "adapter", None) is not None:
        yield model.adapter
        for layer in model.adapter.layers:
            yield from (layer, layer.conv)


def _called_through(model: Any) -> Iterator[nn.Module]:
    yield from (model.feature_extractor, model.encoder, *model.encoder.layers)


def _option(model: Any, given: dict[str, Any], name: str) -> Any:
    value = given.get(name)
    return getattr(model.config, name, None) if value is None else value


def _forward(self: Any, architecture: Architecture, given: dict[str, Any]) -> Any:
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
        input_values,
        lengths,
        convolutions,
        lambda padded: self.feature_extractor(padded).transpose(1, 2),
        lambda layout, count: architecture.ask(self, layout, count, frames_left),
        left=left,
        frames_left=frames_left,
    )
    _need_gradient(self, frames.values)
    normalised, projected = architecture.project(self, frames.values)
    x = Packed(projected, frames.layout)
    given_mask, has_padding = given.get("mask_time_indices"), attention_mask is not None
    x = mask_frames(self, x, given_mask, padded_frames, has_padding=has_padding, left=frames_left)
    wanted = _wanted(_option(self, given, "output_hidden_states"), len(self.encoder.layers) + 1)
    encoded = architecture.encode(self, x, padded_frames, frames_left, shows=bool(wanted))

    original = original_class(self)
    output_class = _output_class(original.__module__, original.__name__)
    values: dict[str, Any] = {"last_hidden_state": _adapt(self, encoded.last, padded_frames, frames_left)}
    if "extract_features" in output_class.__dataclass_fields__:
        extracted = Packed(normalised, frames.layout)
        values["extract_features"] = extracted.to_padded(length=padded_frames, left=frames_left)
    if wanted:
        values["hidden_states"] = tuple(
            encoded.padded(state) if index in wanted else None for index, state in enumerate(encoded.states)
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
def _output_class(module: str, name: str) -> Any:
    """Return the class of an encoder's output.

    It is the model's own output class if it defines one, else Transformers' common class, with `extract_features`
    except for HuBERT and SEW.
    """
    outputs = importlib.import_module("transformers.modeling_outputs")
    own = getattr(sys.modules[module], name.replace("Model", "BaseModelOutput"), None)
    plain = name in ("HubertModel", "SEWModel")
    return own or (outputs.BaseModelOutput if plain else outputs.Wav2Vec2BaseModelOutput)


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


def project(model: Any, frames: Tensor) -> tuple[Tensor, Tensor]:  # (N, C) -> (N, C), (N, D)
    """Normalise and project the front end's frames by the model's `feature_projection`."""
    normalised = F.normalise(model.feature_projection, frames)
    return normalised, F.project(model.feature_projection, normalised)


def _encode(model: Any, x: Packed, padded_frames: int, left: tuple[bool, ...], *, shows: bool) -> Encoded:
    fewer, repeat = encoders.compress(model, partial(encoders.ask_for_positions, model.encoder), x)
    encoder, calls = call_through.unwrapped(model.encoder), getattr(model, CALLS)
    over_padding = padded_frames if _positions_see_padding(model) else None

    shown = ShownStates(lambda state: Packed(repeat(state), x.layout).to_padded(length=padded_frames, left=left))
    through = shown.through if shows and fewer is x else None  # a compressor's states are repeated ones

    def run(values: Tensor) -> tuple[Tensor, list[Tensor]]:
        frames = Packed(values, fewer.layout)
        embedded = F.with_positions(encoder, frames, _positions_over_padding(encoder, frames, over_padding))
        return run_transformer(encoder, embedded, fewer.layout, calls=calls, through=through)

    last, states = call_through.call(model.encoder, run, fewer.values)
    return Encoded(Packed(repeat(last), x.layout), states, shown.padded)


def _ask(model: Any, layout: Layout, padded_frames: int, left: tuple[bool, ...]) -> None:
    encoders.ask_for_transformer(model, model.encoder, layout)
    if _positions_see_padding(model):
        encoders.ask_for_positions(model.encoder, _filled(layout, padded_frames))
    ask_for_adapter(model, layout, padded_frames, left)


def run_transformer(
    encoder: Any, x: Tensor, layout: Layout, *, calls: bool, through: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Run the layers of a transformer.

    Args:
        encoder: The transformer, with `layers`, `layer_norm` and `dropout`.
        x: (N, D) packed frames with their positional embedding.
        layout: Where each sequence begins.
        calls: Whether to call projections that the original only reads.
        through: Function that each hidden state goes through before it is used, see `ShownStates`.

    Returns:
        The last hidden state (N, D) after the final norm, and all hidden states (N, D) before it.
    """
    pre_norm = "StableLayerNorm" in type(encoder).__name__
    first = encoder.layers[0].attention if len(encoder.layers) else None
    has_bias = hasattr(first, "rel_attn_embed")
    bias: Tensor | None = None

    def run(layer: Any, values: Tensor) -> Tensor:
        nonlocal bias
        values = values if through is None else through(values)
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
    hidden_states = list(F.hidden_states(encoder, x, layers, run, pre_norm=pre_norm))
    last = hidden_states[-1] if through is None else through(hidden_states[-1])
    return (encoder.layer_norm(last) if pre_norm else last), hidden_states


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
    if adapter is None:
        return x
    reads = type(adapter).__module__.startswith("transformers.") and not F.is_watched(adapter)
    return x + (in_layer(adapter, x) if reads else adapter(x))


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


def ask_for_adapter(model: Any, layout: Layout, padded_frames: int, left: tuple[bool, ...]) -> None:
    """Ask the layout of the encoder's frames for what the convolutional adapter, if there is one, computes with it."""
    adapter = getattr(model, "adapter", None)
    for layer in [] if adapter is None else adapter.layers:
        layout = ask_for_conv(layer.conv, layout)
        padded_frames = _adapter_frames(layer.conv, padded_frames)
        layout.ask_for_indices()
        encoders.ask_for_padding(layout, padded_frames, left)


def _adapter_frames(conv: nn.Conv1d, frames: int) -> int:
    length = frames + 2 * int(conv.padding[0]) if frames else 0
    return Layout.from_lengths([length]).after_conv(conv.kernel_size[0], conv.stride[0]).max_length


CLASSES = accelerated_classes(
    __name__, _SOURCES, Architecture(_modules_not_called, project, _encode, _ask, _called_through), _check
)
__getattr__ = CLASSES.by_name  # for pickle
