"""Fewer frames: average pooling, strided convolution, and integrate-and-fire at any rate, over packed sequences.

On Compressing Sequences (arXiv 2210.07189) and Once-for-All Sequence Compression (arXiv 2211.02332). A compressed
sequence is packed as every other is, so what follows costs as much less as there are fewer frames.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.kernels.integrate_and_fire.reference import fire_positions
from fastssl.nn.activation import sigmoid
from fastssl.nn.rates import LEAST_WEIGHT, mix_weights, rate_for_period
from fastssl.packing import Layout, Packed

Kind = Literal["average", "strided", "integrate-and-fire"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_LEAST_FRAMES = 2  # the contrastive loss needs two; a pooled utterance one
_MARGIN = 1e-4  # of a sum above a whole number, so that rounding does not lose the frame
_LARGEST_RATE = 2 - 1e-5
_REACH = 2  # frames on each side that a weight sees


class Compressed(NamedTuple):
    """What `SequenceCompressor` returns."""

    frames: Packed  # (N_out, C)
    frame_period_ms: Tensor  # (B,) float64 on the CPU: what was obtained, NaN for an utterance without frames
    weights: Tensor | None  # (N,) alpha', which were integrated: after mixing by the rate, and protected
    learned_weights: Tensor | None  # (N,) alpha in (0, 1), before mixing: for losses that guide the boundaries
    sources: Tensor  # (N,) int64, not falling: the row of `frames` that an input frame went into, or most of it
    layout: Layout  # of the N frames before

    def upsample(self, values: Tensor) -> Tensor:  # (N_out, ...) -> (N, ...)
        """Repeat what became of each frame for the input frames that went into it.

        Args:
            values: A row for each row of `frames`: these, or what a model made of them.

        Raises:
            ValueError: `values` has another number of rows.
        """
        total = self.frames.layout.total
        if values.dim() < 1 or len(values) != total:
            raise ValueError(f"values: expected ({total}, ...), got {tuple(values.shape)}")
        repeated: Tensor = _Repeat.apply(values, self.sources)
        return repeated


class _Repeat(torch.autograd.Function):
    """Rows of a tensor in rising order, each as often as it occurs; no atomics, so the gradient's bits are fixed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.rows_of_x = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        counts = rows.new_zeros(ctx.rows_of_x).scatter_add(0, rows, torch.ones_like(rows))
        summands = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        total: Tensor = torch.segment_reduce(summands, "sum", lengths=counts, axis=0, unsafe=True)
        return total.to(grad.dtype), None


