"""Run torchaudio's speech encoders packed: wav2vec 2.0, HuBERT, XLS-R and WavLM, all of class `Wav2Vec2Model`.

An accelerated encoder belongs to a subclass of its class, with the same name and its own `forward` and
`extract_features`. `isinstance`, pickling, `copy.deepcopy` and the wrappers of pipelines therefore work as before. Each
utterance is computed as if it were alone in the batch. In the padding after an utterance, `forward` repeats its last
frame or logits, and `extract_features` returns zeros. An auxiliary head that is not a plain linear layer is called on
the padded batch, as in the original.

Limits: hooks on linear layers, norms and dropouts are called. If any other module has a hook (the feature extractor, a
convolution, the encoder, one of its layers), the original code runs, with a warning; `call_through` has exceptions. A
pipeline's wrapper that normalises waveforms still does so over the whole batch, padding included. A script
(`torch.jit.script`) and a dynamically quantised model run the original's modules on each utterance alone; a trace and
an export are of the original, on padded batches. A `HuBERTPretrainModel` calls the parts of its encoder directly, so
acceleration changes neither its results nor its speed.
"""

import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.interop import call_through, encoders, read_only, scripted
from fastssl.interop.calls import as_original, recorded_by
from fastssl.interop.classes import AcceleratedClasses
from fastssl.interop.lengths import frame_lengths, valid_samples
from fastssl.interop.shown_states import ShownStates
from fastssl.models.folder import ACCELERATED_COMPRESSOR
from fastssl.nn import functional as F
from fastssl.nn.linear import packed_linear
from fastssl.packing import Layout, Packed

#: Parts of an encoder that must be torchaudio's own: a pattern for the part's name, and the supported classes.
_PARTS = (
    (r"feature_extractor", "FeatureExtractor"),
    (r"feature_extractor\.conv_layers\.\d+", "ConvLayerBlock"),
    (r"encoder", "Encoder"),
    (r"encoder\.feature_projection", "FeatureProjection"),
    (r"encoder\.transformer", "Transformer"),
    (r"encoder\.transformer\.pos_conv_embed", "ConvolutionalPositionalEmbedding"),
    (r"encoder\.transformer\.layers\.\d+", "EncoderLayer"),
    (r"encoder\.transformer\.layers\.\d+\.attention", "SelfAttention or WavLMSelfAttention"),
    (r"encoder\.transformer\.layers\.\d+\.feed_forward", "FeedForward"),
)


def _check(module: nn.Module) -> None:
    """Raise ValueError if an encoder has an unsupported part; `Wav2Vec2Model` can be built from any modules."""
    for wrapped_name, part in module.named_modules():
        name, cls = call_through.without_wrappers(wrapped_name), call_through.own_class(call_through.unwrapped(part))
        for pattern, served in _PARTS:
            known = cls.__name__ in served.split(" or ") and cls.__module__.startswith("torchaudio.models.wav2vec2.")
            if re.fullmatch(pattern, name) and not known:
                found = f"{cls.__module__}.{cls.__name__}"
                raise ValueError(f"model: {name} is a {found}; only torchaudio's {served} is supported")
        grouped = isinstance(part, nn.GroupNorm) and part.num_groups != part.num_channels
        if grouped and name.startswith("feature_extractor."):
            groups = f"{part.num_groups} groups for {part.num_channels} channels"
            raise ValueError(f"model: {name} has {groups}; only one group per channel is supported")


def _forward(
    self: Any,
    waveforms: Tensor,  # (B, T)
    lengths: Tensor | None = None,  # (B,)
) -> tuple[Tensor, Tensor | None]:  # (B, F, D) or (B, F, labels), (B,)
    """Return the last layer's frames, or the auxiliary head's logits, and the number of valid frames of each row."""
    if _original_runs(self):
        return CLASSES.original(self).forward(self, waveforms, lengths)  # type: ignore[no-any-return]
    if waveforms.device.type == "cpu" and _scales_by_batch(self):
        return scripted.forward_in_python(self, waveforms, lengths)  # type: ignore[no-any-return]
    frames, padded_frames, frame_lengths = _front_end(self, waveforms, lengths)
    stack = self.encoder.transformer
    # Layer drop with the same random draws as the original, which draws even if the probability is 0.
    layers = (
        layer
        for layer in stack.layers
        if not (stack.training and torch.rand(1, device="cpu").item() <= stack.layer_drop)
    )
    states, upsample = _transformer(self, frames, layers)
    (x,) = deque(states, maxlen=1)
    x = upsample(x if stack.layer_norm_first else stack.layer_norm(x))
    if self.aux is None or not F.is_plain(self.aux, nn.Linear):
        padded = encoders.padded_by_last(Packed(x, frames.layout), padded_frames)
        if self.aux is not None:
            padded = scripted.without_empty_rows(self.aux(padded), list(frames.layout.lengths), padded_frames)
        return padded, frame_lengths
    return encoders.padded_by_last(Packed(F.linear(self.aux, x), frames.layout), padded_frames), frame_lengths


