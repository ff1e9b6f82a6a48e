"""Linear heads on a learned weighted sum of frozen layers: what they are, how they learn, what they get wrong."""

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
#: Share of the steps in which the rate rises: Adam's first steps are as long as any, in directions of one batch.
_WARM_UP = 0.05
#: Of a head's gradient: without it some encoders' CTC heads fall back to blanks at the higher rates.
CLIP_NORM = 0.3
#: Frames are given to a head at most this often.
_LEAST_PERIOD_S = 0.02


class Window(NamedTuple):
    """The frames that one output of a head sees.

    Args:
        reach: Frames on either side of the middle one.
        stride: Frames from one output to the next.
    """

    reach: int
    stride: int

    @classmethod
    def of_seconds(cls, context_s: float, frame_period_s: float) -> "Window":
        """Frames that come nearest to `context_s` on either side; an output every 20 ms, or every frame if longer."""
        # Half a frame is left out: 0.1 s are two frames of 40 ms.
        reach = math.ceil(context_s / frame_period_s - 0.5 - 1e-6)
        return cls(reach, max(1, math.floor(_LEAST_PERIOD_S / frame_period_s + 1e-6)))

    def outputs(self, frames: int) -> int:
        """Of a head on so many frames, at least one."""
        return (frames - 1) // self.stride + 1


class Examples(NamedTuple):
    """What a head learns from or is judged by.

    Args:
        features: Of one source and table.
        chosen: Which examples of them.
        targets: Of each chosen example: its class, or its symbols.
    """

    features: Features
    chosen: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]

    def batches(self, batch_s: float, *, seed: int | None) -> Iterator["Examples"]:
        """One pass in batches of about `batch_s` seconds, shuffled if there is a seed."""
        order = list(range(len(self.chosen)))
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(order), generator=generator).tolist()
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
        """Those whose targets CTC can emit."""
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
        """(L, N, D) standardised, with `reach` rows of zeros (the mean) before and after each example."""
        frames = [self.features.frames[example] for example in self.chosen]
        device = standard.mean.device
        layout = Layout.from_lengths([part.shape[1] + 2 * reach for part in frames], device=device)
        values = torch.zeros(len(frames[0]), layout.total, frames[0].shape[2], device=device)
        for part, first in zip(frames, layout.offsets, strict=False):
            values[:, first + reach : first + reach + part.shape[1]] = standard(part.to(device))
        return values, layout


def outputs_needed(target: Sequence[int]) -> int:
    """To emit a target by CTC: one for each symbol, and a blank between two equal ones."""
    return len(target) + sum(one == other for one, other in pairwise(target))


class Head(nn.Module):
    """Softmax-weighted sum of layers, then a linear map of a window of its frames.

    It begins as the best head that looks at nothing: weights of zero, and biases by how often each output is right.
    CTC from random weights spends a thousand steps on unlearning them, and on finding that most outputs are blank.

    Args:
        layers: L.
        width: D.
        prior: (C,) share of each class, or of each symbol and the blank among outputs.
        window: Frames that an output sees.
    """

    def __init__(self, layers: int, width: int, prior: Tensor, window: Window) -> None:
        super().__init__()
        self.window = window
        self.layer_logits = nn.Parameter(torch.zeros(layers))
        self.weight = nn.Parameter(torch.zeros(len(prior), width, 2 * window.reach + 1))
        self.bias = nn.Parameter(prior.clamp(min=1e-6).log())

    @property
    def layer_weights(self) -> Tensor:  # (L,)
        """Weights of the sum: positive, together one."""
        return self.layer_logits.softmax(0)

    def forward(self, values: Tensor, layout: Layout) -> Packed:  # (L, N, D) -> (N_out, C)
        """Logits of examples, of which `layout` counts as many rows of zeros before and after as the window reaches."""
        mixed = (self.layer_weights @ values.flatten(1)).view(values.shape[1:])
        return convolve(mixed, self.weight, self.bias, layout, stride=self.window.stride)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, layout: Layout, *, stride: int) -> Packed:
    """(N, D), (C, D, K), (C,) -> (N_out, C), each example alone.

    For so few channels out it is cheaper to multiply every frame by the weights of all taps, and then to add up what
    falls together, than to lay windows side by side as `ops.strided_conv` does.
    """
    channels, width, taps = weight.shape
    out_layout = layout.after_conv(taps, stride)
    rows = layout.rows(out_layout.sequence_ids, stride * out_layout.positions)
    by_tap = x @ weight.permute(1, 2, 0).reshape(width, taps * channels)
    return Packed(_Diagonals.apply(by_tap, taps).index_select(0, rows) + bias, out_layout)


class _Diagonals(torch.autograd.Function):
    """(N, K C) -> (N - K + 1, C): the sums over k of what row n + k has for tap k."""

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
    """(C,) how often each of so many outputs is right, if each symbol takes one."""
    counts = torch.bincount(torch.tensor([n for target in examples.targets for n in target]), minlength=outputs)
    places = sum(window.outputs(examples.features.frames[example].shape[1]) for example in examples.chosen)
    if kind == "ctc":
        counts[BLANK] = places - counts.sum()
    return counts / places


def task_loss(kind: Kind, logits: Packed, targets: Sequence[Sequence[int]]) -> Tensor:
    """() nats per label; what CTC cannot emit adds none."""
    return task_losses(kind, logits, targets).sum() / sum(map(len, targets))


def task_losses(kind: Kind, logits: Packed, targets: Sequence[Sequence[int]]) -> Tensor:
    """(B,) nats of each example."""
    flat = torch.tensor([label for target in targets for label in target], device=logits.values.device)
    if kind == "classification":
        return F.cross_entropy(logits.values, flat, reduction="none")
    return F.ctc_loss(
        logits.to_padded().log_softmax(2).transpose(0, 1),
        flat,
        torch.tensor(logits.layout.lengths),
        torch.tensor([len(target) for target in targets]),
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A short rise, then linearly to 0."""
    rise = max(1, round(_WARM_UP * steps))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )


class Judged(NamedTuple):
    """A head on one part."""

    error_rate: float  # edits per label; with one label per example, the share that is wrong
    loss: float  # nats per label


class Learner:
    """Heads of several learning rates side by side on the same batches.

    Args:
        kind: "classification" (one output per example) or "ctc".
        outputs: C.
        window: Frames that an output sees.
        rates: Learning rates of AdamW after a short rise, from where they fall linearly to 0.
        standard: Of the training part.
        name: Of the encoder, for errors.
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
        """Take so many steps with new heads, over the examples again and again.

        Args:
            examples: The training part, without what CTC cannot emit.
            steps: Of each head.
            batch_s: Seconds of audio in a batch.
            seed: Of the order of the examples.

        Raises:
            ValueError: A loss is not finite.
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
                        raise ValueError(f"{self.name}: the loss at learning rate {rate:g} is {loss.item()}")
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(head.parameters(), CLIP_NORM)
                optimizer.step()
                rates.step()
                step += 1
                if step == steps:
                    break
            epoch += 1

    def keep(self, index: int) -> Head:
        """Forget the other heads."""
        self.heads = [self.heads[index]]
        return self.heads[0]

    @torch.no_grad()
    def judge(self, examples: Examples, *, batch_s: float) -> list[Judged]:
        """Each head on these examples; CTC by the likeliest path. What CTC cannot emit adds no loss, but its errors."""
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
        paths = [path.cpu() for path in Packed(logits.values.argmax(1), logits.layout).unpack()]
        if self.kind == "classification":
            return [path.tolist() for path in paths]
        return [[label for label in path.unique_consecutive().tolist() if label != BLANK] for path in paths]
