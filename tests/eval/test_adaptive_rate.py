"""Test learning a compressor's rate together with a task's head."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from fastssl.eval.probe import adaptive, command
from fastssl.eval.probe.adaptive import LearnedRate, Trial, learn_rates
from fastssl.eval.probe.command import probe
from fastssl.eval.probe.features import FeatureStore
from fastssl.eval.probe.heads import Head, Kind, Window, task_losses
from fastssl.eval.probe.rate_head import FrameLengths, RateHead
from fastssl.eval.probe.settings import ProbeSettings
from fastssl.eval.probe.tables import Table, read_table
from fastssl.models.conformer import ConformerConfig, ConformerEncoder
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.packing import Layout, Packed
from tests.models.test_compressed import SHAPE
from tests.models.test_compressed_prediction import CONFORMER

_CONFIG = EncoderConfig(**SHAPE, compressor="integrate-and-fire")
_DIGITS = ProbeSettings("digits", steps=40, batch_s=8.0)
_SPEAKERS = ProbeSettings("speaker", steps=40, batch_s=8.0, segment_s=0.5)


def learn_rate(
    encoder: SpeechEncoder,
    train: Table,
    dev: Table,
    settings: ProbeSettings,
    *,
    price: float,
    start: float = 0.5,
    **options: Any,
) -> LearnedRate:
    """Learn the rate for one price and start, and set the encoder's compressor to it."""
    (found,) = learn_rates(encoder, train, dev, settings, [Trial(price, start)], **options)
    assert encoder.compressor is not None
    encoder.compressor.rate, encoder.compressor.frame_period_ms = found.rate, None
    return found


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Make recordings of ten tones; each tone lasts 0.15 s and stands for a digit."""
    folder = tmp_path_factory.mktemp("tones")
    random = np.random.default_rng(0)
    rows = []
    for index in range(12):
        digits = "".join(random.choice(list("123"), 10))
        tones = [np.sin(2 * np.pi * 300 * int(digit) * np.arange(2400) / 16000) for digit in digits]
        samples = np.concatenate(tones) + 0.01 * random.standard_normal(2400 * len(tones))
        soundfile.write(folder / f"{index}.wav", samples.astype(np.float32), 16000)
        rows.append(f"{index}.wav\t{digits}\t{'ab'[index % 2]}\n")
    (folder / "table.tsv").write_text("path\tdigits\tspeaker\n" + "".join(rows))
    return read_table(folder / "table.tsv")


@pytest.fixture
def short(table: Table, tmp_path: Path) -> Table:
    """Label the same recordings with one digit each."""
    rows = (f"{row.path}\t1\t{speaker}\n" for row, speaker in zip(table.rows, table.column("speaker"), strict=True))
    (tmp_path / "short.tsv").write_text("path\tdigits\tspeaker\n" + "".join(rows))
    return read_table(tmp_path / "short.tsv")


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(_CONFIG)


@pytest.mark.parametrize("settings", [_DIGITS, _SPEAKERS])
def test_the_task_moves_the_rate_and_a_price_of_frames_raises_it(
    encoder: Encoder, table: Table, settings: ProbeSettings
) -> None:
    store, weights = FeatureStore(), {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    trials = [Trial(0.0, 0.4), Trial(100.0, 0.4), Trial(100.0, 0.8)]
    options: dict[str, Any] = {"bounds": (0.1, 0.8), "learning_rate": 0.05}
    free, *dear = learn_rates(encoder, table, table, settings, trials, **options, features=store)
    assert len(free.path) == 21
    assert free.path[0] == pytest.approx(0.4)
    assert free.path[-1] == free.rate
    assert free.rate != free.path[0]
    assert [one.rate for one in dear] == pytest.approx([0.8, 0.8])
    assert free.rate < 0.8
    assert free.frame_period_ms < dear[0].frame_period_ms
    # The report describes the encoder at the learned rate, and the encoder's weights have not changed.
    assert all(torch.equal(tensor, weights[name]) for name, tensor in encoder.state_dict().items())
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert "compressor.weight_network.conv.weight" in trained
    assert dear[0] == dear[0]._replace(rate=dear[1].rate, path=dear[0].path)


def test_rates_that_are_learned_together_are_those_that_are_learned_alone(encoder: Encoder, table: Table) -> None:
    settings, trials = ProbeSettings("digits", steps=12, batch_s=8.0), [Trial(0.0, 0.3), Trial(0.5), Trial(5.0, 0.3)]
    alone = [learn_rate(encoder, table, table, settings, price=price, start=start) for price, start in trials]
    assert encoder.compressor is not None
    encoder.compressor.rate = None
    assert learn_rates(encoder, table, table, settings, trials) == alone
    assert len({one.rate for one in alone}) == 3
    assert encoder.compressor.rate is None
    with pytest.raises(ValueError, match="trials: must not be empty"):
        learn_rates(encoder, table, table, settings, [])


def test_it_does_not_matter_where_a_rate_begins(encoder: Encoder, table: Table) -> None:
    """The head that scores a rate is trained at every rate, so the result does not depend on the start."""
    settings, trials = ProbeSettings("digits", steps=60, batch_s=8.0), [Trial(0.5, 0.2), Trial(0.5, 0.8)]
    found = [one.rate for one in learn_rates(encoder, table, table, settings, trials, learning_rate=0.1)]
    assert abs(found[0] - found[1]) < 0.1


def test_the_rate_falls_until_the_symbols_of_the_development_part_fit(
    encoder: Encoder, table: Table, short: Table
) -> None:
    """CTC reports no loss for targets that do not fit in the frames; this must not favour high rates."""
    options: dict[str, Any] = {"bounds": (1.0, 1.9), "learning_rate": 0.1}
    # At rate 1.9, an utterance of 1.5 s has four frames for its ten digits.
    free, cheap = learn_rates(encoder, table, table, _DIGITS, [Trial(0.0, 1.7), Trial(1.0, 1.7)], **options)
    assert free.rate < 1.7, free.path
    assert cheap.rate < 1.7, cheap.path
    # With one symbol per recording few frames suffice, so the rate rises.
    few = learn_rate(encoder, table, short, _DIGITS, price=1.0, start=1.7, **options)
    assert few.rate > 1.7, few.path


def test_the_head_learns_from_the_training_part_alone_and_first(
    encoder: Encoder, table: Table, short: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[bool, set[int]]] = []  # whether the head learns, and the number of symbols in each utterance

    def noted(kind: Kind, logits: Packed, targets: Sequence[Sequence[int]]) -> torch.Tensor:
        steps.append((torch.is_grad_enabled(), {len(target) for target in targets}))
        return task_losses(kind, logits, targets)

    monkeypatch.setattr(adaptive, "task_losses", noted)
    learn_rate(encoder, table, short, ProbeSettings("digits", steps=5, batch_s=8.0), price=0.0)
    of_head, of_rate = (True, {10}), (False, {1})
    assert steps == 12 * [of_head] + 3 * [of_head, of_rate, of_rate]


def test_of_a_conformer(table: Table) -> None:
    torch.manual_seed(0)
    conformer = ConformerEncoder(ConformerConfig(**CONFORMER, compressor="integrate-and-fire"))
    settings = ProbeSettings("digits", steps=20, batch_s=8.0)
    learned = learn_rate(conformer, table, table, settings, price=100.0, start=0.8, bounds=(0.1, 0.9))
    assert learned.rate == pytest.approx(0.9)
    assert 50 < learned.frame_period_ms < 100  # the encoder's own frame period is 40 ms


def test_the_same_seed_learns_the_same_rate(encoder: Encoder, table: Table) -> None:
    settings = ProbeSettings("digits", steps=6, batch_s=8.0)
    found = [learn_rate(encoder, table, table, settings, price=0.1, seed=seed).path for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("length", "reach"), [(1.0, 4), (2.5, 2), (4.0, 1)])
def test_a_head_for_all_rates_is_a_function_of_time(length: float, reach: int) -> None:
    """It equals the probe's head with weights interpolated for one frame length."""
    torch.manual_seed(0)
    window = Window(reach, 1)
    of_all, of_one = RateHead(2, 5, torch.full((3,), 1 / 3), reach=5), Head(2, 5, torch.full((3,), 1 / 3), window)
    with torch.no_grad():
        of_all.weight.normal_()
        of_all.bias.normal_()
        of_all.layer_logits.normal_()
        of_one.layer_logits.copy_(of_all.layer_logits)
        of_one.bias.copy_(0.75 * of_all.bias[0] + 0.25 * of_all.bias[1])
        curve = (0.75 * of_all.weight[0] + 0.25 * of_all.weight[1]).flatten(0, 1).numpy()
        places = length * np.arange(-reach, reach + 1)
        taps = np.stack([np.interp(places, np.arange(-5, 6), values) for values in curve])
        of_one.weight.copy_(torch.from_numpy(taps).view_as(of_one.weight))
    values, layout = torch.randn(2, 23, 5), Layout.from_lengths([9, 14])
    expected, found = of_one(values, layout), of_all(values, layout, window=window, length=length, mixture=0.25)
    assert found.layout.lengths == (9 - 2 * reach, 14 - 2 * reach)
    torch.testing.assert_close(found.values, expected.values)