def _extract_features(
    self: Any,
    waveforms: Tensor,  # (B, T)
    lengths: Tensor | None = None,  # (B,)
    num_layers: int | None = None,
) -> tuple[list[Tensor], Tensor | None]:  # of (B, F, D), (B,)
    """Return the frames of every layer, or of the first `num_layers`, and the number of valid frames of each row."""
    if _original_runs(self):
        original = CLASSES.original(self)
        return original.extract_features(self, waveforms, lengths, num_layers)  # type: ignore[no-any-return]
    if waveforms.device.type == "cpu" and _scales_by_batch(self):
        return scripted.extract_features(self, waveforms, lengths, num_layers)
    layers = self.encoder.transformer.layers
    if num_layers is not None and not 0 < num_layers <= len(layers):
        raise ValueError(f"num_layers: must be from 1 to {len(layers)}, got {num_layers}")
    frames, padded_frames, frame_lengths = _front_end(self, waveforms, lengths)
    shown = ShownStates(lambda state: Packed(upsample(state), frames.layout).to_padded(length=padded_frames))
    # A compressor's states are repeated ones.
    through = None if hasattr(self, ACCELERATED_COMPRESSOR) else shown.through
    states, upsample = _transformer(self, frames, layers[:num_layers], through)
    next(states)  # the input of the first layer
    return [shown.padded(x) for x in list(states)], frame_lengths


def _original_runs(model: Any) -> bool:
    layers = model.encoder.transformer.layers
    return encoders.original_runs(
        model, _modules_not_called(model), layers=layers, called_through=(model.feature_extractor, *layers)
    )


def _modules_not_called(model: Any) -> Iterator[nn.Module]:
    """Yield the modules that the original forward calls and fastssl's only reads."""
    yield from (model.encoder, model.encoder.feature_projection)
    yield from encoders.modules_not_called(model, model.encoder.transformer)


def _scales_by_batch(model: nn.Module) -> bool:
    """Return whether `quantize_dynamic` changed a model; if so, warn that its utterances are computed one by one.

    A dynamically quantised layer rounds all of its input to 8 bits with one scale, so that in a packed batch an
    utterance's frames would depend on the others.

    Raises:
        ValueError: The model has a compressor.
    """
    dynamic = "torch.ao.nn.quantized.dynamic"
    if dynamic not in sys.modules or not any(type(part).__module__.startswith(dynamic) for part in model.modules()):
        return False
    reason = "a dynamically quantised layer has one scale for all frames of a call"
    if hasattr(model, ACCELERATED_COMPRESSOR):
        raise ValueError(f"{reason}, so a compressor is not supported; call `fastssl.restore` first, which removes it")
    warnings.warn(f"{reason}, so the original code runs on each utterance alone, without acceleration", stacklevel=4)
    return True


def _front_end(model: Any, waveforms: Tensor, lengths: Tensor | None) -> tuple[Packed, int, Tensor | None]:
    """Run the convolutions.

    Returns:
        The packed frames (N, C), the number of frames per padded row, and the number of valid frames (B,) of each row,
        which is None if `lengths` is None.
    """
    read_only.warn_once(model, model.encoder.transformer.layers, stacklevel=5)
    if waveforms.dim() != 2:
        raise ValueError(f"waveforms: expected (B, T) samples, got {tuple(waveforms.shape)}")
    batch, samples = waveforms.shape
    extractor = model.feature_extractor
    convolutions = [(layer.conv.kernel_size[0], layer.conv.stride[0]) for layer in extractor.conv_layers]
    valid, counts = [samples] * batch, None
    if lengths is not None:
        valid, counts = _valid_lengths(lengths, batch, samples, convolutions)
    frames, padded_frames = encoders.front_end(
        model,
        waveforms,
        valid,
        convolutions,
        lambda padded: extractor(padded, None)[0],
        lambda layout, _: encoders.ask_for_transformer(model, model.encoder.transformer, layout),
    )
    if lengths is not None and counts is None:
        if lengths.device == waveforms.device:
            counts = frames.layout.device_lengths.to(lengths.dtype)
        else:
            counts = torch.tensor(frames.layout.lengths, dtype=lengths.dtype, device=lengths.device)
    return frames, padded_frames, counts


