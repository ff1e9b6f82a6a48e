"""Test `fastssl probe` on small encoders, with tones in place of digits."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from fastssl import cli
from fastssl.data.rules import RULES
from fastssl.eval.probe.features import EncoderSource, FeatureStore, LogMelSource, RandomSource, Standard
from fastssl.eval.probe.heads import Examples
from fastssl.eval.probe.run import LOG_MEL, RANDOM, ProbeResult, run_probe
from fastssl.eval.probe.settings import LEARNING_RATES, ProbeSettings
from fastssl.eval.probe.tables import Table, read_table, split_table
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.packing import Packed

_CONFIG = EncoderConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    conv_dim=(16,) * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
)
_TONES_HZ = {"0": 500, "1": 1100, "2": 2200}


def _write(path: Path, digits: str, speaker: int, random: np.random.Generator) -> None:
    """Write a recording with a tone for each digit and pauses in between; a constant hum identifies the speaker."""
    pieces = []
    for digit in digits:
        time_s = np.arange(2000 + random.integers(400)) / 16000
        pieces += [0.3 * np.sin(2 * np.pi * _TONES_HZ[digit] * time_s), np.zeros(1200 + random.integers(600))]
    samples = np.concatenate(pieces) + 0.01 * random.standard_normal(sum(map(len, pieces)))
    hum = 0.1 * np.sin(2 * np.pi * (3000 + 700 * speaker) * np.arange(len(samples)) / 16000)
    soundfile.write(path, (samples + hum).astype(np.float32), 16000)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    """Make train, dev and test tables with the same four speakers."""
    parts = {}
    random = np.random.default_rng(0)
    for part, number in {"train": 24, "dev": 8, "test": 8}.items():
        folder = tmp_path_factory.mktemp(part)
        lines = ["path\tspeaker\tdigits\n"]
        for index in range(number):
            digits = "".join(random.choice(list(_TONES_HZ), size=random.integers(3, 7)))
            _write(folder / f"{index}.wav", digits, index % 4, random)
            lines.append(f"{index}.wav\ts{index % 4}\t{digits}\n")
        (folder / "table.tsv").write_text("".join(lines))
        parts[part] = read_table(folder / "table.tsv")
    return parts


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(3)
    return Encoder(_CONFIG).eval()


@pytest.fixture(scope="module")
def store() -> FeatureStore:
    return FeatureStore()


def _run(
    encoder: Encoder,
    tables: dict[str, Table],
    settings: ProbeSettings,
    store: FeatureStore,
    *,
    baselines: Sequence[str] = (LOG_MEL, RANDOM),
) -> list[ProbeResult]:
    parts = (tables["train"], tables["dev"], tables["test"])
    return run_probe({"mine": encoder}, *parts, settings, features=store, baselines=baselines)


def _changed(table: Table, number: int, **labels: str) -> Table:
    """Return the table with other labels in one row."""
    rows = list(table.rows)
    rows[number] = dataclasses.replace(rows[number], labels={**rows[number].labels, **labels})
    return dataclasses.replace(table, rows=tuple(rows))


def test_ctc_reads_tones(tables: dict[str, Table], encoder: Encoder, store: FeatureStore) -> None:
    settings = ProbeSettings("digits", steps=40, batch_s=6, learning_rates=(1e-6, 1e-2), seeds=2)
    results = _run(encoder, tables, settings, store)
    assert [result.encoder for result in results] == ["mine", LOG_MEL, RANDOM]
    mel = results[1]
    assert mel.mean < 0.25
    assert [run.chosen for run in mel.runs] == [1e-2, 1e-2]
    for result in results:
        errors = [run.error for run in result.runs]
        assert [run.seed for run in result.runs] == [0, 1]
        assert result.mean == pytest.approx(np.mean(errors))
        assert result.std == pytest.approx(np.std(errors, ddof=1))
        for run in result.runs:
            assert run.dev_errors["1e-06"] == 1.0  # a rate too low to learn anything: most outputs stay blank
            assert sum(run.layer_weights) == pytest.approx(1)
            assert (run.parts["train"].recordings, run.parts["test"].examples) == (24, 8)
            assert run.parts["train"].infeasible == 0


@pytest.mark.parametrize(("target", "task"), [("digits", "ctc"), ("speaker", "classification")])
def test_features_are_whitened_for_ctc(
    target: str, task: str, tables: dict[str, Table], encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def gather(self: Examples, standard: Standard, reach: int) -> object:
        made.append(standard.whitening)
        return real(self, standard, reach)

    real = Examples.gather
    monkeypatch.setattr(Examples, "gather", gather)
    settings = ProbeSettings(target, steps=1)
    assert settings.resolved_task == task
    run_probe({"mine": encoder}, tables["train"], tables["dev"], tables["test"], settings, baselines=())
    assert made
    assert all((whitening is not None) == (task == "ctc") for whitening in made)


def test_help_names_the_learning_rates(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["probe", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for task in ("ctc", "classification"):
        *others, last = (f"{rate:g}" for rate in LEARNING_RATES[task])
        assert f"{', '.join(others)} and {last} for {task}" in said


def test_held_out_speakers(tables: dict[str, Table], encoder: Encoder, store: FeatureStore) -> None:
    settings = ProbeSettings("phones", folds="speaker", fold_size=2, steps=2)
    (result,) = _run(encoder, tables, settings, store, baselines=())
    assert [run.held_out for run in result.runs] == [("s0", "s1"), ("s2", "s3")]
    sizes = {part: size.recordings for part, size in result.runs[0].parts.items()}
    assert sizes == {"train": 12, "dev": 4, "test": 4}


def test_classification_of_segments(tables: dict[str, Table], encoder: Encoder, store: FeatureStore) -> None:
    settings = ProbeSettings("speaker", segment_s=0.3, seeds=1, steps=50, batch_s=3)
    results = _run(encoder, tables, settings, store)
    assert results[1].mean < 0.1
    assert results[1].std is None
    samples = [soundfile.info(row.path).frames for row in tables["train"].rows]
    size = results[0].runs[0].parts["train"]
    assert size.examples == sum(count // 4800 for count in samples)
    assert size.hours == pytest.approx(size.examples * 0.3 / 3600)


def test_folds_that_hold_a_class_out_are_refused(
    tables: dict[str, Table], encoder: Encoder, store: FeatureStore
) -> None:
    settings = ProbeSettings("speaker", folds="speaker", steps=1)
    with pytest.raises(ValueError, match="speaker: with s0 held out, 1 values of speaker in the test part"):
        _run(encoder, tables, settings, store, baselines=())


def test_verification_of_unseen_speakers(tables: dict[str, Table], encoder: Encoder, store: FeatureStore) -> None:
    settings = ProbeSettings("speaker", task="verification", folds="speaker", fold_size=2, segment_s=0.3)
    results = _run(encoder, tables, settings, store)
    assert results[1].mean < 0.2
    for run in results[0].runs:
        assert run.chosen == float(min(run.dev_errors, key=lambda layer: run.dev_errors[layer]))
        assert len(run.dev_errors) == 2
        assert run.trials is not None
    with pytest.raises(ValueError, match="some of its speakers are in the training or development part too"):
        _run(encoder, tables, dataclasses.replace(settings, folds=None), store)
    with pytest.raises(ValueError, match=r"verification needs pairs .* and 0 with different ones"):
        _run(encoder, tables, dataclasses.replace(settings, fold_size=1), store)


def test_segments_are_encoded_alone(tables: dict[str, Table], encoder: Encoder) -> None:
    features = FeatureStore().get(EncoderSource(encoder), tables["dev"], name="mine", segment_s=0.3)
    samples, _ = soundfile.read(tables["dev"].rows[0].path, dtype="float32")
    part = samples[4800:9600]
    part = (part - part.mean()) / np.sqrt(part.var() + 1e-7)
    with torch.inference_mode():
        states = encoder(Packed.pack([torch.from_numpy(part)[:, None]])).hidden_states
    assert features.rows[:2] == (0, 0)
    torch.testing.assert_close(
        features.frames[1].float(), torch.stack([state.values for state in states]), rtol=2e-3, atol=2e-3
    )


def test_features_are_computed_once_and_may_lie_in_a_file(
    tables: dict[str, Table], encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, in_memory, in_file = EncoderSource(encoder), FeatureStore(), FeatureStore(memory_gb=1e-5)
    held = in_memory.get(source, tables["dev"], name="mine")
    spooled = in_file.get(source, tables["dev"], name="mine")
    assert sum(frames.nbytes for frames in held.frames) > 1e4
    for one, other in zip(held.frames, spooled.frames, strict=True):
        assert torch.equal(one, other)
    monkeypatch.setattr(EncoderSource, "__call__", lambda *_: pytest.fail("encoded again"))
    assert in_memory.get(EncoderSource(encoder), tables["dev"], name="mine") is held
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        in_memory.get(source, tables["dev"], name="mine", mean=True)


def test_a_random_encoder_leaves_the_generators_alone(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were seeded"))
    before = torch.get_rng_state()
    RandomSource(encoder, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_baselines(tables: dict[str, Table], encoder: Encoder) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (RandomSource(encoder, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [source.encoder.get_parameter("feature_projection.projection.weight") for source in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert (one.key == same.key, one.key == other.key) == (True, False)
    loud = FeatureStore().get(LogMelSource(), tables["dev"], name="mel")
    samples, _ = soundfile.read(tables["dev"].rows[0].path)
    assert loud.frames[0].shape == (1, round(len(samples) / 160), 240)
    plain = FeatureStore().get(LogMelSource(deltas=False), tables["dev"], name="mel")
    assert torch.equal(plain.frames[0], loud.frames[0][:, :, :80])


def test_targets_longer_than_their_audio_are_counted(
    tables: dict[str, Table], encoder: Encoder, store: FeatureStore
) -> None:
    changed = tables | {part: _changed(tables[part], 3, digits="0" * 500) for part in ("train", "test")}
    (result,) = _run(encoder, changed, ProbeSettings("digits", steps=1), store, baselines=())
    assert [size.infeasible for size in result.runs[0].parts.values()] == [1, 0, 1]
    assert result.mean == 1.0  # the test part's targets count as errors although they do not fit


def test_recordings_that_cannot_be_used_are_named(tables: dict[str, Table], encoder: Encoder, tmp_path: Path) -> None:
    rows = list(tables["train"].rows)
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "short.wav", np.zeros(800), 16000)
    for number, name in enumerate(("missing.wav", "text.wav", "short.wav")):
        rows[number] = dataclasses.replace(rows[number], path=tmp_path / name)
    train = dataclasses.replace(tables["train"], rows=tuple(rows))
    settings = ProbeSettings("speaker", steps=1)
    (result,) = run_probe({"mine": encoder}, train, tables["dev"], tables["test"], settings=settings, baselines=())
    missing, text, short = result.problems
    assert missing.startswith(f"{tmp_path / 'missing.wav'} does not exist")
    assert text.startswith(f"{tmp_path / 'text.wav'} does not open as audio")
    assert short == f"{tmp_path / 'short.wav'} is shorter than 0.1 s"
    assert result.runs[0].parts["train"].recordings == 21
    nothing = dataclasses.replace(train, rows=train.rows[:3])
    with pytest.raises(ValueError, match=r"no recording can be used; .*missing\.wav does not exist"):
        FeatureStore().get(LogMelSource(), nothing, name="mel")


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"target": "speaker"}, {"speaker": "s9"}, r"5\.wav has speaker 's9', which does not occur in the training"),
        ({"target": "digits"}, {"digits": "04"}, r"5\.wav has '4' in its label, which does not occur in the training"),
        ({"target": "phones"}, {"digits": "0a"}, r"5\.wav has 'a' in column 'digits'; expected only digits"),
        ({"target": "voice"}, {}, "no column 'voice'; choose one of speaker, digits"),
        ({"target": "digits", "folds": "voice"}, {}, "no column 'voice'"),
        ({"target": "digits", "folds": "speaker", "fold_size": 3}, {}, r"fold_size: must be .* \(4: .*; got 3"),
    ],
)
def test_labels_that_do_not_serve(
    tables: dict[str, Table], encoder: Encoder, settings: dict[str, Any], change: dict[str, str], message: str
) -> None:
    test = _changed(tables["test"], 5, **change)
    with pytest.raises(ValueError, match=message):
        run_probe({"mine": encoder}, tables["train"], tables["dev"], test, settings=ProbeSettings(**settings))


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "asr"},
        {"target": "digits", "segment_s": 1.0},
        {"segment_s": 0.01},
        {"learning_rates": ()},
        {"learning_rates": (0.0,)},
        {"steps": 0},
        {"seeds": 0},
        {"fold_size": 0},
        {"batch_s": 0.0},
        {"context_s": -1.0},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        ProbeSettings(**{"target": "speaker", **wrong})


def test_features_that_are_not_finite_name_encoder_and_file(tables: dict[str, Table], encoder: Encoder) -> None:
    broken = Encoder(_CONFIG)
    broken.load_state_dict(encoder.state_dict())
    torch.nn.init.constant_(broken.feature_projection.projection.bias, float("nan"))
    with pytest.raises(ValueError, match=r"theirs: the features of .*0\.wav contain NaN or infinite values"):
        run_probe({"theirs": broken}, tables["train"], tables["dev"], tables["test"], ProbeSettings("digits"))


def test_command(
    tables: dict[str, Table], encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        encoder.save_pretrained(tmp_path / name)
    paths = {part: table.name for part, table in tables.items()}
    output = tmp_path / "new" / "probe.json"
    arguments = ["probe", str(tmp_path / "a"), paths["train"], "--target", "digits", "--output", str(output)]
    small = ["--steps", "2", "--learning_rates", "[1e-3,1e-2]", "--device", "cpu"]
    parts = ["--dev", paths["dev"], "--test", paths["test"]]
    assert cli.main([*arguments, *small, *parts, "--compare", str(tmp_path / "b")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "symbol error rate, lower is better; runs: 3" in text
    assert "divided" not in text
    written = json.loads(output.read_text())
    names = [result["encoder"] for result in written["results"]]
    assert names == [str(tmp_path / "a"), str(tmp_path / "b"), LOG_MEL, RANDOM]
    assert (written["settings"]["task"], written["settings"]["seeds"]) == ("ctc", 3)
    assert written["settings"]["learning_rates"] == [1e-3, 1e-2]
    assert written["results"][0]["runs"][2]["parts"]["train"]["examples"] == 24
    assert written["results"][0]["mean"] == written["results"][1]["mean"]

    assert cli.main([*arguments, *small, "--seeds", "1"]) == 0
    assert "is divided 70:15:15 by a hash of the file names" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*arguments, *parts[:2]]) == 1
    assert "--dev and --test: give both of them, or neither" in capsys.readouterr().err
    assert cli.main([*arguments, *parts, "--compare", str(tmp_path / "a")]) == 1
    assert "give each model only once" in capsys.readouterr().err
    assert written["settings"]["rules"] == RULES
    assert cli.main([*arguments, *small, *parts, "--seeds", "1", "--rules", "1"]) == 0
    assert json.loads(output.read_text())["settings"]["rules"] == 1
    assert cli.main([*arguments, *parts, "--rules", "99"]) == 1
    assert "--rules: must be from 1 to" in capsys.readouterr().err


def test_tables_are_read_by_their_rules(tables: dict[str, Table], tmp_path: Path) -> None:
    """Version 1 averages channels that cancel, version 2 reads one of them."""
    samples = 0.1 * np.random.default_rng(0).standard_normal(32000)
    soundfile.write(tmp_path / "opposite.wav", np.stack([samples, -samples], axis=1), 16000)
    (tmp_path / "table.tsv").write_text("path\tspeaker\nopposite.wav\ta\n")
    store = FeatureStore()
    loudest = []
    for rules in (1, 2):
        table = read_table(tmp_path / "table.tsv", rules=rules)
        (part,) = (part for part in split_table(table) if part.rows)
        assert part.rules == rules
        (frames,) = store.get(LogMelSource(deltas=False), part, name="mel").frames
        loudest.append(float(frames.max()))
    assert loudest[0] < loudest[1] - 5  # by more than 20 dB
