"""Linear heads on a learned weighted sum of frozen layers: definition, training and evaluation."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastssl.eval.probe.features import Features, Standard
from fastssl.eval.probe.scores import edit_distance
from fastssl.packing import Layout, Packed

Kind = Literal["classification", "ctc"]
BLANK = 0
#: Share of the steps during which the learning rate rises. Adam's first steps are as long as later ones, but follow the
#: gradient of a single batch.
_WARM_UP = 0.05
#: Norm that a head's gradient is clipped to. Without clipping, the CTC heads of some encoders fall back to predicting
#: only blanks at the higher learning rates.
CLIP_NORM = 0.3
#: Shortest period of a head's outputs, in seconds.
_LEAST_PERIOD_S = 0.02


class Window(NamedTuple):
    """The window of frames that one output of a head sees.

    Args:
        reach: Number of frames on either side of the middle one.
        stride: Number of frames from one output to the next.
    """

    reach: int
    stride: int

    @classmethod
    def of_seconds(cls, context_s: float, frame_period_s: float) -> "Window":
        """Return the window that reaches about `context_s` to either side, with an output about every 20 ms.

        Args:
            context_s: Context on either side, in seconds, rounded to whole frames.
            frame_period_s: Frame period in seconds; if it is longer than 20 ms, each frame has an output.
        """
        # Round half a frame down: 0.1 s are two frames of 40 ms.
        reach = math.ceil(context_s / frame_period_s - 0.5 - 1e-6)
        return cls(reach, max(1, math.floor(_LEAST_PERIOD_S / frame_period_s + 1e-6)))

    def outputs(self, frames: int) -> int:
        """Return the number of outputs of a head.

        Args:
            frames: Number of frames, at least 1.
        """
        return (frames - 1) // self.stride + 1


class Examples(NamedTuple):
    """Examples that a head is trained or evaluated on.

    Args:
        features: Features of one source and table.
        chosen: Numbers of the examples to use.
        targets: Target of each chosen example: its class as the only element, or the numbers of its symbols.
    """

    features: Features
    chosen: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]

    def batches(self, batch_s: float, *, seed: int | None) -> Iterator["Examples"]:
        """Iterate once over the examples in batches.

        Args:
            batch_s: Audio per batch in seconds; a batch is complete once it has at least this much.
            seed: Seed of the shuffle; None keeps the order.
        """
        order = list(range(len(self.chosen)))
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(order), generator=generator, device="cpu").tolist()
        batch: list[int] = []
        total_s = 0.0
        for index in order:
            batch.append(index)
            total_s += self.features.seconds[self.chosen[index]]
            if total_s >= batch_s:
                yield self._part(batch)
                batch, total_s = [], 0.0
        if batch:
            yield self._part(batch)

    def feasible(self, window: Window) -> "Examples":
        """Return the examples with enough outputs for CTC to emit their targets.

        Args:
            window: Window of the head, which determines the number of outputs.
        """
        return self._part(
            [
                index
                for index, (example, target) in enumerate(zip(self.chosen, self.targets, strict=True))
                if window.outputs(self.features.frames[example].shape[1]) >= outputs_needed(target)
            ]
        )

    def _part(self, indices: Sequence[int]) -> "Examples":
        chosen, targets = (tuple(values[index] for index in indices) for values in (self.chosen, self.targets))
        return Examples(self.features, chosen, targets)  # type: ignore[arg-type]

    def gather(self, standard: Standard, reach: int) -> tuple[Tensor, Layout]:
        """Concatenate and standardise the frames of the examples, on the device of `standard`.

        Args:
            standard: Standardisation to apply.
            reach: Number of rows of zeros (the mean) to put before and after each example.

        Returns:
            Values (L, N, D) fp32, and the layout of the N rows, which include the zeros.
        """
        frames = [self.features.frames[example] for example in self.chosen]
        device = standard.mean.device
        layout = Layout.from_lengths([part.shape[1] + 2 * reach for part in frames], device=device)
        values = torch.zeros(len(frames[0]), layout.total, frames[0].shape[2], device=device)
        for part, first in zip(frames, layout.offsets, strict=False):
            values[:, first + reach : first + reach + part.shape[1]] = standard(part.to(device))
        return values, layout


def outputs_needed(target: Sequence[int]) -> int:
    """Return the number of outputs that CTC needs: one per symbol, and a blank between two equal neighbours.

    Args:
        target: Numbers of the symbols.
    """
    return len(target) + sum(one == other for one, other in pairwise(target))


class Head(nn.Module):
    """Probe head: softmax-weighted sum of layers, then a linear map of a window of frames.

    It is initialised as the best head that ignores its input: weights of zero, and the logarithm of `prior` as bias.
    With random weights, CTC would spend a thousand steps on unlearning them and on finding that most outputs are blank.

    Args:
        layers: Number of layers, L.
        width: Dimension of the frames, D.
        prior: (C,) share of each class, or for CTC of the blank and each symbol, among the outputs.
        window: Frames that each output sees.
    """

    def __init__(self, layers: int, width: int, prior: Tensor, window: Window) -> None:
        super().__init__()
        self.window = window
        self.layer_logits = nn.Parameter(torch.zeros(layers))
        self.weight = nn.Parameter(torch.zeros(len(prior), width, 2 * window.reach + 1))
        self.bias = nn.Parameter(prior.clamp(min=1e-6).log())

    @property
    def layer_weights(self) -> Tensor:  # (L,)
        """(L,) weights of the layers in the sum; they are positive and add up to 1."""
        return self.layer_logits.softmax(0)

    def forward(self, values: Tensor, layout: Layout) -> Packed:  # (L, N, D) -> (N_out, C)
        """Compute the logits of a batch of examples.

        Args:
            values: (L, N, D) standardised frames, with `window.reach` rows of zeros before and after each example.
            layout: Layout of the N rows, where the rows of zeros belong to their examples.

        Returns:
            Packed logits (N_out, C).
        """
        mixed = (self.layer_weights @ values.flatten(1)).view(values.shape[1:])
        return convolve(mixed, self.weight, self.bias, layout, stride=self.window.stride)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, layout: Layout, *, stride: int) -> Packed:
    """Convolve each example of a packed batch on its own, without padding.

    With few output channels, it is cheaper to multiply each frame by the weights of all K taps and then add up the
    products for each output than to copy windows side by side, as `ops.strided_conv` does.

    Args:
        x: (N, D) frames.
        weight: (C, D, K) weights.
        bias: (C,) bias.
        layout: Layout of the N frames.
        stride: Number of frames from one output to the next.

    Returns:
        Packed outputs (N_out, C).
    """
    channels, width, taps = weight.shape
    out_layout = layout.after_conv(taps, stride)
    rows = layout.rows(out_layout.sequence_ids, stride * out_layout.positions)
    by_tap = x @ weight.permute(1, 2, 0).reshape(width, taps * channels)
    return Packed(_Diagonals.apply(by_tap, taps).index_select(0, rows) + bias, out_layout)


class _Diagonals(torch.autograd.Function):
    """Sums along diagonals, (N, K C) -> (N - K + 1, C): output n is the sum over k of block k of row n + k."""

    @staticmethod
    def forward(ctx: Any, by_tap: Tensor, taps: int) -> Tensor:
        rows, row = by_tap.shape
        ctx.taps = taps
        return by_tap.as_strided((rows - taps + 1, taps, row // taps), (row, row + row // taps, 1)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, channels = grad.shape
        row = ctx.taps * channels
        by_tap = grad.new_zeros(rows + ctx.taps - 1, row)
        by_tap.as_strided((rows, ctx.taps, channels), (row, row + channels, 1)).copy_(grad.unsqueeze(1))
        return by_tap, None


def prior(kind: Kind, examples: Examples, *, outputs: int, window: Window) -> Tensor:
    """Return the share of each class among the targets or, for CTC, of the blank and each symbol among the outputs.

    For CTC, each symbol is assumed to take one output, and blanks all others.

    Args:
        kind: "classification" or "ctc".
        examples: Training examples.
        outputs: Number of classes, or of symbols and the blank, C.
        window: Window of the head, which determines the number of outputs per example.

    Returns:
        (C,) fp32 shares with a sum of 1.
    """
    counts = torch.bincount(
        torch.tensor([n for target in examples.targets for n in target], device="cpu"), minlength=outputs
    )
    places = sum(window.outputs(examples.features.frames[example].shape[1]) for example in examples.chosen)
    if kind == "ctc":
        counts[BLANK] = places - counts.sum()
    return counts / places


def task_loss(kind: Kind, logits: Packed, targets: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean loss of a batch in nats per label, as a () tensor.

    Args:
        kind: "classification" (cross-entropy) or "ctc".
        logits: Packed logits (N_out, C).
        targets: Target of each of the B examples; one that CTC cannot emit adds a loss of 0.
    """
    return task_losses(kind, logits, targets).sum() / sum(map(len, targets))


