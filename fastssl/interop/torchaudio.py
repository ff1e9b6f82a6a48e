"""torchaudio's speech encoders, run packed: wav2vec 2.0, HuBERT, XLS-R and WavLM, which all are its `Wav2Vec2Model`.

An accelerated encoder is of a subclass of its class, with the same name and another `forward` and `extract_features`:
`isinstance`, pickling, `copy.deepcopy` and the pipelines' wrappers see the model they know. Each utterance is computed
as if it were alone. Behind it `forward` repeats its last frame or logits, and `extract_features` has zeros. An
auxiliary head that is not a plain linear layer gets the padded batch, as the original gives it.

What stays as it is: hooks on linear layers, norms and dropouts are called, but where somebody has hooked a module that
this code does not call (the feature extractor, a convolution, the encoder, one of its layers), the original code runs,
with a warning. The wrapper of a pipeline that normalises waveforms does so over all of a batch, its padding and
its batch mates. A `HuBERTPretrainModel` calls the parts of its encoder by itself: accelerated or not, it computes what
it did, in the same time.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastssl import ops
from fastssl.interop import layers as L
from fastssl.interop.classes import NORM, AcceleratedClasses, compress
from fastssl.models.folder import ACCELERATED_COMPRESSOR
from fastssl.nn.linear import packed_linear
from fastssl.packing import Layout, Packed

_NAME = "Wav2Vec2Model"
MODULE = "torchaudio.models.wav2vec2.model"
KNOWN = (f"torchaudio.{_NAME}",)


def knows(module: nn.Module) -> bool:
    """Whether it is such an encoder, accelerated or not."""
    return _CLASSES.original(module) is not None


def check(module: Any) -> None:
    """Raise ValueError where an encoder has a part that is not torchaudio's own: the class takes any."""
    extractor, encoder = module.feature_extractor, module.encoder
    _expect("feature_extractor", extractor, "FeatureExtractor")
    for index, layer in enumerate(extractor.conv_layers):
        name = f"feature_extractor.conv_layers.{index}"
        _expect(name, layer, "ConvLayerBlock")
        norm = layer.layer_norm
        if isinstance(norm, nn.GroupNorm) and norm.num_groups != norm.num_channels:
            groups = f"{norm.num_groups} groups for {norm.num_channels} channels"
            raise ValueError(f"model: {name}.layer_norm has {groups}; only as many groups as channels are served")
    _expect("encoder", encoder, "Encoder")
    _expect("encoder.feature_projection", encoder.feature_projection, "FeatureProjection")
    _expect("encoder.transformer", encoder.transformer, "Transformer")
    position = encoder.transformer.pos_conv_embed
    _expect("encoder.transformer.pos_conv_embed", position, "ConvolutionalPositionalEmbedding")
    for index, layer in enumerate(encoder.transformer.layers):
        name = f"encoder.transformer.layers.{index}"
        _expect(name, layer, "EncoderLayer")
        _expect(f"{name}.attention", layer.attention, "SelfAttention", "WavLMSelfAttention")
        _expect(f"{name}.feed_forward", layer.feed_forward, "FeedForward")


def accelerate(module: nn.Module, norm: str) -> None:
    """Give an encoder our `forward` and `extract_features`."""
    _CLASSES.put_on(module, norm)


def width(module: Any) -> int:
    """D."""
    return int(module.encoder.feature_projection.projection.out_features)


def restore(module: nn.Module) -> None:
    """Give an encoder its own `forward` and `extract_features` back."""
    _CLASSES.take_off(module)


def _expect(name: str, module: Any, *kinds: str) -> None:
    cls = type(module)
    if cls.__name__ not in kinds or not cls.__module__.startswith("torchaudio.models.wav2vec2."):
        found = f"{cls.__module__}.{cls.__name__}"
        raise ValueError(f"model: {name} is a {found}; only torchaudio's {' or '.join(kinds)} is served")


