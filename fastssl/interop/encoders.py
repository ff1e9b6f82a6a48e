"""Code shared by accelerated encoders of all libraries: when they run, and how they remove and restore padding.

Linear layers, norms and dropouts that are not plain PyTorch modules are called as they are (see `nn.functional`). If
any other module has a hook or a foreign class, the original code runs instead (see `original_runs`), unless it is of a
tool that `call_through` knows.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce, wraps
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _all_modules

from fastssl import ops
from fastssl.interop import call_through, read_only
from fastssl.interop.calls import mapped_by
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
    called_through: Iterable[nn.Module] = (),
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
        called_through: Those of `modules` that `call_through.call` runs, so that tools may have wrapped them.
        lasting: A reason for many calls, such as training. One warning per model names it.

    Raises:
        ValueError: The original must run, but the model has a compressor, which the original cannot apply.
    """
    if not hasattr(type(model), NORM):  # restored, but somebody else's wrapper still calls fastssl's forward
        return True
    if reason is None and (mapper := mapped_by()):
        reason = f"{mapper} runs the call on slices of its tensors"
    reason = reason or lasting or _hook_on_all_modules() or _foreign_code(modules, set(map(id, called_through)))
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


def _hook_on_all_modules() -> str | None:
    hooks = _all_modules._global_forward_pre_hooks, _all_modules._global_forward_hooks
    backward = _all_modules._global_backward_pre_hooks, _all_modules._global_backward_hooks
    for one in (*hooks, *backward):
        for hook in one.values():
            # PyTorch's own only look, such as those of `FlopCounterMode`.
            if not (getattr(hook, "__module__", None) or "").startswith("torch."):
                return "a hook is registered for all modules (`torch.nn.modules.module.register_module_...`)"
    return None


def _foreign_code(modules: Iterable[nn.Module], called_through: set[int]) -> str | None:
    for module in modules:
        kind, watched = type(module), F.is_watched(module)
        if isinstance(module, nn.Conv1d):
            watched = F.is_watched_convolution(module)
        elif id(module) in called_through:
            kind, watched = call_through.own_class(call_through.unwrapped(module)), call_through.is_watched(module)
        other_activation = kind.__module__ in _ACTIVATIONS and activation_name(module) != "gelu"
        if other_activation or not kind.__module__.startswith(_LIBRARIES):
            return f"a {kind.__module__}.{kind.__name__} replaces a module of the original"
        if watched:
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
        yield from (layer, layer.attention, layer.feed_forward)  # wrappers that we call through have these attributes
        yield from parts(layer.feed_forward, "intermediate_act_fn")