class SequenceCompressor(nn.Module):
    """Shorten packed sequences: by a fixed factor, or where a learned network says and as much as the caller says.

    Kinds:
        "average": the mean of each `factor` frames; frames that fill no window are dropped.
        "strided": a convolution of kernel and stride `factor`, which starts as the average; likewise.
        "integrate-and-fire": each frame has a weight, and one frame comes out where the weights add up to 1: the
            weighted mean (`ops.integrate_and_fire`). A rate lambda in [0, 2] mixes the learned weights (arXiv
            2211.02332): lambda alpha + 1 - lambda up to 1, then (2 - lambda) alpha. 0 keeps every frame, 1 is the
            learned segmentation, 2 leaves the fewest frames. In training the rest of an utterance, less than a whole
            frame, is dropped; in evaluation a rest of at least half a frame is kept, as its weighted mean.

    One model serves every rate once it has met them in training: `rate` takes one for each utterance, for instance
    `nn.rates.draw_rates(keys, 0.0, 1.0)`, and `nn.AdaptiveRate` learns one with a task. `learned_weights` are there for
    losses that guide where frames end (`nn.segmentation`), and `weights` for one on how many there are.

    Whatever the kind, two frames survive of an utterance that has two, and one of one. Of weights that add up to less,
    the sum is raised to that; windows of an average become as small as they must; a strided convolution sees zeros
    after the utterance. Frames do not depend on batch mates, and all is differentiable, the rate too.

    Example:
        >>> import torch
        >>> from fastssl import Packed
        >>> from fastssl.nn import SequenceCompressor
        >>> frames = Packed.pack([torch.randn(300, 64), torch.randn(80, 64)])  # one every 20 ms
        >>> compressor = SequenceCompressor(64, kind="average", factor=4)
        >>> compressor(frames).frames.layout.lengths
        (75, 20)
        >>> compressor = SequenceCompressor(64, kind="integrate-and-fire").eval()
        >>> compressed = compressor(frames, frame_period_ms=50.0)
        >>> compressed.frames.layout.lengths
        (120, 32)
        >>> compressed.frame_period_ms.tolist()
        [50.0, 50.0]

    Args:
        channels: C, in and out.
        kind: "average", "strided" or "integrate-and-fire".
        factor: Of the first two: input frames to an output frame.
        input_period_ms: From one input frame to the next.

    Raises:
        ValueError: An option does not fit the kind.
    """

    def __init__(self, channels: int, *, kind: Kind, factor: int | None = None, input_period_ms: float = 20.0) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: must be 'average', 'strided' or 'integrate-and-fire', got {kind!r}")
        if (factor is None) != (kind == "integrate-and-fire"):
            raise ValueError(f"factor: 'average' and 'strided' need one, and no other kind; got {factor} for {kind!r}")
        if factor is not None and (type(factor) is not int or factor < 1):
            raise ValueError(f"factor: must be a whole number of at least 1, got {factor!r}")
        if not 0 < input_period_ms < math.inf:
            raise ValueError(f"input_period_ms: must be positive and finite, got {input_period_ms}")
        self.channels = channels
        self.kind = kind
        self.factor = factor
        self.input_period_ms = input_period_ms
        self.rate: float | Tensor | None = None
        self.frame_period_ms: float | Tensor | None = None
        if kind == "strided":
            self.conv = nn.Conv1d(channels, channels, self._window, stride=self._window)
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
            with torch.no_grad():
                self.conv.weight.copy_(torch.eye(channels).unsqueeze(2).expand_as(self.conv.weight) / self._window)
        elif kind == "integrate-and-fire":
            self.weight_network = WeightNetwork(channels)

    @property
    def _window(self) -> int:
        assert self.factor is not None
        return self.factor

    def forward(
        self,
        frames: Packed,  # (N, C)
        *,
        rate: float | Tensor | None = None,  # () or (B,)
        frame_period_ms: float | Tensor | None = None,  # () or (B,)
    ) -> Compressed:
        """Shorten each sequence.

        Args:
            frames: (N, C).
            rate: lambda, for integrate-and-fire alone: one number, or one for each utterance. A tensor takes a gradient
                and is clamped to [0, 2] instead of checked, for which the host would wait.
            frame_period_ms: The mean period to come as near as whole frames allow, at least `input_period_ms`, instead
                of a rate: each utterance's follows from the mean of its learned weights.

        Without either, the attributes `rate` and `frame_period_ms` are taken, and without these the rate is 1.

        Raises:
            ValueError: `frames` has another width, or `rate` or `frame_period_ms` is out of range, or given together,
                or to a kind that has none.
        """
        x, layout = frames
        if x.shape != (layout.total, self.channels):
            raise ValueError(f"frames: expected {(layout.total, self.channels)}, got {tuple(x.shape)}")
        if rate is None and frame_period_ms is None:
            rate, frame_period_ms = self.rate, self.frame_period_ms
        self.check(rate=rate, frame_period_ms=frame_period_ms)
        if self.kind != "integrate-and-fire":
            compress = self._average if self.kind == "average" else self._strided
            out = compress(x, layout)
            sources = _window_of_frames(layout, out.layout, self._window, shrinks=self.kind == "average")
            return Compressed(out, _period(layout, out.layout, self.input_period_ms), None, None, sources, layout)
        learned = self.weight_network(x, layout)
        rates = self._rates(learned, layout, rate, frame_period_ms)
        weights = _protect(mix_weights(learned, rates[layout.sequence_ids]), layout)
        out = Packed(*ops.integrate_and_fire(x, weights, layout)) if self.training else _fire_all(x, weights, layout)
        sources = _slot_of_frames(weights.detach(), layout, out.layout)
        return Compressed(out, _period(layout, out.layout, self.input_period_ms), weights, learned, sources, layout)

    def check(self, *, rate: float | Tensor | None, frame_period_ms: float | Tensor | None) -> None:
        """Refuse what cannot be asked for; arguments and errors as of `forward`."""
        if rate is None and frame_period_ms is None:
            return
        if self.kind != "integrate-and-fire":
            raise ValueError(f"rate and frame_period_ms: {self.kind!r} has a fixed factor, {self.factor}")
        if rate is not None and frame_period_ms is not None:
            raise ValueError(f"rate and frame_period_ms: one of them, got {rate} and {frame_period_ms}")
        name, value = ("rate", rate) if frame_period_ms is None else ("frame_period_ms", frame_period_ms)
        low, high = (0.0, 2.0) if name == "rate" else (self.input_period_ms, math.inf)
        if not isinstance(value, Tensor) and value is not None and (not low <= value <= high or math.isinf(value)):
            raise ValueError(f"{name}: must be from {low:g} to {high:g}, got {value:g}")

    def _average(self, x: Tensor, layout: Layout) -> Packed:
        out_layout = layout.map_lengths(  # whole windows, but at least as many as must survive
            lambda frames: max(frames // self._window, min(frames, _LEAST_FRAMES)),
            lambda frames: torch.maximum(frames // self._window, frames.clamp(max=_LEAST_FRAMES)),
        )
        sequence, window = out_layout.sequence_ids, out_layout.positions
        frames, windows = layout.device_lengths[sequence], out_layout.device_lengths[sequence]
        whole = frames >= windows * self._window
        first = torch.where(whole, window * self._window, window * frames // windows)
        end = torch.where(whole, first + self._window, (window + 1) * frames // windows)
        steps = first.unsqueeze(1) + torch.arange(self._window, device=x.device)  # (N_out, factor)
        within = steps < end.unsqueeze(1)
        rows = layout.rows(sequence.unsqueeze(1), torch.minimum(steps, (end - 1).unsqueeze(1))).flatten()
        gathered = x.index_select(0, rows).unflatten(0, steps.shape)
        accumulator = torch.promote_types(x.dtype, torch.float32)
        total = torch.where(within.unsqueeze(2), gathered, 0).sum(1, dtype=accumulator)
        return Packed((total / (end - first).unsqueeze(1)).to(x.dtype), out_layout)

    def _strided(self, x: Tensor, layout: Layout) -> Packed:
        # Where there is no whole window left, zeros after the utterance make it one.
        if any(frames < self._window * min(frames, _LEAST_FRAMES) for frames in layout.lengths):
            longer = layout.map_lengths(
                lambda frames: max(frames, self._window * min(frames, _LEAST_FRAMES)),
                lambda frames: torch.maximum(frames, self._window * frames.clamp(max=_LEAST_FRAMES)),
            )
            x, layout = Packed(x, layout).spread(longer)
        conv = self.conv
        return Packed(*ops.strided_conv(x, conv.weight, layout, stride=self._window, bias=conv.bias, activation="none"))

    def _rates(
        self, learned: Tensor, layout: Layout, rate: float | Tensor | None, frame_period_ms: float | Tensor | None
    ) -> Tensor:  # (B,)
        if frame_period_ms is None:
            rate = 1.0 if rate is None else rate
            return _per_utterance("rate", rate, layout, learned).clamp(0.0, _LARGEST_RATE)
        period = _per_utterance("frame_period_ms", frame_period_ms, layout, learned)
        mean_weight = layout.sums(learned) / layout.device_lengths.clamp(min=1)
        solved = rate_for_period(period.clamp(min=self.input_period_ms), mean_weight, self.input_period_ms)
        return solved.clamp(0.0, _LARGEST_RATE).to(learned.dtype)


class WeightNetwork(nn.Module):
    """A weight in (0, 1) for each frame, from itself and two frames on each side (arXiv 2211.02332).

    Convolution, layer norm, ReLU, and a linear layer with a sigmoid.

    Args:
        channels: C of the frames.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The modules hold the parameters; the op computes.
        self.conv = nn.Conv1d(channels, channels, 2 * _REACH + 1, padding=_REACH)
        self.layer_norm = nn.LayerNorm(channels)
        self.projection = nn.Linear(channels, 1)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:  # (N, C)
        """(N,) weights, in at least fp32; zeros lie beyond the ends of each sequence."""
        values, longer = Packed(x, layout).with_gaps(_REACH, _REACH)
        hidden, _ = ops.strided_conv(
            values,
            self.conv.weight,
            longer,
            stride=1,
            bias=self.conv.bias,
            norm="layer",
            norm_weight=self.layer_norm.weight,
            norm_bias=self.layer_norm.bias,
            eps=self.layer_norm.eps,
            activation="none",
        )
        accumulator = torch.promote_types(hidden.dtype, torch.float32)
        # A product with one column does not give an element the same bits anywhere in a tensor: a sum of each row does.
        direction, bias = self.projection.weight, self.projection.bias
        logits = (torch.relu(hidden).to(accumulator) * direction.to(accumulator)).sum(1) + bias.to(accumulator)
        weights = sigmoid(logits)
        return weights.clamp(min=LEAST_WEIGHT)  # where all were zero, no sum could be raised


def _per_utterance(name: str, value: float | Tensor, layout: Layout, like: Tensor) -> Tensor:  # (B,)
    batch = len(layout.lengths)
    if isinstance(value, Tensor):
        if value.shape not in ((), (batch,)):
            raise ValueError(
                f"{name}: expected a number or ({batch},), one for each utterance, got {tuple(value.shape)}"
            )
        return value.to(like).expand(batch)
    return like.new_full((batch,), value)


def _window_of_frames(layout: Layout, windows: Layout, factor: int, *, shrinks: bool) -> Tensor:
    """(N,) the row of the window that each frame lies in; what fills none counts as the last one's.

    Args:
        layout: Of the frames.
        windows: Of the windows.
        factor: Frames of a window.
        shrinks: Whether windows of short utterances become as small as they must.
    """
    sequence, position = layout.sequence_ids, layout.positions
    frames, count = layout.device_lengths[sequence], windows.device_lengths[sequence]
    of_short = ((position + 1) * count - 1) // frames
    whole = frames >= count * factor if shrinks else torch.ones_like(frames, dtype=torch.bool)
    window = torch.where(whole, position // factor, of_short)
    return windows.rows(sequence, torch.minimum(window, count - 1))


def _slot_of_frames(weights: Tensor, layout: Layout, fired: Layout) -> Tensor:
    """(N,) the row of the output frame that has the middle of each frame's weight; the last one has a dropped rest."""
    sequence = layout.sequence_ids
    ends = fire_positions(weights, layout, 1.0)
    slot = (ends - weights.double() / 2).floor().long()
    return fired.rows(sequence, torch.minimum(slot.clamp(min=0), fired.device_lengths[sequence] - 1))


def _protect(weights: Tensor, layout: Layout) -> Tensor:
    """The weights, scaled up where they would leave fewer frames than must survive."""
    sums, least = layout.sums(weights), layout.device_lengths.clamp(max=_LEAST_FRAMES).double()
    scale = torch.where(sums < least, (least + _MARGIN) / torch.where(sums < least, sums, 1.0), 1.0)
    return weights * scale.to(weights.dtype)[layout.sequence_ids]


def _fire_all(x: Tensor, weights: Tensor, layout: Layout) -> Packed:
    """Integrate-and-fire that keeps a rest of at least half a frame, as the weighted mean that other frames are."""
    sums = layout.sums(weights)  # with the bits that `integrate_and_fire` finds
    rest = sums - sums.detach().floor()
    kept = rest.detach() >= 0.5
    # A frame of zeros after the utterance completes its last slot and leaves in it what was there.
    missing = torch.where(kept, 1 + _MARGIN - rest.detach(), 0.0).to(weights.dtype)
    padded, longer = Packed(x, layout).with_gaps(0, 1)
    all_weights = Packed(weights, layout).spread(longer).values.index_copy(0, longer.cu_seqlens[1:].long() - 1, missing)
    out, out_layout = ops.integrate_and_fire(padded, all_weights, longer)
    sequence = out_layout.sequence_ids
    last = out_layout.positions == out_layout.device_lengths[sequence] - 1
    completes = torch.where(kept, rest, 1.0)[sequence]
    return Packed(out * torch.where(last, 1 / completes, 1.0).to(out.dtype).unsqueeze(1), out_layout)


def _period(before: Layout, after: Layout, input_period_ms: float) -> Tensor:
    pairs = zip(before.lengths, after.lengths, strict=True)
    periods = [input_period_ms * frames / fewer if fewer else math.nan for frames, fewer in pairs]
    return torch.tensor(periods, dtype=torch.float64)