def _forward(
    self: Any,
    waveforms: Tensor,  # (B, T)
    lengths: Tensor | None = None,  # (B,)
) -> tuple[Tensor, Tensor | None]:  # (B, F, D) or (B, F, labels), (B,)
    """The last layer's frames, or the auxiliary head's logits, and how many of each row are valid."""
    if _runs_as_it_was(self):
        output: tuple[Tensor, Tensor | None] = _CLASSES.original(self).forward(self, waveforms, lengths)
        return output
    frames, padded_frames, frame_lengths = _front_end(self, waveforms, lengths)
    transformer = self.encoder.transformer
    (x, layout), upsample = _embed(self, frames)
    bias = None
    for layer in transformer.layers:
        # Layer drop, by the same draws as the original's, which draws where nothing is ever dropped, too.
        if not (transformer.training and torch.rand(1).item() <= transformer.layer_drop):
            x, bias = _layer(layer, x, layout, bias)
    if not transformer.layer_norm_first:
        x = transformer.layer_norm(x)
    x, layout = upsample(x), frames.layout
    if self.aux is None or not L.is_plain(self.aux, nn.Linear):
        padded = L.padded_by_last(Packed(x, layout), padded_frames)
        return (padded if self.aux is None else self.aux(padded)), frame_lengths
    return L.padded_by_last(Packed(L.linear(self.aux, x), layout), padded_frames), frame_lengths


def _extract_features(
    self: Any,
    waveforms: Tensor,  # (B, T)
    lengths: Tensor | None = None,  # (B,)
    num_layers: int | None = None,
) -> tuple[list[Tensor], Tensor | None]:  # of (B, F, D), (B,)
    """The frames of every layer, or of the first `num_layers`, and how many of each row are valid."""
    if _runs_as_it_was(self):
        output: tuple[list[Tensor], Tensor | None]
        output = _CLASSES.original(self).extract_features(self, waveforms, lengths, num_layers)
        return output
    layers = self.encoder.transformer.layers
    if num_layers is not None and not 0 < num_layers <= len(layers):
        raise ValueError(f"num_layers: must be from 1 to {len(layers)}, got {num_layers}")
    frames, padded_frames, frame_lengths = _front_end(self, waveforms, lengths)
    (x, layout), upsample = _embed(self, frames)
    bias, outputs = None, []
    for layer in layers[:num_layers]:
        x, bias = _layer(layer, x, layout, bias)
        outputs.append(Packed(upsample(x), frames.layout).to_padded(length=padded_frames))
    return outputs, frame_lengths


def _runs_as_it_was(model: Any) -> bool:
    reason = L.foreign_code(_modules_not_called(model))
    if reason is not None and hasattr(model, ACCELERATED_COMPRESSOR):
        raise ValueError(f"{reason}, which has no place for the compressor")
    if reason is not None:
        warnings.warn(f"{reason}, so the original code runs, padded", stacklevel=4)
    return reason is not None


def _modules_not_called(model: Any) -> Iterator[nn.Module]:
    """Those that the original calls and this code only reads."""
    extractor, encoder = model.feature_extractor, model.encoder
    if getattr(model, NORM) == "valid":
        yield extractor
        for block in extractor.conv_layers:
            yield from (block, block.conv)
            if block.layer_norm is not None:
                yield block.layer_norm
    transformer = encoder.transformer
    yield from (encoder, encoder.feature_projection, transformer)
    yield from (transformer.pos_conv_embed, transformer.pos_conv_embed.conv)
    for layer in transformer.layers:
        yield from (layer, layer.attention, layer.feed_forward)
        if hasattr(layer.attention, "rel_attn_embed"):
            yield layer.attention.attention


def _front_end(model: Any, waveforms: Tensor, lengths: Tensor | None) -> tuple[Packed, int, Tensor | None]:
    """The convolutions' frames, how many the padded batch has, and the valid ones of each row, as `lengths` are."""
    if waveforms.dim() != 2:
        raise ValueError(f"waveforms: expected (B, T) samples, got {tuple(waveforms.shape)}")
    batch, samples = waveforms.shape
    valid = [samples] * batch if lengths is None else _valid_lengths(lengths, batch, samples)
    padded_frames = _frames_after(model, Layout.from_lengths([samples])).max_length
    if getattr(model, NORM) == "valid":
        frames = L.front_end(model.feature_extractor.conv_layers, L.waveforms_of(waveforms, valid))
    else:
        padded, _ = model.feature_extractor(waveforms, None)
        frames = Packed.from_padded(padded, _frames_after(model, Layout.from_lengths(valid)).lengths)
    frame_lengths = None if lengths is None else frames.layout.cu_seqlens.diff().to(lengths.device, lengths.dtype)
    return frames, padded_frames, frame_lengths


