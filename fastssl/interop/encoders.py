"""What accelerated encoders share, whatever their library: when they run, and how padding is removed and put back.

Linear layers, norms and dropouts that are not PyTorch's own are called (see `nn.functional`). If any other module is
not as its library made it, the original code runs: `original_runs`.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.interop.classes import NORM
from fastssl.models.folder import ACCELERATED_COMPRESSOR
from fastssl.nn import functional as F
from fastssl.packing import Layout, Packed

_LIBRARIES = ("transformers.", "torchaudio.", "torch.nn.", "fastssl.")


def original_runs(model: nn.Module, modules: Iterable[nn.Module], reason: str | None = None) -> bool:
    """Whether the original `forward` has to run, after a warning that says why.

    Args:
        model: The accelerated encoder.
        modules: Those that our forward reads without calling them. A hook on one of them, or somebody else's class in
            its place, would be left out without a word.
        reason: Another reason, if there is one.

    Raises:
        ValueError: It has to, but the model has a compressor.
    """
    reason = reason or _foreign_code(modules)
    if reason is None:
        return False
    if hasattr(model, ACCELERATED_COMPRESSOR):
        raise ValueError(f"{reason}, which has no place for the compressor")
    warnings.warn(f"{reason}, so the original code runs, padded", stacklevel=4)
    return True


def _foreign_code(modules: Iterable[nn.Module]) -> str | None:
    for module in modules:
        kind = type(module)
        if not kind.__module__.startswith(_LIBRARIES):
            return f"a {kind.__module__}.{kind.__name__} is in the place of a module of the original"
        if F.is_watched(module):
            return f"a {kind.__name__} has a hook or a forward of its own"
    return None


def modules_not_called(model: Any, stack: Any) -> Iterator[nn.Module]:
    """The modules of a front end and a stack that the original calls and our forward only reads."""
    blocks = [*getattr(stack.pos_conv_embed, "layers", [stack.pos_conv_embed])]
    if getattr(model, NORM) == "valid":
        yield model.feature_extractor
        blocks += model.feature_extractor.conv_layers
        for block in model.feature_extractor.conv_layers:
            if getattr(block, "layer_norm", None) is not None:
                yield block.layer_norm
    yield from (stack, stack.pos_conv_embed)
    for block in blocks:
        yield from (block, block.conv)
    for layer in stack.layers:
        yield from (layer, layer.attention, layer.feed_forward)


def front_end(
    model: Any,
    waveforms: Tensor,  # (B, T)
    lengths: list[int],
    convolutions: Iterable[tuple[int, int]],
    padded: Callable[[Tensor], Tensor],
) -> tuple[Packed, int]:
    """The frames of an encoder's convolutions, (N, C), and how many frames a row of the padded batch has.

    Args:
        model: The encoder.
        waveforms: (B, T).
        lengths: Valid samples of each.
        convolutions: Kernel and stride of each convolution.
        padded: The original front end, (B, T) to (B, F, C), which runs if the encoder's norm is "padded".
    """
    layout = Layout.from_lengths([*lengths, waveforms.shape[1]])
    for kernel, stride in convolutions:
        layout = layout.after_conv(kernel, stride)
    *frames, padded_frames = layout.lengths
    if getattr(model, NORM) == "valid":
        samples = Packed.from_padded(waveforms.unsqueeze(2), lengths)
        return F.front_end(model.feature_extractor.conv_layers, samples), padded_frames
    return Packed.from_padded(padded(waveforms), frames), padded_frames


def compress(model: nn.Module, frames: Packed) -> tuple[Packed, Callable[[Tensor], Tensor]]:
    """The frames that an accelerated encoder's transformer takes, and what brings its rows back to all of them.

    Args:
        model: The encoder.
        frames: (N, D), projected.
    """
    compressor = getattr(model, ACCELERATED_COMPRESSOR, None)
    if compressor is None:
        return frames, lambda values: values
    compressed = compressor(frames)
    return compressed.frames, compressed.upsample


def run_layer(layer: Any, x: Tensor, attention: Callable[[Tensor], Tensor], *, pre_norm: bool) -> Tensor:
    """One layer, (N, D) to (N, D), around its attention."""
    feed_forward, dropout = partial(F.feed_forward, layer.feed_forward), layer.feed_forward.output_dropout
    return F.transformer_layer(layer, x, attention, feed_forward, dropout, pre_norm=pre_norm)[0]


def distance_bias(attention: Any) -> Tensor:
    """WavLM's relative position bias (arXiv 2110.13900, section 2.2) by distance, (H, 2R + 1): constant beyond R."""
    # The buckets are found on the host, as the originals do: a logarithm elsewhere may round to another one.
    distances = torch.arange(-attention.max_distance, attention.max_distance + 1)
    embedding = attention.rel_attn_embed
    bias: Tensor = embedding(attention._relative_positions_bucket(distances).to(embedding.weight.device))
    return bias.t()


def padded_by_last(x: Packed, length: int) -> Tensor:  # (N, D) -> (B, length, D)
    """A padded batch with each utterance's last frame repeated after it, or zeros where it has no frame.

    Greedy CTC decoding of a whole row then gives the text of the utterance. The padding passes no gradient.
    """
    padded = x.to_padded(length=length)
    if not x.layout.total or min(x.layout.lengths) == length:
        return padded
    last = x.values.detach()[(x.layout.cu_seqlens[1:].long() - 1).clamp(min=0)]
    last = torch.where(x.layout.device_lengths.unsqueeze(1) > 0, last, 0)
    return torch.where(x.layout.valid(length).unsqueeze(2), padded, last.unsqueeze(1))
