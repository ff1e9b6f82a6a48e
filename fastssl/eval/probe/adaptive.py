"""Learn the rate of a sequence compressor together with a probe's head, instead of by search (arXiv:2211.02332)."""

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
from fastssl.eval.probe.run import Targets
from fastssl.eval.probe.settings import ProbeSettings
from fastssl.eval.probe.tables import Table
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.nn.compression import Compressed
from fastssl.nn.rates import AdaptiveRate
from fastssl.packing import Layout, Packed

#: Default learning rate of the compressor's rate; the learning rates of the head's weights are some thousandths.
LEARNING_RATE = 0.02
#: Default distance below and above the current rate where the loss is evaluated to estimate its slope.
SPREAD = 0.1
#: Ratio of the head's steps to those of a probe's head, which learns at only one rate.
_LONGER = 3
#: Share of the steps during which only the head learns.
_HEAD_ALONE = 0.8
#: Number of values of the rate recorded after its start.
_PATH = 20


class LearnedRate(NamedTuple):
    """Result of `learn_rates` for one trial.

    Args:
        rate: The learned rate, lambda of arXiv:2211.02332.
        frame_period_ms: Mean frame period at this rate on the training part, in milliseconds.
        path: The rate during learning: its start, then values at about 20 equally spaced steps, up to the last.
    """

    rate: float
    frame_period_ms: float
    path: tuple[float, ...]


class Trial(NamedTuple):
    """A rate to learn: the price of frames, and the value to start from.

    Args:
        price: Cost of keeping all frames, in nats per label; fewer frames cost proportionally less.
        start: Initial value of the rate.
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
    """Learn the rate of a frozen encoder's compressor together with a probe's head (arXiv:2211.02332).

    The loss is the task's loss in nats per label, plus a price times the mean of the weights that the compressor
    integrates, which is the share of frames that remain. The encoder is left unchanged.

    The head (`RateHead`) is trained on the training part. Each batch uses one rate, drawn between the bounds such that
    the logarithm of the frame period is uniform. A head trained only at the current rate would favour that rate,
    whichever it is. The head therefore depends on neither price nor start, and is trained once for all trials. Because
    it has more to learn than a probe's head, it takes three times as many steps, at the highest of the probe's learning
    rates. Its context in seconds is that of the probe's head, whatever the frame period. Features are standardised with
    statistics of rates spread evenly between the bounds.

    Rates are learned on the development part, which the head has not memorised, during the last fifth of the head's
    steps, when the head is nearly done. Each rate follows the slope of the loss between two rates around it, on the
    same utterances. The derivative at the rate itself (which `AdaptiveRate` gives) is useless: a small change of the
    rate moves all later boundaries by some frames, so that the loss goes up and down many times within 0.01.

    Args:
        encoder: Encoder with an integrate-and-fire compressor, on the device to work on.
        train: Table of the training part, for the head.
        dev: Table of the development part, for the rates.
        settings: Task and hyperparameters: classification or ctc, without folds.
        trials: Prices and starts; a separate rate is learned for each.
        bounds: Lowest and highest rate; use the range that the encoder was trained with.
        learning_rate: Highest learning rate of the rates; it follows the head's schedule, within the last fifth.
        spread: Mean distance from the current rate to the two rates that its slope is measured between; the distance of
            each utterance is drawn uniformly from 0.5 to 1.5 times `spread`.
        seed: Seed of the order of examples, the rates of batches and the distances.
        features: Store that keeps the front end's frames for further calls; with None, they are not kept.

    Returns:
        A result for each trial, in order; it does not depend on the other trials.

    Raises:
        ValueError: The encoder has no integrate-and-fire compressor, the settings use verification or folds, a number
            is out of range, a table does not fit the task, or the loss is NaN or infinite.
    """
    if encoder.compressor is None or encoder.compressor.factor is not None:
        raise ValueError("rate_price: needs an encoder with an integrate-and-fire compressor; choose another model")
    if settings.resolved_task == "verification" or settings.folds is not None:
        raise ValueError(
            "rate_price: a rate can be learned only for classification or ctc, and only without folds; got task "
            f"{settings.resolved_task} and folds {settings.folds}"
        )
    for trial in trials:
        if not 0 <= trial.price < math.inf:
            raise ValueError(f"rate_price: must be finite and not negative, got {trial.price}")
    if not trials:
        raise ValueError("trials: must not be empty; give at least one price and start")
    if not 0 < spread < math.inf:
        raise ValueError(f"spread: must be positive and finite, got {spread}")
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
    """Source of the frames before the compressor, which are the same at every rate."""

    layers = 1

    def __init__(self, encoder: SpeechEncoder) -> None:
        self.encoder = encoder.eval()
        self.frame_period_s: float | None = None

    @property
    def key(self) -> object:
        """The encoder itself (modules compare by identity), marked as the source of front-end frames."""
        return ("front end", self.encoder)

    @torch.inference_mode()
    def __call__(self, waveforms: Waveforms) -> list[Packed]:
        """Return the output of `extract_features` for the waveforms (T,), as one layer of packed frames (N, D)."""
        parameter = next(self.encoder.parameters())
        values, layout = waveform_batch(waveforms, normalize=self.encoder.normalizes)
        batch = Packed(values.to(parameter.dtype), layout).to(parameter.device)
        return [self.encoder.extract_features(batch, normalize=False)]


class _Learning:
    """Trains one head on `examples`, and rates on the examples `held_out`; see `learn_rates`."""

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
            drawn = scale.rate_at(torch.rand((), generator=random, device="cpu").item()).to(self.device)
            of_head.zero_grad()
            losses = self._at(batch, drawn.expand(len(batch.chosen)), head, standard, scale).losses
            loss = losses.sum() / sum(map(len, batch.targets))
            if not loss.isfinite():
                raise ValueError(f"learning_rates: the loss is {loss.item()} in step {step}; choose lower ones")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), CLIP_NORM)
            of_head.step()
            schedules[0].step()
            if step < alone:
                continue
            other = next(held_out)
            labels = sum(map(len, other.targets))
            away = spread * (0.5 + torch.rand(len(other.chosen), generator=random, device="cpu").to(self.device))
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
        """Yield batches without end, in a new order at each pass over the examples."""
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
        # At rate 0 the length is 1; rounding must not make it less.
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
        """Encode a batch.

        Args:
            batch: B utterances.
            rate: (B,) rate of each utterance, or a () tensor for all.

        Returns:
            Packed frames (N, D) of each layer, and the output of the compressor.
        """
        _, states, compressed = self.encoder.encode(self._frames(batch), rate=rate)
        assert compressed is not None
        return states, compressed

    def _window(self, length: float) -> Window:
        """Return the head's window over frames of this mean length, in front-end frames."""
        if self.kind == "classification":
            return Window(0, 1)
        return Window.of_seconds(self.settings.context_s, self.period_s * length)

    def _reach(self, longest: float) -> int:
        """Return how far windows see to either side, in front-end frames: at most half a frame beyond the context."""
        if self.kind == "classification":
            return 0
        context = self.settings.context_s / self.period_s
        return math.ceil(min(context + longest / 2, 2 * context))

    def _features_between(self, low: float, high: float) -> tuple[Features, FrameLengths]:
        """Encode each training example at its own rate between `low` and `high`, spread evenly over the examples.

        Returns:
            Features of the examples, (L, T, D) fp16 each, and the mean lengths of frames at the two rates.
        """
        found: dict[int, Tensor] = {}
        frames, weights = 0, torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self.examples.batches(self.settings.batch_s, seed=None):
            # The fractional parts of multiples of the golden ratio are spread evenly, however many examples there are.
            shares = torch.tensor(batch.chosen, dtype=torch.float64, device="cpu") * ((math.sqrt(5) - 1) / 2) % 1
            states, compressed = self._encode(batch, (low + (high - low) * shares).float().to(self.device))
            values, layout = _of_task(states, self.kind)
            parts = values.split(list(layout.lengths), dim=1)
            found |= {example: part.half().cpu() for example, part in zip(batch.chosen, parts, strict=True)}
            assert compressed.learned_weights is not None
            frames += compressed.layout.total
            weights += compressed.learned_weights.sum(dtype=torch.float64)
        features = self.examples.features
        values_by_example = [found[example] for example in self.examples.chosen]
        # At least two frames of each utterance remain, which limits the mean length of a frame.
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
    """Add the cost of guessing to the losses (B,) of targets that need more outputs than there are.

    CTC gives such targets a loss of 0, so the fewest frames would look best. The cost, in nats, is that of drawing each
    symbol and one blank per symbol uniformly from the C outputs: 2 log C per symbol.
    """
    pairs = zip(logits.layout.lengths, targets, strict=True)
    guessed = [
        2 * len(target) * math.log(logits.values.shape[1]) if outputs < outputs_needed(target) else 0.0
        for outputs, target in pairs
    ]
    return losses + losses.new_tensor(guessed)