def task_losses(kind: Kind, logits: Packed, targets: Sequence[Sequence[int]]) -> Tensor:
    """Return the (B,) losses of the examples in nats; the arguments are those of `task_loss`."""
    flat = torch.tensor([label for target in targets for label in target], device=logits.values.device)
    if kind == "classification":
        return F.cross_entropy(logits.values, flat, reduction="none")
    return F.ctc_loss(
        logits.to_padded().log_softmax(2).transpose(0, 1),
        flat,
        torch.tensor(logits.layout.lengths, device="cpu"),
        torch.tensor([len(target) for target in targets], device="cpu"),
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule that raises the learning rates linearly over 5 % of the steps, then lowers them linearly to 0.

    Args:
        optimizer: Optimiser whose learning rates are the maxima.
        steps: Number of steps in total.
    """
    rise = max(1, round(_WARM_UP * steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )


class Judged(NamedTuple):
    """Evaluation of a head on one part.

    Args:
        error_rate: Edits per label; with one label per example, the share of examples classified wrongly.
        loss: Loss in nats per label.
    """

    error_rate: float
    loss: float


class Learner:
    """Trains one head per learning rate, all on the same batches.

    Args:
        kind: "classification" (one output per example) or "ctc".
        outputs: Number of classes, or of symbols and the blank, C.
        window: Frames that each output sees.
        rates: Highest learning rates of AdamW; see `schedule`.
        standard: Standardisation computed on the training part.
        name: Name of the encoder for error messages.
    """

    def __init__(
        self,
        kind: Kind,
        outputs: int,
        window: Window,
        *,
        rates: Sequence[float],
        standard: Standard,
        name: str,
    ) -> None:
        self.kind, self.outputs, self.window, self.rates, self.name = kind, outputs, window, rates, name
        self.standard = standard
        self.heads: list[Head] = []

    def learn(self, examples: Examples, *, steps: int, batch_s: float, seed: int) -> None:
        """Create new heads and train them, passing over the examples as often as needed.

        Args:
            examples: Training part; for CTC, only examples whose targets can be emitted (`Examples.feasible`).
            steps: Number of optimiser steps of each head.
            batch_s: Audio per batch, in seconds.
            seed: Seed of the order of the examples.

        Raises:
            ValueError: A loss is NaN or infinite.
        """
        layers, _, width = self.standard.mean.shape
        shares = prior(self.kind, examples, outputs=self.outputs, window=self.window)
        self.heads = [Head(layers, width, shares, self.window).to(self.standard.mean.device) for _ in self.rates]
        groups = [
            {"params": list(head.parameters()), "lr": rate} for head, rate in zip(self.heads, self.rates, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        rates = schedule(optimizer, steps)
        step = epoch = 0
        while step < steps:
            for batch in examples.batches(batch_s, seed=1_000_003 * seed + epoch):
                values, layout = batch.gather(self.standard, self.window.reach)
                optimizer.zero_grad()
                for head, rate in zip(self.heads, self.rates, strict=True):
                    loss = task_loss(self.kind, head(values, layout), batch.targets)
                    if not loss.isfinite():
                        raise ValueError(
                            f"{self.name}: the loss at learning rate {rate:g} is {loss.item()}; choose lower rates"
                        )
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(head.parameters(), CLIP_NORM)
                optimizer.step()
                rates.step()
                step += 1
                if step == steps:
                    break
            epoch += 1

    def keep(self, index: int) -> Head:
        """Drop all heads but one.

        Args:
            index: Position of the head to keep, in the order of the learning rates.

        Returns:
            The head that was kept.
        """
        self.heads = [self.heads[index]]
        return self.heads[0]

    @torch.no_grad()
    def judge(self, examples: Examples, *, batch_s: float) -> list[Judged]:
        """Evaluate each head; CTC is decoded along the likeliest path.

        Args:
            examples: Examples to evaluate on. Targets that CTC cannot emit add a loss of 0, but count as errors.
            batch_s: Audio per batch, in seconds.

        Returns:
            One entry per head, in the order of the learning rates.
        """
        edits, losses = [0] * len(self.heads), [0.0] * len(self.heads)
        for batch in examples.batches(batch_s, seed=None):
            values, layout = batch.gather(self.standard, self.window.reach)
            labels = sum(map(len, batch.targets))
            for index, head in enumerate(self.heads):
                logits = head(values, layout)
                losses[index] += float(task_loss(self.kind, logits, batch.targets)) * labels
                found = self._decode(logits)
                edits[index] += sum(edit_distance(*pair) for pair in zip(found, batch.targets, strict=True))
        total = sum(map(len, examples.targets))
        return [Judged(edit / total, loss / total) for edit, loss in zip(edits, losses, strict=True)]

    def _decode(self, logits: Packed) -> list[list[int]]:
        paths = Packed(logits.values.argmax(1).cpu(), logits.layout).unpack()
        if self.kind == "classification":
            return [path.tolist() for path in paths]
        return [[label for label in path.unique_consecutive().tolist() if label != BLANK] for path in paths]
