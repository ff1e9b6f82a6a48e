"""Test `fastssl distill`: training with a teacher, resuming and exporting runs, and refused teachers."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from lhotse.cut import Cut

from fastssl import cli
from fastssl.data.audio import AudioError, read_waveform
from fastssl.eval.label.command import label
from fastssl.eval.label.settings import LabelSettings
from fastssl.interop import load_encoder
from fastssl.models.best_rq import BestRqForPreTraining
from fastssl.models.distillation import DistillationConfig
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.nn.feature_extractor import FeatureExtractor
from fastssl.packing import Packed
from fastssl.train.config import PretrainConfig
from fastssl.train.metrics_file import read_metrics
from fastssl.train.module import TrainingError
from fastssl.train.pretrain import pretrain
from fastssl.train.teacher import Teacher
from tests.tiny import write_recording
from tests.train.conftest import WORKER, MakeConfig, model_of, rewound

_SHAPE = {field.name: getattr(model_of("wav2vec2"), field.name) for field in dataclasses.fields(EncoderConfig)}
_TEACHER = EncoderConfig(**_SHAPE | {"num_hidden_layers": 3, "do_normalize": False})
_STUDENT: dict[str, Any] = _SHAPE | {"model_type": "hubert", "num_hidden_layers": 2, "feature_grad_mult": 0.0}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Make a teacher with random weights, large enough that its layers differ."""
    torch.manual_seed(7)
    encoder = Encoder(_TEACHER)
    for parameter in encoder.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    encoder.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def _distil(config: PretrainConfig, teacher: Path, **changes: Any) -> PretrainConfig:
    model = DistillationConfig(**_STUDENT | changes)
    return dataclasses.replace(config, system="distillation", model=model, teacher=str(teacher))


def test_an_old_student_keeps_its_version_of_randomness(make_config: MakeConfig, teacher: Path, tmp_path: Path) -> None:
    changes = {"trainer.max_steps": 4, "trainer.keep_every": 2}
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
    new = _distil(make_config(**changes), teacher, **dropout)
    old = dataclasses.replace(new, output=str(tmp_path / "old"), randomness=1)
    for config in (new, old):
        pretrain(config)
    resumed = rewound(old, tmp_path / "resumed", update=2)
    path = Path(resumed.output) / "config.yaml"
    path.write_text(path.read_text().replace("randomness: 1\n", ""))
    assert cli.main(["distill", "--output", resumed.output, "--resume"]) == 0
    new_encoder, old_encoder, found = (
        (Path(config.output) / "encoder" / "model.safetensors").read_bytes() for config in (new, old, resumed)
    )
    assert found == old_encoder != new_encoder