def front_end_not_called(model: Any) -> Iterator[nn.Module]:
    """Yield those of `modules_not_called` that belong to the encoder's convolutions."""
    if getattr(model, NORM) == "valid":
        yield model.feature_extractor
        yield from _blocks(model.feature_extractor.conv_layers)


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
    *,
    left: tuple[bool, ...] = (),
    frames_left: tuple[bool, ...] = (),
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
        left: For each row, whether its padding is before its samples instead of after them; empty if no row's is. The
            original front end, which computes the padding too, takes none.
        frames_left: The same of the padded frames that the encoder returns.

    Returns:
        The valid frames (N, C), and the number of frames F per row of the padded batch.
    """
    convolutions = list(convolutions)
    *frames, padded_frames = _after(convolutions, Layout.from_lengths([*lengths, waveforms.shape[1]])).lengths

    def use(layout: Layout) -> None:
        ask_for_padding(layout, padded_frames, frames_left)
        ask(layout, padded_frames)

    if getattr(model, NORM) == "valid" or padded_frames == 0:
        layout = Layout.planned(
            lengths, device=waveforms.device, use=lambda samples: use(_after(convolutions, samples))
        )
        after: list[Layout] = []

        def convolve(samples: Tensor) -> Tensor:  # (N, 1) -> (N_out, C)
            values, *after[:] = _convolutions(model.feature_extractor.conv_layers, Packed(samples, layout))
            return values

        values = call_through.call(model.feature_extractor, convolve, _without_padding(waveforms, lengths, left))
        return Packed(values, *after), padded_frames
    layout = Layout.planned(frames, device=waveforms.device, use=use)
    return Packed.from_padded(padded(waveforms), layout), padded_frames


def _after(convolutions: Iterable[tuple[int, int]], layout: Layout) -> Layout:
    for kernel, stride in convolutions:
        layout = layout.after_conv(kernel, stride)
    return layout


def _convolutions(blocks: Iterable[Any], x: Packed) -> Packed:  # (N, 1) -> (N_out, C)
    """Run the convolutions of a front end, fused as far as their norms are plain; call other norms."""
    for called, group in groupby(blocks, lambda block: _is_called(getattr(block, "layer_norm", None))):
        alike = list(group)
        x = reduce(_with_called_norm, alike, x) if called else F.front_end(alike, x)
    return x


def _is_called(norm: Any) -> bool:
    """Return whether the norm of a convolution does more, or something else, than what the fused op reads of it."""
    if norm is None:
        return False
    ours = type(norm).__module__.startswith(_LIBRARIES) and isinstance(norm, (nn.LayerNorm, nn.GroupNorm))
    if not ours or F.is_watched(norm) or norm.weight is None or norm.bias is None:
        return True
    return isinstance(norm, nn.GroupNorm) and norm.num_groups != norm.num_channels


def _with_called_norm(x: Packed, block: Any) -> Packed:
    """Run a convolution of a front end whose norm is called, on frames or, if it covers time, on each utterance."""
    conv = block.conv
    weight = F.convolution_weight(conv)
    out, layout = ops.strided_conv(
        x.values, weight, x.layout, stride=conv.stride[0], bias=conv.bias, norm="none", activation="none"
    )
    if type(block).__name__ == "ConvLayerBlock" or "GroupNorm" in type(block).__name__:  # its input is (B, C, T)
        rows = [row.t().unsqueeze(0) for row in out.split(list(layout.lengths)) if len(row)]
        out = torch.cat([block.layer_norm(row).squeeze(0).t() for row in rows]) if rows else out
    else:
        out = block.layer_norm(out)
    return Packed(torch.nn.functional.gelu(out), layout)


def _without_padding(waveforms: Tensor, lengths: list[int], left: tuple[bool, ...]) -> Tensor:  # (B, T) -> (N, 1)
    """Pack samples without an index per sample, if no gradient flows back to them."""
    samples = waveforms.shape[1]
    if not lengths or (waveforms.requires_grad and torch.is_grad_enabled()):
        layout = Layout.from_lengths(lengths, device=waveforms.device)
        return layout.padded_rows(samples, left).pack(waveforms.unsqueeze(2))
    rows = zip(waveforms, lengths, left or [False] * len(lengths), strict=True)
    return torch.cat([row[samples - length :] if at_end else row[:length] for row, length, at_end in rows]).unsqueeze(1)


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


def with_distance_bias(layer: Callable[[Tensor, Tensor], Tensor], attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the layer that holds WavLM's relative position bias; return its output and the bias, for the other layers."""
    bias = distance_bias(attention)
    return layer(x, bias), bias


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


def ask_for_padding(layout: Layout, length: int, left: tuple[bool, ...] = ()) -> None:
    """Ask the layout of frames for what `padded_by_last` and `Packed.to_padded` compute with it."""
    layout.padded_rows(length, left)
    _rows_of_padding(layout, length, left)


@kept_by_plan
def _rows_of_padding(layout: Layout, length: int, left: tuple[bool, ...]) -> Tensor:  # (2, P)
    """Return the rows of the padding in a padded batch, and the packed row that is repeated in each of them.

    The padding of an utterance without frames is left out.
    """
    padding = layout.map_lengths(
        lambda frames: length - frames if frames else 0, lambda frames: (length - frames) * (frames > 0)
    )
    sequences = padding.sequence_ids
    begins, repeated = layout.device_lengths, layout.cu_seqlens[1:].long() - 1
    if left:
        before = layout.padding_before(length, left) > 0
        begins, repeated = begins * ~before, torch.where(before, layout.cu_seqlens[:-1].long(), repeated)
    return torch.stack([sequences * length + begins[sequences] + padding.positions, repeated[sequences]])


def padded_by_last(x: Packed, length: int, left: tuple[bool, ...] = ()) -> Tensor:  # (N, D) -> (B, length, D)
    """Pad packed frames by repeating each utterance's last frame, or with zeros if the utterance has no frame.

    Greedy CTC decoding of a whole row, padding included, then gives the text of the utterance. For the same reason,
    padding before an utterance repeats its first frame. The padding passes no gradient back.

    Args:
        x: Packed frames (N, D) of B utterances.
        length: Number of frames per row of the result, at least that of the longest utterance.
        left: For each utterance, whether its padding is before it instead of after it; empty if no utterance's is.

    Returns:
        The padded batch, (B, length, D).
    """
    padded = x.to_padded(length=length, left=left)
    if not x.layout.total or min(x.layout.lengths) == length:
        return padded
    rows, nearest = _rows_of_padding(x.layout, length, left)
    with torch.no_grad():
        padded.flatten(0, 1).index_copy_(0, rows, x.values.index_select(0, nearest))
    return padded
