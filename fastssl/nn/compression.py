"""Sequence compression: shorten packed sequences by average pooling, strided convolution or integrate-and-fire.

From On Compressing Sequences (arXiv 2210.07189) and Once-for-All Sequence Compression (arXiv 2211.02332). The result is
packed again, so the cost of the layers after it falls with the number of frames.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.kernels.autograd import is_transformed
from fastssl.kernels.integrate_and_fire.op import integrate
from fastssl.nn.activation import sigmoid
from fastssl.nn.rates import LEAST_WEIGHT, mix_weights, rate_for_period
from fastssl.packing import Layout, Packed

Kind = Literal["average", "strided", "integrate-and-fire"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_LEAST_FRAMES = 2  # fewest frames to leave (one if the utterance has one): the contrastive loss needs two
_MARGIN = 1e-4  # sums are raised this far above a whole number, so that rounding does not lose a frame
_LARGEST_RATE = 2 - 1e-5  # at 2 all weights are zero and cannot be scaled up
_REACH = 2  # frames on each side from which the weight network computes a weight


@dataclass(frozen=True, eq=False)
class Compressed:
    """Result of `SequenceCompressor`: N_out frames made from N input frames.

    Attributes:
        frames: (N_out, C) compressed frames.
        frame_period_ms: (B,) float64 on the CPU, the mean frame period of each utterance after compression; NaN for an
            utterance without frames.
        weights: (N,) alpha', the weights that were integrated. They are mixed by the rate, and scaled up if too few
            frames would be left. None unless the kind is integrate-and-fire.
        learned_weights: (N,) alpha in (0, 1), the weights before mixing, for losses that guide the boundaries. None
            unless the kind is integrate-and-fire.
        layout: Layout of the N input frames.
    """

    frames: Packed  # (N_out, C)
    frame_period_ms: Tensor  # (B,)
    weights: Tensor | None  # (N,)
    learned_weights: Tensor | None  # (N,)
    layout: Layout
    _find_sources: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def sources(self) -> Tensor:  # (N,)
        """(N,) int64, the row of `frames` that received each input frame, or most of it. Rows never decrease.

        They are computed when they are first asked for, because many objectives do not need them.
        """
        with torch.no_grad(), torch.inference_mode(mode=False):  # autograd saves no inference tensors for `upsample`
            return self._find_sources()

    def upsample(self, values: Tensor) -> Tensor:  # (N_out, ...) -> (N, ...)
        """Repeat the row of each compressed frame for each input frame that it was made from.

        Args:
            values: (N_out, ...) one row per compressed frame, such as the output of a model on `frames`.

        Returns:
            (N, ...) one row per input frame, in the dtype of `values`.

        Raises:
            ValueError: `values` does not have N_out rows.
        """
        total = self.frames.layout.total
        if values.dim() < 1 or len(values) != total:
            raise ValueError(f"values: expected ({total}, ...), got {tuple(values.shape)}")
        if is_transformed():
            return values.index_select(0, self.sources)
        repeated: Tensor = _Repeat.apply(values, self.sources)
        return repeated


class _Repeat(torch.autograd.Function):
    """`x.index_select(0, rows)` for sorted `rows`. The gradient is summed without atomics, so it is deterministic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.rows_of_x = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        counts = rows.new_zeros(ctx.rows_of_x).scatter_add(0, rows, torch.ones_like(rows))
        # At least two dimensions, because PyTorch adds those of one in an order that depends on the whole batch.
        summands = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous().unsqueeze(-1)
        total: Tensor = torch.segment_reduce(summands, "sum", lengths=counts, axis=0, unsafe=True)
        return total.squeeze(-1).to(grad.dtype), None