def _valid_lengths(lengths: Tensor, batch: int, samples: int) -> list[int]:
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: expected ({batch},), one for each waveform, got {tuple(lengths.shape)}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths: must be integers, got {lengths.dtype}")
    host: list[int] = lengths.tolist()
    for row, length in enumerate(host):
        if not 0 <= length <= samples:
            raise ValueError(f"lengths: row {row} has {length} samples, but the waveforms are {(batch, samples)}")
    return host


def _frames_after(model: Any, layout: Layout) -> Layout:
    for layer in model.feature_extractor.conv_layers:
        layout = layout.after_conv(layer.conv.kernel_size[0], layer.conv.stride[0])
    return layout


def _embed(model: Any, frames: Packed) -> tuple[Packed, Callable[[Tensor], Tensor]]:
    """What the first layer takes, (N, D), and what brings rows back to all frames."""
    projection, transformer = model.encoder.feature_projection, model.encoder.transformer
    projected = L.linear(projection.projection, projection.layer_norm(frames.values))
    (x, layout), upsample = compress(model, Packed(L.dropout(projection.dropout, projected), frames.layout))
    x = x + F.gelu(L.positional_conv(transformer.pos_conv_embed.conv, x, layout))
    if transformer.layer_norm_first:
        x = transformer.layer_norm(x)
    return Packed(L.dropout(transformer.dropout, x), layout), upsample


def _layer(layer: Any, x: Tensor, layout: Layout, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One layer's output, and WavLM's distance bias for the layers to come."""
    attention, feed_forward = layer.attention, layer.feed_forward
    normalised = layer.layer_norm(x) if layer.layer_norm_first else x
    if hasattr(attention, "rel_attn_embed"):
        # Only the first layer has one. Where layer drop skips that layer, the original goes without, and so do we.
        bias = L.distance_bias(attention) if bias is None and attention.rel_attn_embed is not None else bias
        attended = _wavlm_attention(attention, normalised, layout, bias)
    else:
        dropout = attention.dropout if attention.training else 0.0
        attended = L.attention(attention, normalised, layout, heads=attention.num_heads, dropout=dropout)
    if layer.layer_norm_first:
        x, normalised = L.sum_and_norm(attended, x, layer.final_layer_norm, layer.dropout)
        return x + L.dropout(feed_forward.output_dropout, _feed_forward(feed_forward, normalised)), bias
    x = L.add_and_norm(attended, x, layer.layer_norm, layer.dropout)
    branch = _feed_forward(feed_forward, x)
    return L.add_and_norm(branch, x, layer.final_layer_norm, feed_forward.output_dropout), bias


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    """The output before its dropout."""
    return L.feed_forward(module.intermediate_dense, module.intermediate_dropout, module.output_dense, x)


def _wavlm_attention(module: Any, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:  # (N, D) -> (N, D)
    """Self-attention by the parameters of a `torch.nn.MultiheadAttention`."""
    parameters = module.attention
    projected = packed_linear(x, parameters.in_proj_weight, parameters.in_proj_bias)
    q, k, v = projected.unflatten(1, (3, module.num_heads, -1)).unbind(1)
    attended = ops.varlen_attention(
        q,
        k,
        v,
        layout,
        dropout_p=module.dropout if module.training else 0.0,
        distance_bias=bias,
        gate=L.gate(module, x) if bias is not None and module.gru_rel_pos else None,
    ).flatten(1)
    out = parameters.out_proj
    if L.is_plain(out, NonDynamicallyQuantizableLinear):  # a Linear in all but name
        return packed_linear(attended, out.weight, out.bias)
    return L.linear(out, attended)


def _methods(original: type[nn.Module]) -> dict[str, Any]:
    # Traced, every new set of lengths would be compiled anew, and the ops are fused already.
    untraced = partial(torch.compiler.disable, reason="an accelerated encoder runs as it is")
    return {"forward": untraced(_forward), "extract_features": untraced(_extract_features)}


_CLASSES = AcceleratedClasses(__name__, {_NAME: MODULE}, _methods)
__getattr__ = _CLASSES.by_name  # for pickle
