"""Test HuBERT runs that learn from given labels, or from labels that the run makes itself."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from fastssl.data.labels import LABELS_FILE, read_lines
from fastssl.eval.label.command import label
from fastssl.eval.label.settings import LabelSettings
from fastssl.models.encoder import Encoder
from fastssl.models.hubert import HubertConfig
from fastssl.train.config import PretrainConfig, TrainerConfig
from fastssl.train.data import PretrainDataModule
from fastssl.train.metrics_file import read_metrics
from fastssl.train.pretrain import pretrain
from fastssl.train.run_labels import RunLabels, attach_given
from tests.tiny import write_recording
from tests.train.conftest import MakeConfig, MakeSystem

_SETTINGS = LabelSettings(clusters=7)


@pytest.fixture
def hubert(make_config: MakeConfig, make_system: MakeSystem) -> PretrainConfig:
    """Return the settings of a small HuBERT run."""
    return make_system(make_config(), "hubert")


@pytest.mark.usefixtures("rendered")
def test_run_makes_labels_learns_and_resumes(hubert: PretrainConfig, tmp_path: Path) -> None:
    hubert = dataclasses.replace(hubert, data=dataclasses.replace(hubert.data, num_workers=1))
    pretrain(hubert)
    run = Path(hubert.output)
    rows = read_metrics(run / "metrics.csv")
    assert rows[0]["prediction_loss"] > 0
    assert rows[0]["chance"] == pytest.approx(1 / 7)
    assert 1 < rows[0]["code_perplexity"] <= 7
    assert 0 < rows[-1]["valid_code_utilisation"] <= 1
    assert (run / "report.png").stat().st_size > 10_000
    model = AutoModel.from_pretrained(run / "encoder")
    assert type(model).__name__ == "HubertModel"

    # The same run, stopped in the middle and resumed.
    halves = dataclasses.replace(hubert, output=str(tmp_path / "halves"))
    half = dataclasses.replace(halves, trainer=dataclasses.replace(hubert.trainer, keep_every=4))
    pretrain(half)
    checkpoints = Path(half.output) / "checkpoints"
    (checkpoints / "0000004.ckpt").replace(checkpoints / "last.ckpt")
    pretrain(halves, resume=True)
    expected, found = (
        torch.load(Path(config.output) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for config in (hubert, halves)
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_all_processes_hear_why_the_first_failed(hubert: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise ValueError("no space is left")

    with monkeypatch.context() as patch:
        patch.setattr("fastssl.eval.label.command.fit", stop)
        with pytest.raises(ValueError, match="no space is left"):
            pretrain(hubert)
    other = PretrainDataModule(hubert.audio, hubert.data, normalize=True, seed=hubert.seed, accumulation=1)
    strategy = SimpleNamespace(broadcast=lambda _: ([], "no space is left"))  # from a failed first process
    other.trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="the first process failed: no space is left"):
        other.setup("fit")
    pretrain(hubert, resume=True)


def test_second_iteration_learns_the_labels_it_is_given(
    hubert: PretrainConfig, recordings: Path, tmp_path: Path
) -> None:
    assert isinstance(hubert.model, HubertConfig)
    Encoder(hubert.model).save_pretrained(tmp_path / "first")
    label(recordings, tmp_path / "labels", LabelSettings(model=str(tmp_path / "first"), clusters=5), num_workers=0)
    given = dataclasses.replace(hubert, data=dataclasses.replace(hubert.data, labels=str(tmp_path / "labels")))
    with pytest.raises(ValueError, match=r"has 5 classes, but the model has \d+; add --model\.num_clusters 5"):
        pretrain(given)
    given = dataclasses.replace(given, model=dataclasses.replace(hubert.model, num_clusters=5))

    # If recordings have no labels, the error names them and the run writes nothing.
    missing = json.loads((tmp_path / "labels" / LABELS_FILE).read_text().splitlines()[0])["id"]
    lines = (tmp_path / "labels" / LABELS_FILE).read_text().splitlines(keepends=True)
    (tmp_path / "labels" / LABELS_FILE).write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match=rf"data\.labels: 1 of \d+ recordings[^$]*{missing} has no labels in"):
        pretrain(given)
    assert not Path(given.output).exists()
    (tmp_path / "labels" / LABELS_FILE).write_text("".join(lines))

    # A separate folder of held-out recordings is labelled with the same k-means.
    held_out = tmp_path / "held_out"
    write_recording(held_out / "00.wav", 2.0, seed=70)
    short = TrainerConfig(**dataclasses.asdict(hubert.trainer) | {"max_steps": 4})
    given = dataclasses.replace(given, data=dataclasses.replace(given.data, valid=str(held_out)), trainer=short)
    pretrain(given)
    centres = [
        load_file(folder / "kmeans.safetensors")["centres"]
        for folder in (tmp_path / "labels", Path(given.output) / "labels-valid")
    ]
    assert torch.equal(*centres)
    assert "valid_prediction_loss" in read_metrics(Path(given.output) / "metrics.csv")[-1]


def test_recordings_without_labels_are_named_and_the_others_used(
    hubert: PretrainConfig, recordings: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "labels"
    label(recordings, folder, _SETTINGS, num_workers=0)
    lines = list(read_lines(folder / LABELS_FILE))
    whole = PretrainDataModule(hubert.audio, hubert.data, normalize=True, seed=hubert.seed, accumulation=1)
    assert whole.valid_corpus is not None
    held_out = [cut.id for cut in whole.valid_corpus.cuts]
    assert len(held_out) == 3

    def given(missing: list[str], max_bad_fraction: float) -> PretrainConfig:
        kept = [json.dumps(line) + "\n" for line in lines if line["id"] not in missing]
        (folder / LABELS_FILE).write_text("".join(kept))
        data = dataclasses.replace(hubert.data, labels=str(folder), max_bad_fraction=max_bad_fraction)
        return dataclasses.replace(hubert, data=data, trainer=dataclasses.replace(hubert.trainer, max_steps=1))

    # Missing labels for one recording of fourteen are tolerated, even though it is one of only three held out.
    pretrain(given(held_out[:1], 0.1))
    log = (Path(hubert.output) / "logs" / "pretrain.log").read_text()
    assert f"left out: {recordings / held_out[0]} has no labels in {folder}" in log
    assert "held out: 2 recordings" in log
    shutil.rmtree(hubert.output)
    with pytest.raises(ValueError, match=r"3 of 14 recordings have no matching labels, .* all that are held out"):
        pretrain(given(held_out, 0.5))
    assert not Path(hubert.output).exists()


def test_labels_of_another_channel_are_told(hubert: PretrainConfig, recordings: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "labels", Path(hubert.output) / "logs" / "pretrain.log"
    label(recordings, folder, dataclasses.replace(_SETTINGS, channel=0), num_workers=0)
    for channel in (0, None):
        data = dataclasses.replace(hubert.data, labels=str(folder), channel=channel)
        pretrain(dataclasses.replace(hubert, data=data, trainer=dataclasses.replace(hubert.trainer, max_steps=1)))
        told = f"data.labels: {folder} were made from channel 0, but the run reads all channels" in log.read_text()
        assert told == (channel is None)
        shutil.rmtree(hubert.output)


def test_held_out_recordings_that_do_not_decode_stop_nothing(hubert: PretrainConfig, tmp_path: Path) -> None:
    for index in range(3):
        write_recording(tmp_path / "held_out" / f"{index}.wav", 1.5, seed=80 + index)
    hollow = tmp_path / "held_out" / "1.wav"
    soundfile.write(hollow, np.full(24000, np.nan, np.float32), 16000, subtype="FLOAT")
    data = dataclasses.replace(hubert.data, valid=str(tmp_path / "held_out"))
    pretrain(dataclasses.replace(hubert, data=data, trainer=dataclasses.replace(hubert.trainer, max_steps=1)))
    assert f"left out: {hollow} has samples that" in (Path(hubert.output) / "logs" / "pretrain.log").read_text()
    assert "valid_accuracy" in read_metrics(Path(hubert.output) / "metrics.csv")[-1]


def test_labels_are_refused_where_nothing_learns_from_them(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"data\.labels: wav2vec2 learns from audio alone"):
        make_config(**{"data.labels": "somewhere"})


def test_labels_by_other_rules_are_used_where_they_fit(
    hubert: PretrainConfig, recordings: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "labels"
    label(recordings, folder, dataclasses.replace(_SETTINGS, rules=1), num_workers=0)
    config = dataclasses.replace(hubert, data=dataclasses.replace(hubert.data, labels=str(folder)))
    data = PretrainDataModule(config.audio, config.data, normalize=True, seed=config.seed, accumulation=1)
    given = attach_given(config, data)
    RunLabels(tmp_path / "run", config, data, given).make()
    assert f"{folder} were made by version 1 of the rules for decoding, but the run uses version 2" in caplog.text
    lines = (folder / LABELS_FILE).read_text().splitlines(keepends=True)
    (folder / LABELS_FILE).write_text("".join(lines[2:]))
    with pytest.raises(ValueError, match=r"has no labels in [^$]*make them again, or add --data\.rules 1"):
        attach_given(config, data)