def _valid_lengths(
    lengths: Tensor, batch: int, samples: int, convolutions: list[tuple[int, int]]
) -> tuple[list[int], Tensor | None]:
    """Return the samples of each row to use, and the frames (B,) to return if they are not those of the samples.

    Raises:
        TypeError: The lengths are no tensor.
        ValueError: They have the wrong shape or dtype.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: must be a tensor, got {type(lengths).__name__}")
    # The original takes one length for all waveforms as well.
    if lengths.shape not in ((batch,), (1,)):
        raise ValueError(f"lengths: expected the shape ({batch},), one per waveform, got {tuple(lengths.shape)}")
    if lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths: must be numbers of samples, got {lengths.dtype}")
    host = lengths.detach().to("cpu")  # the only place where the host waits for the device
    listed = host.tolist()
    ordinary = lengths.dtype in (torch.int64, torch.int32, torch.int16) and len(listed) == batch
    if ordinary and all(0 <= length <= samples for length in listed):
        return listed, None
    frames = frame_lengths(host, convolutions)
    valid = valid_samples(host, frames, samples, convolutions).expand(batch).tolist()
    return valid, frames.to(lengths.device)


def _transformer(
    model: Any, frames: Packed, layers: Iterable[Any], through: Callable[[Tensor], Tensor] | None = None
) -> tuple[Iterator[Tensor], Callable[[Tensor], Tensor]]:
    """Run transformer layers on packed frames.

    Args:
        model: The encoder.
        frames: (N, C) frames of the front end.
        layers: The layers to run.
        through: Function that each layer's output goes through before the next layer, see `ShownStates`.

    Returns:
        An iterator over the input (M, D) of the first layer and the output (M, D) of each layer, and a function that
        expands such rows to all frames (N, D). Without a compressor, M = N.
    """
    projection, stack = model.encoder.feature_projection, model.encoder.transformer
    projected = F.project(projection, F.normalise(projection, frames.values))
    projected_frames = Packed(projected, frames.layout)
    fewer, upsample = encoders.compress(model, partial(encoders.ask_for_positions, stack), projected_frames)
    bias: Tensor | None = None
    is_first = True

    def run(layer: Any, x: Tensor) -> Tensor:
        nonlocal bias, is_first
        x, is_first = x if through is None or is_first else through(x), False
        own = call_through.unwrapped(layer)
        function: Callable[..., Any] = partial(_layer, own, fewer.layout)
        # Only the first layer holds the bias. If layer drop skips it, the original runs without a bias, and so do we.
        if bias is None and getattr(own.attention, "rel_attn_embed", None) is not None:
            output, bias = call_through.call(layer, partial(encoders.with_distance_bias, function, own.attention), x)
        else:
            output = call_through.call(layer, function, x, bias)
        return output  # type: ignore[no-any-return]

    embedded = F.with_positions(stack, fewer)
    return F.hidden_states(stack, embedded, layers, run, pre_norm=not stack.layer_norm_first), upsample


def _layer(
    layer: Any,
    layout: Layout,
    x: Tensor,  # (N, D)
    bias: Tensor | None,
) -> Tensor:  # (N, D)
    attention = partial(_attention, layer.attention, layout=layout, bias=bias)
    return encoders.run_layer(layer, x, attention, pre_norm=layer.layer_norm_first)


def _attention(module: Any, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:  # (N, D) -> (N, D)
    if not hasattr(module, "rel_attn_embed"):
        attended = F.attend(module, F.queries_keys_values(module, x), layout)
        return F.linear(module.out_proj, attended)
    parameters = module.attention  # a `torch.nn.MultiheadAttention`
    projected = packed_linear(x, parameters.in_proj_weight, parameters.in_proj_bias)
    projected = projected.unflatten(1, (3, module.num_heads, -1)).unbind(1)
    gate = F.gate(module, x) if bias is not None and module.gru_rel_pos else None
    return F.linear(parameters.out_proj, F.attend(module, projected, layout, distance_bias=bias, gate=gate))


def _methods(original: type[nn.Module]) -> dict[str, Any]:
    def method(name: str, packed: Callable[..., Any]) -> Any:
        # Under torch.compile every new set of lengths would trigger a recompilation, and the ops are fused already.
        untraced = torch.compiler.disable(
            encoders.sharing_casts(packed), reason="an accelerated encoder is not compiled"
        )

        def run(self: Any, **given: Any) -> Any:
            if recorder := recorded_by(given.values()):
                encoders.original_runs(self, (), f"{recorder} records the call")
                return getattr(original, name)(self, **given)
            return untraced(self, **given)

        return scripted.scriptable(name, as_original(getattr(original, name), run))

    return {
        "forward": method("forward", _forward),
        "extract_features": method("extract_features", _extract_features),
        "__prepare_scriptable__": _prepare_scriptable,
    }


def _prepare_scriptable(self: Any) -> Any:
    """Say what `torch.jit.script` compiles; it calls this first.

    Raises:
        ValueError: The model has a compressor, which a script cannot apply.
    """
    if hasattr(self, ACCELERATED_COMPRESSOR):
        raise ValueError("a compressor cannot be scripted; call `fastssl.restore` on the model first, which removes it")
    warnings.warn(
        "torch.jit.script compiles the original code, so the script runs utterance by utterance and without "
        "acceleration; its results are those of the accelerated model",
        stacklevel=2,
    )
    return self


CLASSES = AcceleratedClasses(
    __name__,
    {"Wav2Vec2Model": "torchaudio.models.wav2vec2.model"},
    _methods,
    check=_check,
    width=lambda encoder: int(encoder.encoder.feature_projection.projection.out_features),
    layers=lambda encoder: encoder.encoder.transformer.layers,
)
__getattr__ = CLASSES.by_name  # for pickle