def test_a_head_learns_at_long_frames_as_often_as_at_short_ones() -> None:
    scale = FrameLengths.between(0.0, 1.0, mean_weight=torch.tensor(0.25, dtype=torch.float64), most=100.0)
    assert (scale.shortest, scale.longest) == (1.0, 4.0)
    # Frames of length one, two and four. Rate 2 / 3 keeps half of the frames: 2 / 3 of a quarter plus 1 / 3 of all.
    assert [scale.rate_at(share).item() for share in (0.0, 0.5, 1.0)] == pytest.approx([0.0, 2 / 3, 1.0])
    assert [scale.mixture(length) for length in (1.0, 2.0, 4.0, 5.0)] == pytest.approx([0.0, 0.5, 1.0, 1.0])
    # Rate 2 would leave no frame, so the longest frame is limited by `most`: two frames of an utterance of ten.
    assert FrameLengths.between(1.0, 2.0, mean_weight=scale.mean_weight, most=5.0)[:2] == pytest.approx((4.0, 5.0))
    fixed = FrameLengths.between(0.5, 0.5, mean_weight=scale.mean_weight, most=5.0)
    assert fixed.rate_at(0.7).item() == pytest.approx(0.5)
    assert fixed.mixture(1.6) == 0


def test_a_head_sees_as_much_time_however_long_frames_are(
    encoder: Encoder, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    reaches: list[int] = []
    forward = RateHead.forward

    def noted(self: RateHead, *given: Any, window: Window, **lengths: Any) -> object:
        reaches.append(window.reach)
        return forward(self, *given, window=window, **lengths)

    monkeypatch.setattr(RateHead, "forward", noted)
    few = ProbeSettings("digits", steps=3, context_s=0.1)
    for rate, reach in ((0.0, 5), (1.0, 3)):  # these rates give frames 20 and 29 ms apart
        reaches.clear()
        learned = learn_rate(encoder, table, table, few, price=0.0, start=rate, bounds=(rate, rate))
        assert set(reaches) == {reach}, learned


def test_a_rate_that_cannot_be_learned(encoder: Encoder, table: Table) -> None:
    plain = Encoder(EncoderConfig(**_CONFIG.__dict__ | {"compressor": "average", "compressor_factor": 2}))
    with pytest.raises(ValueError, match="rate_price: needs an encoder with an integrate-and-fire compressor"):
        learn_rate(plain, table, table, _DIGITS, price=0.0)
    with pytest.raises(ValueError, match="rate_price: must be finite and not negative, got -1"):
        learn_rate(encoder, table, table, _DIGITS, price=-1.0)
    with pytest.raises(ValueError, match="spread: must be positive and finite, got 0"):
        learn_rate(encoder, table, table, _DIGITS, price=0.0, spread=0.0)
    with pytest.raises(ValueError, match=r"start, low, high: need .* got 0\.5, 0\.6, 1"):
        learn_rate(encoder, table, table, _DIGITS, price=0.0, bounds=(0.6, 1.0))
    for settings in (
        ProbeSettings("speaker", task="verification"),
        ProbeSettings("digits", folds="speaker"),
    ):
        with pytest.raises(ValueError, match="rate_price: a rate can be learned only for classification or ctc"):
            learn_rate(encoder, table, table, settings, price=0.0)
    with torch.no_grad():
        encoder.feature_projection.projection.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinite|the loss is nan in step 0"):
        learn_rate(encoder, table, table, _DIGITS, price=0.0)


def test_command(
    encoder: Encoder,
    table: Table,
    short: Table,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder.save_pretrained(tmp_path / "model")
    seen: list[Table] = []

    def noted(encoder: Encoder, train: Table, dev: Table, *settings: Any, **options: Any) -> list[LearnedRate]:
        seen[:] = train, dev
        return learn_rates(encoder, train, dev, *settings, **options)

    monkeypatch.setattr(command, "learn_rates", noted)
    caplog.set_level("INFO")
    settings = ProbeSettings("digits", seeds=1, steps=20, learning_rates=(1e-3,))

    def run(name: str, **rate: float) -> Any:
        model, output = str(tmp_path / "model"), tmp_path / f"{name}.json"
        probe(model, table.name, settings, dev=short.name, test=table.name, output=output, **rate)  # type: ignore[arg-type]
        return json.loads(output.read_text())

    found = run("found", rate=0.3, rate_price=100.0)
    assert found["settings"]["rate_price"] == 100.0
    assert [part.name for part in seen] == [table.name, short.name]
    learned = found["settings"]["learned_rate"]
    assert learned["path"][0] == pytest.approx(0.3)
    said = f"learned a rate of {learned['rate']:.3f}, starting from 0.300, at a price of 100: mean frame period"
    assert said in caplog.text
    # Its heads equal those of a probe at that rate.
    assert run("again", rate=learned["rate"])["results"][0] == found["results"][0]
    with pytest.raises(ValueError, match="--rate_price and --frame_period_ms: give only one of them"):
        run("none", rate_price=0.1, frame_period_ms=40.0)
    with pytest.raises(ValueError, match=r"--rate_bounds: must be a range .* got 0 to 0\.5 and .* 0\.9"):
        probe(
            *(str(tmp_path / "model"), table.name, settings),
            dev=table.name,
            test=table.name,
            rate=0.9,
            rate_price=0.1,
            rate_bounds=(0.0, 0.5),
        )
