"""The rate of a sequence compressor, learned with a head on a task instead of tried out (arXiv 2211.02332)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.data.waveforms import waveform_batch
from fastssl.eval.probe.features import Features, FeatureStore, Standard, Waveforms
from fastssl.eval.probe.heads import (
    CLIP_NORM,
    Examples,
    Kind,
    Window,
    outputs_needed,
    prior,
    schedule,
    task_losses,
)
from fastssl.eval.probe.rate_head import FrameLengths, RateHead
from fastssl.eval.probe.run import ProbeSettings, Targets
from fastssl.eval.probe.tables import Table
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.nn.compression import Compressed
from fastssl.nn.rates import AdaptiveRate
from fastssl.packing import Layout, Packed

#: Of the rate; a head's are some thousandths.
LEARNING_RATE = 0.02
#: How far from the rate its slope is taken, on either side.
SPREAD = 0.1
#: The head's steps, over those of a probe's, which learns at one rate.
_LONGER = 3
#: Share of the steps in which the head learns alone.
_HEAD_ALONE = 0.8
_PATH = 20


class LearnedRate(NamedTuple):
    """What `learn_rates` found for a trial.

    Args:
        rate: lambda.
        frame_period_ms: What it gives on the training part, on average over the frames.
        path: The rate on the way, from where it began, at equal distances.
    """

    rate: float
    frame_period_ms: float
    path: tuple[float, ...]


class Trial(NamedTuple):
    """A rate to learn.

    Args:
        price: Of all frames, in units of the task's loss.
        start: Rate at first.
    """

    price: float
    start: float = 0.5


def learn_rates(
    encoder: SpeechEncoder,
    train: Table,
    dev: Table,
    settings: ProbeSettings,
    trials: Sequence[Trial],
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    learning_rate: float = LEARNING_RATE,
    spread: float = SPREAD,
    seed: int = 0,
    features: FeatureStore | None = None,
) -> list[LearnedRate]:
    """Learn the rate of a frozen encoder's compressor together with a probe's head.

    The loss is the task's, in nats per label, and a price times the mean of the weights that are integrated, which is
    the share of frames that is left. The head (`RateHead`) takes three times the probe's steps, at the highest of its
    learning rates, having more to learn; it sees as much time on either side as the probe's, however long frames are.
    Features are standardised by what they are at rates spread evenly between the bounds, wherever the rate begins. The
    encoder is left as it was.

    The head learns from the training part, at one rate for each batch, drawn between the bounds so that long frames
    come as often as short ones (evenly in the logarithm of their period): one that learned at the rate itself would be
    best wherever the rate happens to be. So it is the same for every price and start, and learned once for all of them.

    Rates learn from the development part, which the head does not know by heart, and in the last fifth of its steps,
    when it is nearly done. The slope that a rate follows is that between two rates around it, of the same utterances.
    The derivative at the rate itself (as `AdaptiveRate` passes it on) points anywhere: a little more of it moves every
    boundary behind by some frames, so that the loss goes up and down many times within a hundredth.

    Args:
        encoder: With an integrate-and-fire compressor, on the device where to work.
        train: What the head learns from.
        dev: What rates learn from.
        settings: The task; classification or ctc, without folds.
        trials: Prices and starts, each with a rate of its own.
        bounds: Least and most rate: those that the encoder has met in training.
        learning_rate: Of the rate, at its highest; it rises and falls as the head's does, in the steps that are left.
        spread: How far from the rate its slope is taken: for each utterance from half to three halves of it.
        seed: Of the order of examples.
        features: Keeps the frames of the front end for another call; None forgets them.

    Returns:
        What each trial comes to, whatever the others are.

    Raises:
        ValueError: The encoder has no such compressor, the settings are not for it, a number is out of range, the
            tables do not serve, or the loss is not finite.
    """
    if encoder.compressor is None or encoder.compressor.factor is not None:
        raise ValueError("rate_price: is of an encoder whose compressor is integrate-and-fire")
    if settings.resolved_task == "verification" or settings.folds is not None:
        raise ValueError("rate_price: a rate is learned for classification or ctc, and before any fold is held out")
    for trial in trials:
        if not 0 <= trial.price < math.inf:
            raise ValueError(f"rate_price: must be finite and not negative, got {trial.price}")
    if not trials:
        raise ValueError("trials: there are none")
    if not 0 < spread < math.inf:
        raise ValueError(f"spread: must be positive, got {spread}")
    kind: Kind = "ctc" if settings.resolved_task == "ctc" else "classification"
    rates = [AdaptiveRate(trial.start, low=bounds[0], high=bounds[1]) for trial in trials]
    source = _FrontEnd(encoder)
    store = FeatureStore() if features is None else features
    parts = {"train": train, "dev": dev}
    targets = Targets(parts, settings)
    examples = []
    for part, table in parts.items():
        frames = store.get(source, table, name="the front end", segment_s=settings.segment_s)
        numbers = targets.numbers[part]
        examples.append(Examples(frames, tuple(range(len(frames.rows))), tuple(numbers[row] for row in frames.rows)))
    learning = _Learning(encoder, examples[0], examples[1], kind, settings)
    prices = [trial.price for trial in trials]
    return learning.learn(rates, prices, targets.outputs, learning_rate=learning_rate, spread=spread, seed=seed)


class _FrontEnd:
    """What comes before a compressor: it is the same at every rate."""

    layers = 1

    def __init__(self, encoder: SpeechEncoder) -> None:
        self.encoder = encoder.eval()
        self.frame_period_s: float | None = None

    @property
    def key(self) -> object:
        """The encoder itself."""
        return ("front end", self.encoder)

    @torch.inference_mode()
    def __call__(self, waveforms: Waveforms) -> list[Packed]:
        """What `extract_features` returns."""
        parameter = next(self.encoder.parameters())
        values, layout = waveform_batch(waveforms, normalize=self.encoder.config.do_normalize)
        return [self.encoder.extract_features(Packed(values.to(parameter.dtype), layout).to(parameter.device))]


class _Learning:
    """Of rates from examples that are held out, with one head that learns from others."""

    def __init__(
        self, encoder: SpeechEncoder, examples: Examples, held_out: Examples, kind: Kind, settings: ProbeSettings
    ) -> None:
        self.encoder, self.kind, self.settings = encoder, kind, settings
        self.examples, self.held_out = examples, held_out
        self.period_s = encoder.config.frame_period_ms / 1000
        self.device = next(encoder.parameters()).device

    def learn(
        self,
        rates: Sequence[AdaptiveRate],
        prices: Sequence[float],
        outputs: int,
        *,
        learning_rate: float,
        spread: float,
        seed: int,
    ) -> list[LearnedRate]:
        settings = self.settings
        rates = [rate.to(self.device) for rate in rates]
        features, scale = self._features_between(rates[0].low, rates[0].high)
        standard = Standard.of(features, range(len(features.frames)), whiten=self.kind == "ctc").to(self.device)
        shares = prior(self.kind, self.examples._replace(features=features), outputs=outputs, window=self._window(1.0))
        reach = self._reach(scale.longest)
        head = RateHead(len(standard.mean), standard.mean.shape[2], shares, reach=reach).to(self.device)
        of_head = torch.optim.AdamW(head.parameters(), lr=max(settings.rates), betas=(0.9, 0.98))
        of_rates = torch.optim.Adam([rate.rate for rate in rates], lr=learning_rate, betas=(0.9, 0.98))
        steps = _LONGER * settings.steps
        alone = round(_HEAD_ALONE * steps)
        schedules = schedule(of_head, steps), schedule(of_rates, steps - alone)
        paths = [[rate().item()] for rate in rates]
        random = torch.Generator().manual_seed(seed)
        held_out = self._batches(self.held_out, seed)
        for step, batch in enumerate(islice(self._batches(self.examples, seed), steps)):
            drawn = scale.rate_at(torch.rand((), generator=random).item()).to(self.device)
            of_head.zero_grad()
            losses = self._at(batch, drawn.expand(len(batch.chosen)), head, standard, scale).losses
            loss = losses.sum() / sum(map(len, batch.targets))
            if not loss.isfinite():
                raise ValueError(f"rate_price: the loss is {loss.item()} in step {step}")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), CLIP_NORM)
            of_head.step()
            schedules[0].step()
            if step < alone:
                continue
            other = next(held_out)
            labels = sum(map(len, other.targets))
            away = spread * (0.5 + torch.rand(len(other.chosen), generator=random).to(self.device))
            for rate, price in zip(rates, prices, strict=True):
                with torch.no_grad():
                    around = [(rate() + distance).clamp(rate.low, rate.high) for distance in (-away, away)]
                    sides = [self._at(other, of_side, head, standard, scale) for of_side in around]
                rate.rate.grad = _slope(*around, *sides, labels=labels, price=price)
            of_rates.step()
            schedules[1].step()
            done, of = step - alone + 1, steps - alone
            if done * _PATH // of > (done - 1) * _PATH // of:
                for path, rate in zip(paths, rates, strict=True):
                    path.append(rate().item())
        periods_ms = [self._mean_period_ms(rate()) for rate in rates]
        return [LearnedRate(path[-1], period, tuple(path)) for path, period in zip(paths, periods_ms, strict=True)]

    def _batches(self, examples: Examples, seed: int) -> Iterator[Examples]:
        """Without end, over the examples again and again."""
        for epoch in count():
            yield from examples.batches(self.settings.batch_s, seed=1_000_003 * seed + epoch)

    def _frames(self, batch: Examples) -> Packed:
        dtype = next(self.encoder.parameters()).dtype
        return Packed.pack([batch.features.frames[example][0].to(self.device, dtype) for example in batch.chosen])

    def _at(
        self, batch: Examples, rates: Tensor, head: RateHead, standard: Standard, scale: FrameLengths
    ) -> "_AtRates":
        states, compressed = self._encode(batch, rates)
        layout = states[0].layout
        # Rounding must not make the frames of rate 0 closer to each other than they are.
        length = max(1.0, compressed.layout.total / layout.total)
        window = self._window(length)
        values, layout = _of_task(states, self.kind)
        values, layout = _with_zeros(standard(values), layout, window.reach)
        logits: Packed = head(values, layout, window=window, length=length, mixture=scale.mixture(length))
        losses = task_losses(self.kind, logits, batch.targets)
        if self.kind == "ctc":
            losses = _with_impossible(losses, logits, batch.targets)
        assert compressed.weights is not None
        return _AtRates(losses, compressed.layout.sums(compressed.weights), compressed.layout.total)

    @torch.no_grad()
    def _encode(self, batch: Examples, rate: Tensor) -> tuple[list[Packed], Compressed]:
        """Frames of each layer, and what the compressor did."""
        _, states, compressed = self.encoder.encode(self._frames(batch), rate=rate)
        assert compressed is not None
        return states, compressed

    def _window(self, length: float) -> Window:
        """For frames of such a length, in frames of the front end."""
        if self.kind == "classification":
            return Window(0, 1)
        return Window.of_seconds(self.settings.context_s, self.period_s * length)

    def _reach(self, longest: float) -> int:
        """Frames of the front end to the furthest that a window sees, up to half a frame beyond the context."""
        if self.kind == "classification":
            return 0
        context = self.settings.context_s / self.period_s
        return math.ceil(min(context + longest / 2, 2 * context))

    def _features_between(self, low: float, high: float) -> tuple[Features, FrameLengths]:
        """Of the examples, each at a rate of its own between two, and how long frames are at these."""
        found: dict[int, Tensor] = {}
        frames, weights = 0, torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self.examples.batches(self.settings.batch_s, seed=None):
            # Multiples of the golden ratio, without their whole parts, lie evenly however many there are.
            shares = torch.tensor(batch.chosen, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2) % 1
            states, compressed = self._encode(batch, (low + (high - low) * shares).float().to(self.device))
            values, layout = _of_task(states, self.kind)
            parts = values.split(list(layout.lengths), dim=1)
            found |= {example: part.half().cpu() for example, part in zip(batch.chosen, parts, strict=True)}
            assert compressed.learned_weights is not None
            frames += compressed.layout.total
            weights += compressed.learned_weights.sum(dtype=torch.float64)
        features = self.examples.features
        values_by_example = [found[example] for example in self.examples.chosen]
        # Of an utterance at least two frames are left.
        most = max(1.0, frames / len(found) / 2)
        scale = FrameLengths.between(low, high, mean_weight=weights.cpu() / frames, most=most)
        lengths = tuple(values.shape[1] for values in values_by_example)
        return replace(features, frames=values_by_example, lengths=lengths), scale

    def _mean_period_ms(self, rate: Tensor) -> float:
        before = after = 0
        for batch in self.examples.batches(self.settings.batch_s, seed=None):
            _, compressed = self._encode(batch, rate)
            before, after = before + compressed.layout.total, after + compressed.frames.layout.total
        return 1000 * self.period_s * before / after


def _with_impossible(losses: Tensor, logits: Packed, targets: Sequence[Sequence[int]]) -> Tensor:
    """(B,) nats: where too few outputs are left for a target, which costs nothing in training, what guessing costs.

    Guessed are each symbol and a blank beside it. Were it nothing, the fewest frames would be the best.
    """
    pairs = zip(logits.layout.lengths, targets, strict=True)
    guessed = [
        2 * len(target) * math.log(logits.values.shape[1]) if outputs < outputs_needed(target) else 0.0
        for outputs, target in pairs
    ]
    return losses + losses.new_tensor(guessed)


def _of_task(states: list[Packed], kind: Kind) -> tuple[Tensor, Layout]:
    """(L, N, D) that a head takes: the frames of each example, or for classification their mean."""
    values, layout = torch.stack([state.values for state in states]), states[0].layout
    if kind == "ctc":
        return values, layout
    means = [part.mean(1) for part in values.split(list(layout.lengths), dim=1)]
    return torch.stack(means, dim=1), Layout.from_lengths([1] * len(means), device=values.device)


def _with_zeros(values: Tensor, layout: Layout, reach: int) -> tuple[Tensor, Layout]:
    """(L, N, D) with so many rows of zeros before and after each example."""
    spread, longer = Packed(values.transpose(0, 1), layout).with_gaps(reach, reach)
    return spread.transpose(0, 1), longer


class _AtRates(NamedTuple):
    """A batch, each utterance at a rate of its own."""

    losses: Tensor  # (B,) nats
    weights: Tensor  # (B,) sums of those that are integrated
    frames: int  # of the front end


@torch.no_grad()
def _slope(lower: Tensor, upper: Tensor, below: _AtRates, above: _AtRates, *, labels: int, price: float) -> Tensor:
    """() of loss per label and price per frame; 0 where the bounds leave no distance."""
    change = (above.losses - below.losses).sum() / labels + price * (above.weights - below.weights).sum() / below.frames
    distance = (upper - lower).mean()
    return torch.where(distance > 0, change / distance, 0.0).to(lower.dtype)