class SequenceCompressor(nn.Module):
    """Shorten packed sequences, by a fixed factor or by a learned segmentation at a rate that the caller chooses.

    Kinds:
        "average": the mean of every `factor` frames. Frames after the last whole window are dropped.
        "strided": a convolution with kernel and stride `factor`, initialised to the average. Frames after the last
            whole window are dropped.
        "integrate-and-fire": a network gives each frame a weight. Each time the weights add up to 1, the weighted sum
            of the frames becomes one output frame (`ops.integrate_and_fire`). A rate lambda in [0, 2] mixes the learned
            weights alpha (arXiv 2211.02332). The mixed weights are lambda alpha + 1 - lambda for lambda up to 1, and
            (2 - lambda) alpha above. Rate 0 keeps every frame, 1 gives the learned segmentation, and 2 leaves the
            fewest frames. The weights left at the end of an utterance add up to less than 1. Training drops that
            remainder; evaluation keeps it as a weighted mean if its weights add up to at least 0.5.

    One model can run at every rate that it was trained with. To train for many rates, pass one rate per utterance, for
    example `nn.rates.draw_rates(keys, 0.0, 1.0)`; `nn.AdaptiveRate` learns a rate together with a task. Use
    `Compressed.learned_weights` for losses that guide where frames end (`nn.segmentation`), and `Compressed.weights`
    for losses on the number of frames.

    Every kind leaves at least two frames of an utterance with two or more, and one frame of an utterance with one. To
    do so, integrate-and-fire scales up weights with a smaller sum, the average shrinks its windows, and the strided
    convolution reads zeros after the utterance. An utterance's frames do not depend on the rest of the batch; if one of
    them is NaN or infinite, integrate-and-fire keeps all frames of that utterance. Gradients flow to the frames, the
    parameters and the rate.

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
        channels: C, the number of channels of the input and output frames.
        kind: "average", "strided" or "integrate-and-fire".
        factor: Number of input frames per output frame. Required for "average" and "strided", not allowed otherwise.
        input_period_ms: Time from one input frame to the next, in milliseconds.

    Raises:
        ValueError: `kind` is unknown, `factor` is missing, invalid or not allowed for the kind, or `input_period_ms` is
            not positive and finite.
    """

    def __init__(self, channels: int, *, kind: Kind, factor: int | None = None, input_period_ms: float = 20.0) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: must be 'average', 'strided' or 'integrate-and-fire', got {kind!r}")
        if (factor is None) != (kind == "integrate-and-fire"):
            raise ValueError(f"factor: 'average' and 'strided' need one, others take none; got {factor} for {kind!r}")
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
                self.conv.weight.zero_().diagonal().fill_(1.0).div_(self._window)
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

        `rate` and `frame_period_ms` are for integrate-and-fire only; give at most one. If both are None, the attributes
        of the same names apply; if those are None too, the rate is 1.

        Args:
            frames: (N, C) packed frames.
            rate: lambda in [0, 2]: a number, a () tensor, or a (B,) tensor with one rate per utterance. A tensor can
                receive a gradient. It is clamped to [0, 2] rather than checked, because a check would make the host
                wait.
            frame_period_ms: Target mean frame period in milliseconds, at least `input_period_ms`: a number, or a () or
                (B,) tensor. The rate of each utterance is solved from the mean of its learned weights. The target is
                met only approximately, because the number of frames is an integer.

        Returns:
            The compressed frames, in the dtype of `frames`, with the weights and sources that they were made from.

        Raises:
            ValueError: `frames` does not have C channels; `rate` and `frame_period_ms` are both given; or one of them
                has the wrong shape, is out of range, or is given for a kind with a fixed factor.
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
            find = partial(_window_of_frames, layout, out.layout, self._window, shrinks=self.kind == "average")
            return Compressed(out, _period(layout, out.layout, self.input_period_ms), None, None, layout, find)
        learned = self.weight_network(x, layout)
        rates = self._rates(learned, layout, rate, frame_period_ms)
        weights = mix_weights(learned, rates[layout.sequence_ids])
        weights = _protect(_without_nan(weights, learned, layout), layout)
        out, ends = _fire(x, weights, layout) if self.training else _fire_all(x, weights, layout)
        find = partial(_slot_of_frames, weights.detach(), ends, layout, out.layout)
        return Compressed(out, _period(layout, out.layout, self.input_period_ms), weights, learned, layout, find)

    def ask(self, layout: Layout) -> None:
        """Ask a layout for all that `forward` computes with it, for `Layout.plan`.

        Args:
            layout: Layout of the frames that `forward` gets.
        """
        layout.ask_for_indices()
        if self.kind == "integrate-and-fire":
            layout.rows_with_gaps(_REACH, _REACH)
            layout.with_gaps(_REACH, _REACH).after_conv(2 * _REACH + 1, 1)
            _ = layout.rows_by_step
            if not self.training:
                layout.rows_with_gaps(0, 1)

    def check(self, *, rate: float | Tensor | None, frame_period_ms: float | Tensor | None) -> None:
        """Check the arguments of `forward` without running it.

        Args:
            rate: As in `forward`.
            frame_period_ms: As in `forward`.

        Raises:
            ValueError: A number is out of range or given for a kind with a fixed factor, or both are given.
        """
        if rate is None and frame_period_ms is None:
            return
        if self.kind != "integrate-and-fire":
            raise ValueError(f"rate and frame_period_ms: {self.kind!r} has a fixed factor, {self.factor}")
        if rate is not None and frame_period_ms is not None:
            raise ValueError(f"rate and frame_period_ms: give one of the two, got {rate} and {frame_period_ms}")
        name, value = ("rate", rate) if frame_period_ms is None else ("frame_period_ms", frame_period_ms)
        low, high = (0.0, 2.0) if name == "rate" else (self.input_period_ms, math.inf)
        if not isinstance(value, Tensor) and value is not None and (not low <= value <= high or math.isinf(value)):
            raise ValueError(f"{name}: must be from {low:g} to {high:g}, got {value:g}")

    def _average(self, x: Tensor, layout: Layout) -> Packed:
        """Average each window; the windows of short utterances are smaller and divide the utterance evenly."""
        out_layout = layout.map_lengths(  # whole windows, but at least the fewest frames allowed
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
        """Convolve with one output frame per window."""
        # Add zeros after utterances that are too short for the fewest frames allowed.
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
        """Return the rate of each utterance, as given or solved for the frame period."""
        if frame_period_ms is None:
            rate = 1.0 if rate is None else rate
            return _per_utterance("rate", rate, layout, learned).clamp(0.0, _LARGEST_RATE)
        period = _per_utterance("frame_period_ms", frame_period_ms, layout, learned)
        mean_weight = layout.sums(learned) / layout.divisors
        solved = rate_for_period(period.clamp(min=self.input_period_ms), mean_weight, self.input_period_ms)
        return solved.clamp(0.0, _LARGEST_RATE).to(learned.dtype)


class WeightNetwork(nn.Module):
    """Computes a weight in (0, 1) for each frame, from the frame and two frames on each side (arXiv 2211.02332).

    The network is a convolution with kernel 5, layer norm, ReLU, and a linear layer with one output and a sigmoid.

    Args:
        channels: C, the number of channels of a frame.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # These modules only hold parameters; `forward` computes with an op.
        self.conv = nn.Conv1d(channels, channels, 2 * _REACH + 1, padding=_REACH)
        self.layer_norm = nn.LayerNorm(channels)
        self.projection = nn.Linear(channels, 1)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:  # (N, C)
        """Compute the weight of each frame.

        Args:
            x: (N, C) packed frames. The convolution sees zeros beyond the ends of each sequence.
            layout: Where each sequence begins.

        Returns:
            (N,) weights in at least fp32.
        """
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
        # Multiply and sum each row, because the bits of a matrix product with one column depend on where the row is.
        direction, bias = self.projection.weight, self.projection.bias
        logits = (torch.relu(hidden).to(accumulator) * direction.to(accumulator)).sum(1) + bias.to(accumulator)
        weights = sigmoid(logits)
        return weights.clamp(min=LEAST_WEIGHT)  # because `_protect` cannot scale up a sum of zero


def _per_utterance(name: str, value: float | Tensor, layout: Layout, like: Tensor) -> Tensor:  # (B,)
    """Expand a number or a () or (B,) tensor to (B,), in the dtype and on the device of `like`."""
    batch = len(layout.lengths)
    if isinstance(value, Tensor):
        if value.shape not in ((), (batch,)):
            raise ValueError(
                f"{name}: expected a number or shape ({batch},), one per utterance, got {tuple(value.shape)}"
            )
        return value.to(like).expand(batch)
    return like.new_full((batch,), value)


def _window_of_frames(layout: Layout, windows: Layout, factor: int, *, shrinks: bool) -> Tensor:
    """Return the row of the window that contains each frame, (N,); frames after the last window get the last row.

    Args:
        layout: Layout of the frames.
        windows: Layout of the windows.
        factor: Number of frames per window.
        shrinks: Whether the windows of short utterances are smaller than `factor`.
    """
    sequence, position = layout.sequence_ids, layout.positions
    frames, count = layout.device_lengths[sequence], windows.device_lengths[sequence]
    of_short = ((position + 1) * count - 1) // frames
    whole = frames >= count * factor if shrinks else torch.ones_like(frames, dtype=torch.bool)
    window = torch.where(whole, position // factor, of_short)
    return windows.rows(sequence, torch.minimum(window, count - 1))


def _slot_of_frames(weights: Tensor, ends: Tensor, layout: Layout, fired: Layout) -> Tensor:
    """Return the row that received the middle of each frame's weight, (N,); for a dropped remainder, the last row.

    `ends` (N,) is where each frame ends, in output frames.
    """
    sequence = layout.sequence_ids
    slot = (ends - weights.double() / 2).floor().long()
    return fired.rows(sequence, torch.minimum(slot.clamp(min=0), fired.device_lengths[sequence] - 1))


def _without_nan(weights: Tensor, learned: Tensor, layout: Layout) -> Tensor:
    """Let every frame of an utterance fire if one has a learned weight of NaN, as a NaN or infinite frame has.

    `integrate_and_fire` would refuse the whole batch. This way, only that utterance's frames are not finite.
    """
    return torch.where(layout.sums(learned).isnan()[layout.sequence_ids], 1.0, weights)


def _protect(weights: Tensor, layout: Layout) -> Tensor:
    """Scale up the weights of utterances that would be left with fewer than `_LEAST_FRAMES` frames."""
    sums, least = layout.sums(weights), layout.device_lengths.clamp(max=_LEAST_FRAMES).double()
    short = sums < least
    scale = torch.where(short, (least + _MARGIN) / torch.where(short, sums, 1.0), 1.0)
    return weights * scale.to(weights.dtype)[layout.sequence_ids]


def _fire(x: Tensor, weights: Tensor, layout: Layout) -> tuple[Packed, Tensor]:
    """Integrate and fire. Return the output, and where each frame ends (N,), in output frames."""
    out, out_layout, ends = integrate(x, weights, layout)
    return Packed(out, out_layout), ends


def _fire_all(x: Tensor, weights: Tensor, layout: Layout) -> tuple[Packed, Tensor]:
    """Like `_fire`, but keep a remainder of weight 0.5 or more, as the weighted mean of its frames."""
    sums = layout.sums(weights)  # bit for bit the sums that `integrate_and_fire` computes
    rest = sums - sums.detach().floor()
    kept = rest.detach() >= 0.5
    # Append a frame of zeros to each utterance. Its weight completes the last slot; its values add nothing.
    missing = torch.where(kept, 1 + _MARGIN - rest.detach(), 0.0).to(weights.dtype)
    padded, longer = Packed(x, layout).with_gaps(0, 1)
    spread = Packed(weights, layout).with_gaps(0, 1).values
    all_weights = spread.index_copy(0, longer.cu_seqlens[1:].long() - 1, missing)
    (out, out_layout), all_ends = _fire(padded, all_weights, longer)
    sequence = out_layout.sequence_ids
    last = out_layout.positions == out_layout.device_lengths[sequence] - 1
    completes = torch.where(kept, rest, 1.0)[sequence]
    out = out * torch.where(last, 1 / completes, 1.0).to(out.dtype).unsqueeze(1)
    ends = all_ends.index_select(0, longer.rows(layout.sequence_ids, layout.positions))
    return Packed(out, out_layout), ends


def _period(before: Layout, after: Layout, input_period_ms: float) -> Tensor:  # (B,)
    """Return the mean frame period (ms) of each utterance after compression."""
    pairs = zip(before.lengths, after.lengths, strict=True)
    periods = [input_period_ms * frames / fewer if fewer else math.nan for frames, fewer in pairs]
    return torch.tensor(periods, dtype=torch.float64, device="cpu")
