"""Code shared by accelerated encoders of all libraries: when they run, and how they remove and restore padding.

Linear layers, norms and dropouts that are not plain PyTorch modules are called as they are (see `nn.functional`). If
any other module has a hook or a foreign class, the original code runs instead; see `original_runs`.
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
    """Return whether the original `forward` must run instead of fastssl's; if so, warn why.

    Args:
        model: The accelerated encoder.
        modules: Modules whose parameters fastssl's forward reads without calling them. It would silently ignore a hook
            on one of them, or a foreign class in its place, so in these cases the original must run.
        reason: Another reason to run the original, found by the caller, or None.

    Raises:
        ValueError: The original must run, but the model has a compressor, which the original cannot apply.
    """
    reason = reason or _foreign_code(modules)
    if reason is None:
        return False
    if hasattr(model, ACCELERATED_COMPRESSOR):
        raise ValueError(
            f"{reason}, but the original code cannot apply the compressor; undo this, or remove the compressor with "
            "`fastssl.restore`"
        )
    warnings.warn(f"{reason}, so the original code runs, on padded batches and without acceleration", stacklevel=4)
    return True


def _foreign_code(modules: Iterable[nn.Module]) -> str | None:
    for module in modules:
        kind = type(module)
        if not kind.__module__.startswith(_LIBRARIES):
            return f"a {kind.__module__}.{kind.__name__} replaces a module of the original"
        if F.is_watched(module):
            return f"a {kind.__name__} has a hook or a replaced `forward`"
    return None


def modules_not_called(model: Any, stack: Any) -> Iterator[nn.Module]:
    """Yield the modules that the original forward calls and fastssl's only reads.

    Args:
        model: The encoder, with `feature_extractor`.
        stack: Its transformer, with `pos_conv_embed` and `layers`.
    """
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
    """Run an encoder's convolutions on a padded batch and pack the valid frames.

    Args:
        model: The encoder.
        waveforms: (B, T) samples.
        lengths: B numbers of valid samples.
        convolutions: Kernel size and stride of each convolution, from first to last.
        padded: The original front end, (B, T) to (B, F, C). It runs if the encoder's norm is "padded" and F is not 0,
            which the original refuses.

    Returns:
        The valid frames (N, C), and the number of frames F per row of the padded batch.
    """
    layout = Layout.from_lengths([*lengths, waveforms.shape[1]])
    for kernel, stride in convolutions:
        layout = layout.after_conv(kernel, stride)
    *frames, padded_frames = layout.lengths
    if getattr(model, NORM) == "valid" or padded_frames == 0:
        samples = Packed.from_padded(waveforms.unsqueeze(2), lengths)
        return F.front_end(model.feature_extractor.conv_layers, samples), padded_frames
    return Packed.from_padded(padded(waveforms), frames), padded_frames


def compress(model: nn.Module, frames: Packed) -> tuple[Packed, Callable[[Tensor], Tensor]]:
    """Apply an accelerated encoder's compressor to the input of its transformer, if it has one.

    Args:
        model: The encoder.
        frames: (N, D), the projected frames.

    Returns:
        The frames (M, D) for the transformer layers, and a function that repeats rows (M, D) of their outputs to
        (N, D). Without a compressor, M = N and both are unchanged.
    """
    compressor = getattr(model, ACCELERATED_COMPRESSOR, None)
    if compressor is None:
        return frames, lambda values: values
    compressed = compressor(frames)
    return compressed.frames, compressed.upsample


def run_layer(layer: Any, x: Tensor, attention: Callable[[Tensor], Tensor], *, pre_norm: bool) -> Tensor:
    """Run one transformer layer on packed frames.

    Args:
        layer: Layer of the original model, with its norms, dropout and `feed_forward`.
        x: (N, D).
        attention: Function from (N, D) to (N, D).
        pre_norm: Whether the norms come before attention and feed-forward instead of after them.

    Returns:
        The layer's output, (N, D).
    """
    feed_forward, dropout = partial(F.feed_forward, layer.feed_forward), layer.feed_forward.output_dropout
    return F.transformer_layer(layer, x, attention, feed_forward, dropout, pre_norm=pre_norm)[0]


def distance_bias(attention: Any) -> Tensor:
    """Compute WavLM's relative position bias for each distance between two frames (arXiv 2110.13900, section 2.2).

    Args:
        attention: WavLM's attention module, with `rel_attn_embed` and `max_distance` R.

    Returns:
        (H, 2R + 1) for distances -R to R; the bias is constant beyond them.
    """
    # Like the originals, compute the buckets on the CPU: a GPU's logarithm may round to a neighbouring bucket.
    distances = torch.arange(-attention.max_distance, attention.max_distance + 1)
    embedding = attention.rel_attn_embed
    bias: Tensor = embedding(attention._relative_positions_bucket(distances).to(embedding.weight.device))
    return bias.t()


def padded_by_last(x: Packed, length: int) -> Tensor:  # (N, D) -> (B, length, D)
    """Pad packed frames by repeating each utterance's last frame, or with zeros if the utterance has no frame.

    Greedy CTC decoding of a whole row, padding included, then gives the text of the utterance. The padding passes no
    gradient back.

    Args:
        x: Packed frames (N, D) of B utterances.
        length: Number of frames per row of the result, at least that of the longest utterance.

    Returns:
        The padded batch, (B, length, D).
    """
    padded = x.to_padded(length=length)
    if not x.layout.total or min(x.layout.lengths) == length:
        return padded
    last = x.values.detach()[(x.layout.cu_seqlens[1:].long() - 1).clamp(min=0)]
    last = torch.where(x.layout.device_lengths.unsqueeze(1) > 0, last, 0)
    return torch.where(x.layout.valid(length).unsqueeze(2), padded, last.unsqueeze(1))