def _of_task(states: list[Packed], kind: Kind) -> tuple[Tensor, Layout]:
    """Return the head's input (L, N, D) and its layout: all frames for CTC, the mean of each example otherwise."""
    values, layout = torch.stack([state.values for state in states]), states[0].layout
    if kind == "ctc":
        return values, layout
    means = [part.mean(1) for part in values.split(list(layout.lengths), dim=1)]
    return torch.stack(means, dim=1), Layout.from_lengths([1] * len(means), device=values.device)


def _with_zeros(values: Tensor, layout: Layout, reach: int) -> tuple[Tensor, Layout]:
    """Put `reach` rows of zeros before and after each example of `values` (L, N, D)."""
    spread, longer = Packed(values.transpose(0, 1), layout).with_gaps(reach, reach)
    return spread.transpose(0, 1), longer


class _AtRates(NamedTuple):
    """Losses and compression of a batch of B utterances, each encoded at its own rate."""

    losses: Tensor  # (B,) in nats
    weights: Tensor  # (B,) sum of the integrated weights of each utterance, which is about its number of frames
    frames: int  # number of front-end frames of the batch


@torch.no_grad()
def _slope(lower: Tensor, upper: Tensor, below: _AtRates, above: _AtRates, *, labels: int, price: float) -> Tensor:
    """Return the slope of the loss per label plus the price of frames; 0 if the bounds leave no distance."""
    change = (above.losses - below.losses).sum() / labels + price * (above.weights - below.weights).sum() / below.frames
    distance = (upper - lower).mean()
    return torch.where(distance > 0, change / distance, 0.0).to(lower.dtype)
