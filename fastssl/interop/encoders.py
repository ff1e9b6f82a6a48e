"""Code shared by accelerated encoders of all libraries: when they run, and how they remove and restore padding.

Linear layers, norms and dropouts that are not plain PyTorch modules are called as they are (see `nn.functional`). If
any other module has a hook or a foreign class, the original code runs instead; see `original_runs`.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from fastssl.interop import read_only
from fastssl.interop.classes import NORM
from fastssl.models.folder import ACCELERATED_COMPRESSOR
from fastssl.nn import functional as F
from fastssl.nn.linear import casts_together
from fastssl.packing import Layout, Packed, kept_by_plan, send

_LIBRARIES = ("transformers.", "torchaudio.", "torch.nn.", "fastssl.")
#: Where activations are, and what those compute that fastssl's forward computes in their place.
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
_COMPUTED = {"GELUActivation": "gelu", "GELU": "gelu", "SiLUActivation": "silu", "SiLU": "silu"}


#: Models of which a warning has named a lasting reason.
_told: WeakSet[nn.Module] = WeakSet()


def original_runs(
    model: nn.Module,
    modules: Iterable[nn.Module],
    reason: str | None = None,
    layers: Iterable[Any] | None = None,
    *,
    lasting: str | None = None,
) -> bool:
    """Return whether the original `forward` must run instead of fastssl's; if so, warn why.

    Args:
        model: The accelerated encoder.
        modules: Modules whose parameters fastssl's forward reads without calling them. It would silently ignore a hook
            on one of them, or a foreign class in its place, so in these cases the original must run.
        reason: Another reason to run the original, found by the caller, or None.
        layers: The encoder's transformer layers.
        lasting: A reason for many calls, such as training. One warning per model names it.

    Raises:
        ValueError: The original must run, but the model has a compressor, which the original cannot apply.
    """
    if not hasattr(type(model), NORM):  # restored, but somebody else's wrapper still calls fastssl's forward
        return True
    reason = reason or lasting or _foreign_code(modules)
    if reason is None:
        return False
    if layers is not None and (lost := read_only.lost(model, layers)):
        reason = f"{reason} ({lost})"
    if hasattr(model, ACCELERATED_COMPRESSOR):
        raise ValueError(
            f"{reason}, but the original code cannot apply the compressor; undo this, or remove the compressor with "
            "`fastssl.restore`"
        )
    if reason is lasting:
        if model in _told:
            return True
        _told.add(model)
    warnings.warn(f"{reason}, so the original code runs, on padded batches and without acceleration", stacklevel=4)
    return True


def _foreign_code(modules: Iterable[nn.Module]) -> str | None:
    for module in modules:
        kind = type(module)
        other_activation = kind.__module__ in _ACTIVATIONS and activation_name(module) != "gelu"
        if other_activation or not kind.__module__.startswith(_LIBRARIES):
            return f"a {kind.__module__}.{kind.__name__} replaces a module of the original"
        if F.is_watched(module):
            return f"a {kind.__name__} has a hook or a replaced `forward`"
    return None


def activation_name(module: nn.Module) -> str | None:
    """Return "gelu" or "silu" if a module's class computes it without approximation, else None."""
    kind, approximate = type(module), getattr(module, "approximate", "none")
    return _COMPUTED.get(kind.__name__) if kind.__module__ in _ACTIVATIONS and approximate == "none" else None


def modules_not_called(model: Any, stack: Any) -> Iterator[nn.Module]:
    """Yield the modules that the original forward calls and fastssl's only reads.

    Args:
        model: The encoder, with `feature_extractor`.
        stack: Its transformer, with `pos_conv_embed` and `layers`.
    """
    yield from front_end_not_called(model)
    yield from (stack, stack.pos_conv_embed)
    yield from _blocks(getattr(stack.pos_conv_embed, "layers", [stack.pos_conv_embed]))
    for layer in stack.layers:
        yield from (layer, layer.attention, layer.feed_forward)
        yield from parts(layer.feed_forward, "intermediate_act_fn")


def front_end_not_called(model: Any) -> Iterator[nn.Module]:
    """Yield those of `modules_not_called` that belong to the encoder's convolutions."""
    if getattr(model, NORM) == "valid":
        yield model.feature_extractor
        yield from _blocks(model.feature_extractor.conv_layers)
        for block in model.feature_extractor.conv_layers:
            yield from parts(block, "layer_norm")


def _blocks(blocks: Iterable[Any]) -> Iterator[nn.Module]:
    for block in blocks:
        yield from (block, block.conv)
        yield from parts(block, "activation", "padding")


def parts(module: nn.Module, *names: str) -> Iterator[nn.Module]:
    """Yield those of the named submodules that the module has."""
    for name in names:
        if (part := module._modules.get(name)) is not None:
            yield part


