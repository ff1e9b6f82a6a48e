"""Test the sequence compressor against loops over frames, and its promises about rates and short utterances."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl.nn.compression import SequenceCompressor, WeightNetwork
from fastssl.packing import Layout, Packed
from tests.scans import Scans

KINDS: dict[str, dict[str, Any]] = {
    "average": {"factor": 4},
    "strided": {"factor": 3},
    "integrate-and-fire": {},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
LENGTHS = [0, 1, 2, 3, 5, 7, 8, 40, 101]


def make(kind: str, channels: int = 16, **options: Any) -> SequenceCompressor:
    torch.manual_seed(0)
    return SequenceCompressor(channels, kind=kind, **(KINDS[kind] | options))  # type: ignore[arg-type]


def frames_of(lengths: list[int], channels: int = 16, dtype: torch.dtype = torch.float32) -> Packed:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(sum(lengths), channels, generator=generator, dtype=torch.float64).to(dtype)
    return Packed(values, Layout.from_lengths(lengths))


def average_by_loop(x: Tensor, factor: int) -> list[Tensor]:
    if len(x) < 2 * factor:  # two halves that differ by at most one frame
        middle = len(x) // 2
        return [part.mean(0) for part in (x[:middle], x[middle:]) if len(part)]
    return [x[first : first + factor].mean(0) for first in range(0, len(x) - factor + 1, factor)]


def fire_by_loop(x: Tensor, weights: Tensor, *, keep_rest: bool) -> list[Tensor]:
    """Integrate and fire, one input frame at a time; all weights must be at most 1."""
    out, filled, total = [], 0.0, torch.zeros_like(x[0]) if len(x) else None
    for frame, weight in zip(x, weights.tolist(), strict=True):
        assert total is not None
        if filled + weight < 1:
            filled, total = filled + weight, total + weight * frame
        else:
            out.append(total + (1 - filled) * frame)
            filled = filled + weight - 1
            total = filled * frame
    if keep_rest and filled >= 0.5:
        assert total is not None
        out.append(total / filled)
    return out


def assert_frames(found: Tensor, expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    if expected:
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 7])
def test_average_equals_a_loop(factor: int) -> None:
    frames = frames_of(LENGTHS, dtype=torch.float64)
    out = make("average", factor=factor)(frames)
    assert out.weights is None
    for found, x in zip(out.frames.unpack(), frames.unpack(), strict=True):
        assert_frames(found, average_by_loop(x, factor))


@pytest.mark.parametrize("factor", [1, 2, 5])
def test_strided_equals_the_convolution_of_torch_and_starts_as_the_average(factor: int) -> None:
    frames = frames_of(LENGTHS)
    compressor = make("strided", factor=factor)
    for found, x in zip(compressor(frames).frames.unpack(), frames.unpack(), strict=True):
        if len(x) >= 2 * factor:
            assert_frames(found, average_by_loop(x, factor))
    torch.nn.init.normal_(compressor.conv.weight)
    for found, x in zip(compressor(frames).frames.unpack(), frames.unpack(), strict=True):
        padded = F.pad(x, (0, 0, 0, max(0, factor * min(len(x), 2) - len(x))))
        expected = (
            F.conv1d(padded.t(), compressor.conv.weight, compressor.conv.bias, stride=factor).t() if len(x) else x
        )
        torch.testing.assert_close(found, expected)


def test_weight_network_equals_its_modules_on_each_utterance_alone() -> None:
    torch.manual_seed(0)
    network = WeightNetwork(16)
    torch.nn.init.normal_(network.layer_norm.weight)
    torch.nn.init.normal_(network.layer_norm.bias)
    frames = frames_of(LENGTHS)
    found = Packed(network(*frames), frames.layout).unpack()
    for weights, x in zip(found, frames.unpack(), strict=True):
        if len(x):
            hidden = network.layer_norm(F.conv1d(x.t(), network.conv.weight, network.conv.bias, padding=2).t())
            torch.testing.assert_close(weights, network.projection(hidden.relu()).sigmoid().squeeze(1))
    # This is the number in the paper's code.
    assert sum(parameter.numel() for parameter in WeightNetwork(512).parameters()) == 1_312_769


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0, 1.4, 1.9, 2.0])
def test_integrate_and_fire_equals_a_loop(rate: float, training: bool) -> None:
    frames = frames_of([101, 60, 40, 90], dtype=torch.float64)
    compressor = make("integrate-and-fire").double().train(training)
    out = compressor(frames, rate=rate)
    assert out.learned_weights is not None
    mates = zip(frames.unpack(), Packed(out.learned_weights, frames.layout).unpack(), strict=True)
    for found, (x, learned) in zip(out.frames.unpack(), mates, strict=True):
        bounded = min(rate, 2 - 1e-5)
        weights = bounded * learned + (1 - bounded) if rate <= 1 else (2 - bounded) * learned
        if weights.sum() < 2:
            weights = weights * (2 + 1e-4) / weights.sum()
        assert_frames(found, fire_by_loop(x, weights, keep_rest=not training))


def test_rate_zero_keeps_every_frame_as_it_is() -> None:
    frames = frames_of(LENGTHS)
    for training in (True, False):
        out = make("integrate-and-fire").train(training)(frames, rate=0.0)
        assert out.frames.layout.lengths == frames.layout.lengths
        assert torch.equal(out.frames.values, frames.values)


@pytest.mark.parametrize("period", [20.0, 26.0, 50.0, 90.0, 130.0])
def test_the_period_asked_for_is_obtained_as_near_as_whole_frames_allow(period: float) -> None:
    frames = frames_of([500, 211, 80])
    out = make("integrate-and-fire").eval()(frames, frame_period_ms=period)
    for obtained, count, kept in zip(
        out.frame_period_ms.tolist(), frames.layout.lengths, out.frames.layout.lengths, strict=True
    ):
        assert obtained == 20 * count / kept
        assert abs(kept - count * 20 / period) <= 0.5 + 1e-3
    each = torch.tensor([period, 40.0, 200.0])
    assert make("integrate-and-fire").eval()(frames, frame_period_ms=each).frames.layout.lengths[1:] in (
        (105, 8),
        (106, 8),
    )


@pytest.mark.parametrize("training", [True, False])
@EVERY_KIND
def test_two_frames_survive(kind: str, training: bool) -> None:
    frames = frames_of([0, 1, 2, 3, 4, 5, 9, 0])
    compressor = make(kind, **({} if kind == "integrate-and-fire" else {"factor": 50})).train(training)
    for options in [{"rate": 2.0}, {"frame_period_ms": 1e6}] if kind == "integrate-and-fire" else [{}]:
        out = compressor(frames, **options)
        assert out.frames.layout.lengths == (0, 1, 2, 2, 2, 2, 2, 0)
        assert out.frame_period_ms[:3].isnan().tolist() == [True, False, False]
        assert out.frames.values.isfinite().all()
        if kind == "integrate-and-fire":  # a weighted mean of one frame is the frame itself
            torch.testing.assert_close(out.frames.values[0], frames.values[0])


def test_two_frames_survive_weights_of_zero() -> None:
    compressor = make("integrate-and-fire").eval()
    torch.nn.init.constant_(compressor.weight_network.projection.bias, -1000.0)
    frames = frames_of([40, 0, 1, 300])
    for options in ({}, {"rate": 2.0}, {"frame_period_ms": 500.0}):
        out = compressor(frames, **options)
        assert out.frames.layout.lengths == ((2, 0, 1, 12) if "frame_period_ms" in options else (2, 0, 1, 2))
        assert out.frames.values.isfinite().all()


def slots_by_loop(weights: Tensor, frames: int) -> list[int]:
    """Return, for each frame, the output frame that gets the largest share of its weight."""
    slots, begin = [], 0.0
    for weight in weights.tolist():
        end = begin + weight
        shares = {slot: min(end, slot + 1) - max(begin, slot) for slot in range(int(begin), int(end) + 1)}
        slots.append(min(max(shares, key=lambda slot: shares[slot]), frames - 1))
        begin = end
    return slots


@pytest.mark.parametrize("training", [True, False])
@EVERY_KIND
def test_upsampling_repeats_each_frame_for_those_that_went_into_it(kind: str, training: bool) -> None:
    frames = frames_of([0, 1, 2, 3, 5, 7, 40, 101, 0], dtype=torch.float64)
    compressor = make(kind).double().train(training)
    for rate in (0.0, 0.4, 1.0, 1.8) if kind == "integrate-and-fire" else (None,):
        out = compressor(frames, rate=rate)
        first_row = 0
        for sources, found, x in zip(
            Packed(out.sources, frames.layout).unpack(), out.frames.unpack(), frames.unpack(), strict=True
        ):
            assert sources.diff().ge(0).all()
            if len(x):
                assert sources[0] == first_row
                if kind != "strided" or len(x) >= 6:  # a shorter sequence has a window that contains only padding
                    assert sources[-1] == first_row + len(found) - 1
            first_row += len(found)
        if rate == 0.0:
            assert torch.equal(out.upsample(out.frames.values), frames.values)
        if out.weights is not None:
            weights = Packed(out.weights, frames.layout).unpack()
            first = 0
            for of_one, sources, found in zip(
                weights, Packed(out.sources, frames.layout).unpack(), out.frames.unpack(), strict=True
            ):
                assert [row - first for row in sources.tolist()] == slots_by_loop(of_one, len(found))
                first += len(found)
    if kind == "strided":
        assert out.sources[-101:].sub(out.sources[-101]).tolist() == [min(frame // 3, 32) for frame in range(101)]
        assert out.sources[6:11].sub(out.sources[6]).tolist() == [0, 0, 0, 1, 1]  # five frames, padded to six
    if kind == "average":
        assert out.sources[-101:].sub(out.sources[-101]).tolist() == [min(frame // 4, 24) for frame in range(101)]


def test_upsampling_takes_a_gradient_without_atomics() -> None:
    frames = frames_of([30, 0, 17], channels=3, dtype=torch.float64)
    out = make("integrate-and-fire", channels=3).double()(frames)
    values = torch.randn(out.frames.layout.total, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(out.upsample, values)
    expected = torch.zeros_like(values).index_add(0, out.sources, frames.values)
    (grad,) = torch.autograd.grad(out.upsample(values), values, frames.values)
    torch.testing.assert_close(grad, expected)
    with pytest.raises(ValueError, match="values: expected"):
        out.upsample(frames.values)
    # A sum in bf16 could not count beyond 256.
    many = make("average", channels=1, factor=1000)(frames_of([2000], channels=1))
    halves = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(many.upsample(halves).sum(), halves)
    assert grad.flatten().tolist() == [1000.0, 1000.0]


@pytest.mark.parametrize("training", [True, False])
def test_one_scan_serves_the_frames_and_their_sources(training: bool) -> None:
    frames = frames_of([60], channels=3)
    compressor = make("integrate-and-fire", channels=3).train(training)
    with Scans() as seen:
        out = compressor(frames, rate=0.7)
        assert len(out.sources) == 60
    assert seen.scans == 1
    assert seen.unordered == []
    values = torch.randn(out.frames.layout.total, requires_grad=True)  # one number per frame
    with Scans() as seen:
        out.upsample(values).sum().backward()
    assert seen.unordered == []
    assert values.grad is not None
    assert torch.equal(values.grad, out.sources.bincount(minlength=len(values)).float())


@EVERY_KIND
def test_sources_first_asked_for_in_inference_mode_serve_a_gradient(kind: str) -> None:
    frames = frames_of([60], channels=3)
    out = make(kind, channels=3)(frames)
    with torch.inference_mode():
        sources = out.sources
    assert out.sources is sources
    values = torch.randn(out.frames.layout.total, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(out.upsample(values).sum(), values)
    assert grad[:, 0].tolist() == sources.bincount(minlength=len(values)).tolist()


@EVERY_KIND
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5), rate=st.floats(0, 2))
def test_batch_mates_do_not_matter(kind: str, lengths: list[int], rate: float) -> None:
    frames = frames_of(lengths)
    options = {"rate": rate} if kind == "integrate-and-fire" else {}
    for training in (True, False):
        compressor = make(kind).train(training)
        together = compressor(frames, **options)
        for found, x in zip(together.frames.unpack(), frames.unpack(), strict=True):
            alone = compressor(Packed(x, Layout.from_lengths([len(x)])), **options)
            assert torch.equal(found, alone.frames.values)


def test_a_period_is_solved_for_each_utterance_alone() -> None:
    frames = frames_of([101, 40, 7])
    compressor = make("integrate-and-fire").eval()
    together = compressor(frames, frame_period_ms=47.0)
    for found, x in zip(together.frames.unpack(), frames.unpack(), strict=True):
        alone = compressor(Packed(x, Layout.from_lengths([len(x)])), frame_period_ms=47.0)
        assert torch.equal(found, alone.frames.values)


@pytest.mark.parametrize("training", [True, False])
@EVERY_KIND
def test_gradcheck(kind: str, training: bool) -> None:
    """Check gradients of frames, parameters and rate, even if evaluation keeps a rest or sums of weights are raised."""
    compressor = make(kind, channels=4).double().train(training)
    frames = frames_of([13, 3, 0, 6], channels=4, dtype=torch.float64)
    names = [name for name, _ in compressor.named_parameters()]
    rates = torch.tensor([0.7, 1.6, 1.0, 1.3], dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, rate: Tensor, *parameters: Tensor) -> Tensor:
        options = {"rate": rate} if kind == "integrate-and-fire" else {}
        state = dict(zip(names, parameters, strict=True))
        packed = Packed(x, frames.layout)
        out: Tensor = torch.func.functional_call(compressor, state, (packed,), options).frames.values
        return out

    inputs = (frames.values.clone().requires_grad_(), rates, *compressor.parameters())
    if kind == "integrate-and-fire":
        kept = compressor(frames, rate=rates.detach()).frames.layout.lengths
        dropped = compressor.train()(frames, rate=rates.detach()).frames.layout.lengths
        compressor.train(training)
        assert training or kept > dropped  # in evaluation, this case must keep a rest
    assert torch.autograd.gradcheck(run, inputs)


def test_a_period_takes_a_gradient_through_the_weights() -> None:
    compressor = make("integrate-and-fire", channels=4).double()
    frames = frames_of([13, 9], channels=4, dtype=torch.float64)
    period = torch.tensor([55.0, 33.0], dtype=torch.float64, requires_grad=True)

    def run(period: Tensor, bias: Tensor) -> Tensor:
        state = {"weight_network.projection.bias": bias}
        options = {"frame_period_ms": period}
        out: Tensor = torch.func.functional_call(compressor, state, (frames,), options).frames.values
        return out

    assert torch.autograd.gradcheck(run, (period, compressor.weight_network.projection.bias))


def test_a_rate_is_learned() -> None:
    """If frames have a cost, the gradient raises the rate, even at 1, where the formula changes branches."""
    frames = frames_of([100, 60])
    for start in (0.2, 1.0, 1.5):
        rate = torch.tensor(start, requires_grad=True)
        weights = make("integrate-and-fire")(frames, rate=rate).weights
        assert weights is not None
        (grad,) = torch.autograd.grad(weights.mean(), rate)
        assert grad < 0


def test_frames_in_bf16() -> None:
    frames = frames_of([101, 40])
    for kind in KINDS:
        compressor = make(kind)
        expected = compressor(frames).frames
        half = compressor.bfloat16()(Packed(frames.values.bfloat16(), frames.layout)).frames
        assert half.values.dtype == torch.bfloat16
        if kind != "integrate-and-fire":  # rounded weights fire at other frames
            torch.testing.assert_close(half.values.float(), expected.values, rtol=0.02, atol=0.02)


def test_an_empty_batch() -> None:
    for kind, lengths in itertools.product(KINDS, ([], [0, 0])):
        out = make(kind).eval()(frames_of(lengths))
        assert out.frames.values.shape == (0, 16)
        assert out.frames.layout.lengths == tuple(lengths)


def test_rejects_bad_input() -> None:
    frames, fire, average = frames_of([20, 30]), make("integrate-and-fire"), make("average")
    cases: dict[str, Any] = {
        r"rate: must be from 0 to 2, got 2.1": lambda: fire(frames, rate=2.1),
        r"rate: must be from 0 to 2, got nan": lambda: fire(frames, rate=math.nan),
        r"rate: expected a number or shape \(2,\).* got \(3,\)": lambda: fire(frames, rate=torch.ones(3)),
        r"frame_period_ms: must be from 20 to inf, got 19": lambda: fire(frames, frame_period_ms=19.0),
        r"frame_period_ms: must be from 20 to inf, got inf": lambda: fire(frames, frame_period_ms=math.inf),
        r"rate and frame_period_ms: give one of the two": lambda: fire(frames, rate=1.0, frame_period_ms=40.0),
        r"rate and frame_period_ms: 'average' has a fixed factor": lambda: average(frames, rate=1.0),
        r"frames: expected \(50, 16\), got \(50, 8\)": lambda: fire(frames_of([20, 30], channels=8)),
        r"frames: expected \(50, 16\), got \(50, 4\)": lambda: average(frames_of([20, 30], channels=4)),
        r"kind: must be": lambda: SequenceCompressor(4, kind="mean"),  # type: ignore[arg-type]
        r"factor: 'average' and 'strided' need one": lambda: SequenceCompressor(4, kind="average"),
        r"factor: 'average'.* got 2 for 'integrate": lambda: SequenceCompressor(4, kind="integrate-and-fire", factor=2),
        r"factor: must be a whole number .* got 0": lambda: SequenceCompressor(4, kind="average", factor=0),
        r"factor: must be a whole number .* got 2.5": lambda: SequenceCompressor(
            4,
            kind="average",
            factor=2.5,  # type: ignore[arg-type]
        ),
        r"input_period_ms: must be positive": lambda: SequenceCompressor(
            4, kind="average", factor=2, input_period_ms=0.0
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