@pytest.mark.usefixtures("rendered")
@pytest.mark.parametrize("distillation", ["pred", "l2l"])
def test_a_student_learns(make_config: MakeConfig, teacher: Path, distillation: str) -> None:
    changes = {"trainer.max_steps": 40, "trainer.checkpoint_every": 40, "trainer.val_check_interval": 20}
    config = _distil(make_config(**changes), teacher, distillation=distillation)
    pretrain(config)
    run = Path(config.output)
    rows = read_metrics(run / "metrics.csv")
    training, held_out = ([row for row in rows if key in row] for key in ("distillation_loss", "valid_loss"))
    assert training[-1]["distillation_loss"] < 0.9 * training[0]["distillation_loss"]
    assert training[-1]["cosine_similarity"] > training[0]["cosine_similarity"] + 0.1
    assert held_out[-1]["valid_distillation_loss"] < held_out[0]["valid_distillation_loss"]
    assert (run / "report.png").is_file()
    kept = yaml.safe_load((run / "config.yaml").read_text())
    # The run's config records the settings that follow from the teacher.
    assert kept["teacher"] == str(teacher)
    assert (kept["model"]["teacher_hidden_size"], kept["model"]["teacher_num_hidden_layers"]) == (32, 3)
    assert kept["model"]["do_normalize"] is False
    encoder = load_encoder(run)
    assert encoder.config.model_type == "hubert"
    assert "distillation loss, on held-out" in (run / "encoder" / "README.md").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "hubert"},
        {"model_type": "wavlm", "num_buckets": 16, "max_bucket_distance": 40},
        {"model_type": "hubert", "do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
        {"model_type": "data2vec-audio", "num_conv_pos_embeddings": 5},
    ],
    ids=["hubert", "wavlm", "large", "data2vec"],
)
def test_any_teacher_and_recordings_of_other_rates(
    make_config: MakeConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    values = dataclasses.asdict(_TEACHER) | changes
    if changes["model_type"] == "data2vec-audio":
        # data2vec has only this front end.
        values |= {"feat_extract_norm": "layer", "num_conv_pos_embedding_groups": 16}
    torch.manual_seed(7)
    Encoder(EncoderConfig.from_dict(values)).save_pretrained(tmp_path / "teacher")
    audio = tmp_path / "audio"
    for index, rate in enumerate((8_000, 22_050, 16_000, 44_100, 8_000, 16_000)):
        samples = np.random.default_rng(index).standard_normal(round(2.3 * rate)) / 10
        audio.mkdir(exist_ok=True)
        soundfile.write(audio / f"{index}.wav", samples, rate)
    config = make_config(audio=audio, **{"trainer.max_steps": 2, "data.valid": 0.0})
    student = {"feature_grad_mult": 0.1, "initialise_from_teacher": True}
    pretrain(_distil(config, tmp_path / "teacher", **student))
    rows = [row for row in read_metrics(Path(config.output) / "metrics.csv") if "distillation_loss" in row]
    assert rows
    assert all(np.isfinite(row["distillation_loss"]) for row in rows)
    assert load_encoder(Path(config.output)).config.num_hidden_layers == 2


def test_a_frozen_front_end_runs_once_and_stays_the_teachers(
    make_config: MakeConfig, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = FeatureExtractor.forward

    def counted(self: FeatureExtractor, *given: Any) -> Any:
        calls.append(id(self))
        return forward(self, *given)

    monkeypatch.setattr(FeatureExtractor, "forward", counted)
    config = _distil(make_config(**{"trainer.max_steps": 3, "data.valid": 0}), teacher)
    pretrain(config)
    assert len(calls) == 3
    assert len(set(calls)) == 1
    theirs, ours = load_encoder(teacher).state_dict(), load_encoder(config.output).state_dict()
    for name, tensor in ours.items():
        if name.startswith("feature_extractor."):
            assert torch.equal(tensor, theirs[name]), name
    calls.clear()
    pretrain(
        _distil(make_config("trainable", **{"trainer.max_steps": 3, "data.valid": 0}), teacher, feature_grad_mult=0.1)
    )
    assert len(calls) == 6


def test_the_shared_front_end_changes_no_loss(
    make_config: MakeConfig, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = _distil(make_config("shared"), teacher)
    pretrain(shared)
    of = Teacher.of
    monkeypatch.setattr(Teacher, "of", lambda self, batch: (None, of(self, batch)[1]))
    apart = _distil(make_config("apart"), teacher)
    pretrain(apart)
    losses = [
        [row.get("distillation_loss") for row in read_metrics(Path(config.output) / "metrics.csv")]
        for config in (shared, apart)
    ]
    assert losses[0] == losses[1]


def test_a_resumed_run_ends_as_an_unbroken_one(
    make_config: MakeConfig, teacher: Path, recordings: Path, tmp_path: Path
) -> None:
    label(recordings, tmp_path / "segments", LabelSettings(clusters=7, segment_price=500.0), num_workers=0)
    changes = {**WORKER, "trainer.keep_every": 4, "data.segments": None}
    config = _distil(make_config("whole", **changes), teacher, compressor="integrate-and-fire")
    whole = dataclasses.replace(config, data=dataclasses.replace(config.data, segments=str(tmp_path / "segments")))
    pretrain(whole)
    broken = rewound(whole, tmp_path / "broken", update=4)
    pretrain(broken, resume=True)
    expected, found = (
        torch.load(Path(run.output) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (whole, broken)
    )
    assert not any("teacher" in name for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert read_metrics(Path(whole.output) / "metrics.csv")[-1]["valid_segment_loss"] > 0


def test_resume_goes_on_with_the_same_teacher_wherever_it_lies(
    make_config: MakeConfig, teacher: Path, tmp_path: Path
) -> None:
    config = _distil(make_config(**{"trainer.max_steps": 2}), teacher)
    pretrain(config)
    longer = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=3))
    before = (Path(config.output) / "checkpoints" / "last.ckpt").read_bytes()
    other = load_encoder(teacher)
    torch.nn.init.normal_(next(other.encoder.parameters()))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="--resume: --teacher no longer has the weights"):
        pretrain(dataclasses.replace(longer, teacher=str(tmp_path / "other")), resume=True)
    assert (Path(config.output) / "checkpoints" / "last.ckpt").read_bytes() == before
    moved = shutil.move(teacher, tmp_path / "moved")
    pretrain(dataclasses.replace(longer, teacher=str(moved)), resume=True)
    assert read_metrics(Path(config.output) / "metrics.csv")[-1]["update"] == 3


def _cached(config: PretrainConfig, folder: Path) -> PretrainConfig:
    data = dataclasses.replace(config.data, fixed_crops=True, teacher_cache=str(folder))
    return dataclasses.replace(config, data=data)


def test_kept_frames_teach_as_the_teacher_does(
    make_config: MakeConfig, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"data.fixed_crops": True}
    beside = _distil(make_config("beside", **changes), teacher)
    pretrain(beside)
    kept = _cached(_distil(make_config("kept", **WORKER), teacher), tmp_path / "cache")
    pretrain(kept)
    expected, found = (
        [
            row["distillation_loss"]
            for row in read_metrics(Path(run.output) / "metrics.csv")
            if "distillation_loss" in row
        ]
        for run in (beside, kept)
    )
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # the cache stores fp16

    # A second run finds all frames in the cache and never runs the teacher.
    def fail(self: Teacher, waveforms: Any) -> Any:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(Teacher, "encode", fail)
    again = dataclasses.replace(kept, output=str(tmp_path / "again"))
    pretrain(again)
    assert _weights(again).keys() == _weights(kept).keys()
    for name, tensor in _weights(kept).items():
        assert torch.equal(_weights(again)[name], tensor), name


def _weights(config: PretrainConfig) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(Path(config.output) / "checkpoints" / "last.ckpt", weights_only=True)[
        "state_dict"
    ]
    return state


def test_making_frames_goes_on_where_it_was_stopped(
    make_config: MakeConfig, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _cached(_distil(make_config("run", **{"trainer.max_steps": 2}), teacher), tmp_path / "cache")
    monkeypatch.setattr("fastssl.train.teacher_cache._SHARD_BYTES", 20_000)
    encode, seen = Teacher.encode, []

    def stops(self: Teacher, waveforms: Any) -> Any:
        seen.append(len(waveforms.layout.lengths))
        if len(seen) == 3:
            raise SystemExit
        return encode(self, waveforms)

    with monkeypatch.context() as patched:
        patched.setattr(Teacher, "encode", stops)
        with pytest.raises(SystemExit):
            pretrain(config)
    done = len((tmp_path / "cache" / "index.jsonl").read_text().splitlines())
    assert 0 < done < 14
    shutil.rmtree(config.output)
    seen.clear()

    def counted(self: Teacher, waveforms: Any) -> Any:
        seen.append(len(waveforms.layout.lengths))
        return encode(self, waveforms)

    monkeypatch.setattr(Teacher, "encode", counted)
    pretrain(config)
    assert sum(seen) == 14 - done
    assert len((tmp_path / "cache" / "index.jsonl").read_text().splitlines()) == 14


def test_a_stale_cache_is_refused(make_config: MakeConfig, teacher: Path, recordings: Path, tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    shutil.copytree(recordings, audio)
    config = _cached(_distil(make_config("run", audio=audio, **{"trainer.max_steps": 1}), teacher), tmp_path / "cache")
    pretrain(config)
    other = dataclasses.replace(config, output=str(tmp_path / "other"))
    with pytest.raises(
        ValueError, match=r"data\.teacher_cache: .* was begun with other settings \(crop_s: 2 there, 1 now\)"
    ):
        pretrain(dataclasses.replace(other, data=dataclasses.replace(other.data, crop_s=1)))
    with pytest.raises(ValueError, match=r"layers: \[1, 2, 3\] there, \[3\] now"):
        pretrain(_cached(_distil(make_config("l"), teacher, teacher_layers=(3,)), tmp_path / "cache"))
    shard = tmp_path / "cache" / "teacher-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"data\.teacher_cache: .*teacher-00000\.safetensors: cannot be read"):
        pretrain(other)
    shard.write_bytes(whole)
    assert not Path(other.output).exists()
    write_recording(audio / "speaker0" / "03.wav", 3.3, seed=99)
    with pytest.raises(ValueError, match=r"is stale: .*03\.wav was 1\.69\S* s at 16000 Hz, and is 3\.3 s"):
        pretrain(other)
    assert not Path(other.output).exists()
    with pytest.raises(ValueError, match="crops that change cannot be cached"):
        dataclasses.replace(config.data, fixed_crops=False)
    with pytest.raises(ValueError, match=r"data\.teacher_cache: wav2vec2 has no teacher"):
        make_config("plain", **{"data.crop_s": None, "data.teacher_cache": "somewhere"})


def test_other_recordings_of_the_same_names_and_lengths_are_not_taken_for_those_of_a_cache(
    make_config: MakeConfig, teacher: Path, recordings: Path, tmp_path: Path
) -> None:
    audio = tmp_path / "audio"
    shutil.copytree(recordings, audio)
    config = _cached(_distil(make_config("run", audio=audio, **{"trainer.max_steps": 1}), teacher), tmp_path / "cache")
    pretrain(config)
    for path in audio.rglob("*.wav"):
        samples, rate = soundfile.read(path)
        soundfile.write(path, samples[::-1], rate)
    with pytest.raises(TrainingError, match=r"other samples than when data\.teacher_cache was made; .*cache is stale"):
        pretrain(dataclasses.replace(config, output=str(tmp_path / "other")))


def test_recordings_that_cannot_be_read_are_left_out(
    make_config: MakeConfig, teacher: Path, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording with a good header but damaged samples is left out of the cache and of later runs."""
    read = read_waveform

    def fails(cut: Cut, **options: Any) -> Any:
        if cut.id.endswith("04.wav"):
            raise AudioError("is damaged")
        return read(cut, **options)

    monkeypatch.setattr("fastssl.data.batches.read_waveform", fails)
    changes = {"data.max_bad_fraction": 0.2, "trainer.max_steps": 3, "data.num_workers": 0}
    config = _cached(_distil(make_config("run", **changes), teacher), tmp_path / "cache")
    pretrain(config)
    assert len((tmp_path / "cache" / "index.jsonl").read_text().splitlines()) == 13
    assert "04.wav is damaged" in (Path(config.output) / "logs" / "pretrain.log").read_text()
    pretrain(dataclasses.replace(config, output=str(tmp_path / "again")))  # knows the damaged recording from the cache
    few = dataclasses.replace(config.data, max_bad_fraction=0.01)
    with pytest.raises(ValueError, match=r"the teacher has no frames for 1 of 14 crops, .*=0\.01 allows"):
        pretrain(dataclasses.replace(config, output=str(tmp_path / "few"), data=few))


def test_held_out_folders_have_frames_of_their_own(make_config: MakeConfig, teacher: Path, tmp_path: Path) -> None:
    """Files with the same name in the training and held-out folders must get different frames."""
    for folder, seed in (("train", 0), ("valid", 100)):
        for index in range(4):
            write_recording(tmp_path / folder / f"{index}.wav", 3.0, seed=seed + index)
    changes = {"data.valid": str(tmp_path / "valid"), "trainer.max_steps": 4, "data.fixed_crops": True}
    beside = _distil(make_config("beside", audio=tmp_path / "train", **changes), teacher)
    kept = _cached(dataclasses.replace(beside, output=str(tmp_path / "kept")), tmp_path / "cache")
    for config in (beside, kept):
        pretrain(config)
    assert len((tmp_path / "cache" / "index.jsonl").read_text().splitlines()) == 8
    expected, found = (read_metrics(Path(config.output) / "metrics.csv") for config in (beside, kept))
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("distillation_loss", "valid_distillation_loss"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3)


def test_windows_of_long_recordings_are_kept_as_often_as_they_are_drawn(
    make_config: MakeConfig, teacher: Path, tmp_path: Path
) -> None:
    write_recording(tmp_path / "audio" / "long.wav", 21.0, seed=3)
    write_recording(tmp_path / "audio" / "short.wav", 3.0, seed=4)
    changes = {"data.valid": 0, "data.window_s": 10.0, "trainer.max_steps": 12}
    config = _cached(_distil(make_config("run", audio=tmp_path / "audio", **changes), teacher), tmp_path / "cache")
    pretrain(config)
    keys = [json.loads(line)["key"] for line in (tmp_path / "cache" / "index.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) > 8
    assert any(key.endswith("#1") for key in keys)


def test_frozen_convolutions_must_be_the_teachers(make_config: MakeConfig, teacher: Path) -> None:
    for changes in ({"conv_dim": (8,) * 7}, {"initialise_from_teacher": False}):
        config = _distil(make_config(), teacher, **changes)
        with pytest.raises(ValueError, match=r"model\.feature_grad_mult: 0 freezes the convolutions"):
            pretrain(config)
    assert not Path(config.output).exists()


def test_the_command(recordings: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {name: list(value) if isinstance(value, tuple) else value for name, value in _STUDENT.items()}
    data = {"max_duration_s": 6, "crop_s": 2, "min_duration_s": 1}
    settings = {"system": "distillation", "model": shape, "data": data}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    given = [str(recordings), "--recipe", str(tmp_path / "small.yaml"), "--trainer.max_steps", "2"]
    given += ["--trainer.progress", "false", "--data.num_workers", "0"]
    assert cli.main(["distill", *given, "--teacher", str(teacher), "--output", str(tmp_path / "run")]) == 0
    assert load_encoder(tmp_path / "run").config.num_hidden_layers == 2
    assert cli.main(["distill", "--output", str(tmp_path / "run"), "--resume", "--trainer.max_steps", "3"]) == 0
    assert cli.main(["distill", *given, "--output", str(tmp_path / "none")]) == 1
    assert "--teacher: is missing" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert cli.main(["pretrain", str(recordings), "--recipe", "distilhubert", "--output", str(tmp_path / "none")]) == 1
    assert "distilhubert is for `fastssl distill`; pretrain accepts best-rq-base" in capsys.readouterr().err
    assert cli.main(["distill", str(recordings), "--recipe", "hubert-tiny", "--output", str(tmp_path / "none")]) == 1
    assert "hubert-tiny is for `fastssl pretrain`; distill accepts distil-12l-half" in capsys.readouterr().err
    config = str(tmp_path / "run" / "config.yaml")
    assert cli.main(["pretrain", "--config", config, "--output", str(tmp_path / "none")]) == 1
    assert "is for `fastssl distill`" in capsys.readouterr().err


def test_teachers_that_do_not_serve(make_config: MakeConfig, make_system: Any, teacher: Path, tmp_path: Path) -> None:
    plain = make_config()
    with pytest.raises(ValueError, match="teacher: wav2vec2 learns from audio"):
        dataclasses.replace(plain, teacher=str(teacher))
    with pytest.raises(ValueError, match="no such file or folder"):
        pretrain(_distil(plain, tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"--teacher: .*the teacher has layers 0 to 3, got \[4, 8\]"):
        pretrain(_distil(plain, teacher, teacher_layers=(4, 8)))
    BestRqForPreTraining(model_of("best-rq")).speech_encoder.save_pretrained(tmp_path / "best-rq")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has log-mel frames at 25 Hz"):
        pretrain(_distil(plain, tmp_path / "best-rq"))
    average = EncoderConfig(**_SHAPE | {"compressor": "average", "compressor_factor": 2})
    Encoder(average).save_pretrained(tmp_path / "average")
    with pytest.raises(ValueError, match="leaves fewer frames than the student has to predict"):
        pretrain(_distil(plain, tmp_path / "average"))
    config = (teacher / "preprocessor_config.json").read_text()
    (teacher / "preprocessor_config.json").write_text(config.replace("16000", "8000"))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: sampling_rate is 8000, expected 16000"):
        pretrain(_distil(plain, teacher))
    assert not Path(plain.output).exists()


def test_a_compressed_teacher_teaches_all_its_frames(make_config: MakeConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    Encoder(EncoderConfig(**_SHAPE | {"compressor": "integrate-and-fire"})).save_pretrained(tmp_path / "ofa")
    config = _distil(make_config(**{"trainer.max_steps": 2}), tmp_path / "ofa")
    pretrain(config)
    assert read_metrics(Path(config.output) / "metrics.csv")[0]["distillation_loss"] > 0


def test_a_teacher_moves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Module.to` visits every tensor, so a teacher that is already on the device is not moved again."""
    teacher, moved = Teacher(Encoder(_TEACHER), [1], gives_frames=False), []
    to = Encoder.to

    def spy(encoder: Encoder, device: Any) -> Any:
        moved.append(device)
        return to(encoder, device)

    monkeypatch.setattr(Encoder, "to", spy)
    waveforms = Packed.pack([torch.randn(4000, 1)])
    teacher.encoder.to("meta")
    with pytest.raises(NotImplementedError, match="meta"):  # moved, but from a device without data
        teacher.encode(waveforms)
    teacher = Teacher(Encoder(_TEACHER), [1], gives_frames=False)
    moved.clear()
    for _ in range(2):
        teacher.encode(waveforms)
    assert not moved


@pytest.mark.gpu
def test_a_teacher_is_reduced_on_a_gpu_and_its_frames_are_not() -> None:
    torch.manual_seed(0)
    encoder = Encoder(_TEACHER)
    waveforms = Packed.pack([torch.randn(16_000, 1), torch.randn(9_000, 1)])
    exact_frames, exact_layers = Teacher(encoder, [1, 3], gives_frames=True).encode(waveforms)
    frames, layers = Teacher(encoder, [1, 3], gives_frames=True).encode(waveforms.to("cuda"))
    assert frames.values.dtype == torch.float32
    torch.testing.assert_close(frames.values.cpu(), exact_frames.values, rtol=1e-3, atol=1e-4)
    for layer, exact in zip(layers, exact_layers, strict=True):
        difference = (layer.float().cpu() - exact).abs().mean()
        assert 1e-4 < difference < 0.05  # close, but rounded to bf16