def front_end(
    model: Any,
    waveforms: Tensor,  # (B, T)
    lengths: list[int],
    convolutions: Iterable[tuple[int, int]],
    padded: Callable[[Tensor], Tensor],
    ask: Callable[[Layout, int], object],
) -> tuple[Packed, int]:
    """Run an encoder's convolutions on a padded batch and pack the valid frames.

    The layouts of the whole encoder are planned here: on a GPU, they and their indices are one copy, for which the host
    does not wait (`Layout.plan`).

    Args:
        model: The encoder.
        waveforms: (B, T) samples.
        lengths: B numbers of valid samples.
        convolutions: Kernel size and stride of each convolution, from first to last.
        padded: The original front end, (B, T) to (B, F, C). It runs if the encoder's norm is "padded" and F is not 0,
            which the original refuses.
        ask: Function that asks the layout of the frames for what the encoder computes with it, given F.

    Returns:
        The valid frames (N, C), and the number of frames F per row of the padded batch.
    """
    convolutions = list(convolutions)
    *frames, padded_frames = _after(convolutions, Layout.from_lengths([*lengths, waveforms.shape[1]])).lengths

    def use(layout: Layout) -> None:
        ask_for_padding(layout, padded_frames)
        ask(layout, padded_frames)

    if getattr(model, NORM) == "valid" or padded_frames == 0:
        layout = Layout.planned(
            lengths, device=waveforms.device, use=lambda samples: use(_after(convolutions, samples))
        )
        samples = Packed(_without_padding(waveforms, lengths), layout)
        return F.front_end(model.feature_extractor.conv_layers, samples), padded_frames
    layout = Layout.planned(frames, device=waveforms.device, use=use)
    return Packed.from_padded(padded(waveforms), layout), padded_frames


def _after(convolutions: Iterable[tuple[int, int]], layout: Layout) -> Layout:
    for kernel, stride in convolutions:
        layout = layout.after_conv(kernel, stride)
    return layout


def _without_padding(waveforms: Tensor, lengths: list[int]) -> Tensor:  # (B, T) -> (N, 1)
    """Pack samples without an index per sample, if no gradient flows back to them."""
    if not lengths or (waveforms.requires_grad and torch.is_grad_enabled()):
        return Packed.from_padded(waveforms.unsqueeze(2), lengths).values
    return torch.cat([row[:length] for row, length in zip(waveforms, lengths, strict=True)]).unsqueeze(1)


def ask_for_transformer(model: Any, stack: Any, layout: Layout) -> None:
    """Ask the layout of the projected frames for what the compressor computes with it, or else the transformer."""
    ask_for_layers(model, partial(ask_for_positions, stack), layout)


def ask_for_layers(model: Any, ask: Callable[[Layout], object], layout: Layout) -> None:
    """Ask the layout of a compressor's input for what the compressor computes with it; without one, call `ask`."""
    compressor = getattr(model, ACCELERATED_COMPRESSOR, None)
    if compressor is None:
        ask(layout)
    else:
        compressor.ask(layout)


def ask_for_positions(stack: Any, layout: Layout) -> None:
    """Ask a layout for what the positional embedding of a stack of layers computes with it."""
    layout.ask_for_indices()
    for block in getattr(stack.pos_conv_embed, "layers", [stack.pos_conv_embed]):
        layout.rows_with_gaps(0, block.conv.kernel_size[0] // 2)


def sharing_casts(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an encoder's forward pass: on a GPU under autocast, its linear layers are cast in one launch."""

    @wraps(forward)
    def run(model: nn.Module, *args: Any, **options: Any) -> Any:
        with casts_together(model):
            return forward(model, *args, **options)

    return run


def compress(
    model: nn.Module, ask: Callable[[Layout], object], frames: Packed
) -> tuple[Packed, Callable[[Tensor], Tensor]]:
    """Apply an accelerated encoder's compressor to the input of its transformer, if it has one.

    Args:
        model: The encoder.
        ask: Function that asks the layout of the compressed frames for what the transformer computes with it.
        frames: (N, D), the projected frames.

    Returns:
        The frames (M, D) for the transformer layers, and a function that repeats rows (M, D) of their outputs to
        (N, D). Without a compressor, M = N and both are unchanged.
    """
    compressor = getattr(model, ACCELERATED_COMPRESSOR, None)
    if compressor is None:
        return frames, lambda values: values
    compressed = compressor(frames)
    compressed.frames.layout.plan(ask)
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
    bias: Tensor = attention.rel_attn_embed(_buckets(attention, attention.rel_attn_embed.weight.device))
    return bias.t().contiguous()  # because every layer's op would copy it otherwise


#: The table of `_buckets` of each attention module, with what it was made for.
_tables: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Tensor]] = WeakKeyDictionary()


def _buckets(attention: Any, device: torch.device) -> Tensor:
    """Return WavLM's bucket of each distance from -R to R, (2R + 1,) int64 on a device; made once per module."""
    made_for = type(attention), attention.num_buckets, attention.max_distance, device
    known = _tables.get(attention)
    if known is None or known[0] != made_for:
        with torch.inference_mode(mode=False):  # autograd saves no inference tensors
            # Like the originals, compute on the CPU: a GPU's logarithm may round to a neighbouring bucket.
            distances = torch.arange(-attention.max_distance, attention.max_distance + 1, device="cpu")
            (table,) = send([attention._relative_positions_bucket(distances)], device)
        _tables[attention] = known = made_for, table
    return known[1]


def ask_for_padding(layout: Layout, length: int) -> None:
    """Ask the layout of frames for what `padded_by_last` and `Packed.to_padded` compute with it."""
    layout.padded_rows(length)
    _rows_of_padding(layout, length)


@kept_by_plan
def _rows_of_padding(layout: Layout, length: int) -> Tensor:  # (2, P)
    """Return the rows of the padding in a padded batch, and the packed row that is repeated in each of them.

    The padding of an utterance without frames is left out.
    """
    padding = layout.map_lengths(
        lambda frames: length - frames if frames else 0, lambda frames: (length - frames) * (frames > 0)
    )
    sequences = padding.sequence_ids
    rows = sequences * length + layout.device_lengths[sequences] + padding.positions
    return torch.stack([rows, layout.cu_seqlens[1:].long()[sequences] - 1])


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
    rows, last = _rows_of_padding(x.layout, length)
    with torch.no_grad():
        padded.flatten(0, 1).index_copy_(0, rows, x.values.index_select(0, last))
    return padded
