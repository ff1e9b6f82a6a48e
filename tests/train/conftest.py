"""Define fixtures for training tests: settings of short runs with tiny models on a few seconds of audio."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastssl.models.best_rq import BestRqConfig
from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.distillation import DistillationConfig
from fastssl.models.encoder import EncoderConfig
from fastssl.models.hubert import HubertConfig
from fastssl.models.wavlm import WavLMConfig
from fastssl.train.checkpoints import saved_update
from fastssl.train.config import (
    DataConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainerConfig,
    write_config,
)
from tests.tiny import TINY_MODEL

MakeConfig = Callable[..., PretrainConfig]
MakeSystem = Callable[[PretrainConfig, str], PretrainConfig]

#: Makes a run read audio in a worker process. Starting one takes longer than a short run needs to read its audio.
WORKER: dict[str, Any] = {"data.num_workers": 1}

WITHOUT_DROPOUT = {
    f"model.{name}": 0.0
    for name in ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_quantizer_dropout", "layerdrop")
}


def model_of(system: str) -> SpeechEncoderConfig:
    """Return the settings of a tiny model without dropout."""
    if system == "best-rq":
        return BestRqConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            layerdrop=0.0,
            conv_dim=(16, 16),
            conv_depthwise_kernel_size=7,
            mask_time_prob=0.4,
            mask_time_length=3,
            codebook_size=13,
        )
    plain: dict[str, Any] = {name.removeprefix("model."): value for name, value in WITHOUT_DROPOUT.items()}
    wav2vec2 = dataclasses.replace(TINY_MODEL, **plain)
    if system == "wav2vec2":
        return wav2vec2
    shape = {field.name: getattr(wav2vec2, field.name) for field in dataclasses.fields(EncoderConfig)}
    if system == "distillation":
        return DistillationConfig(**shape | {"model_type": "hubert", "teacher_hidden_size": 32})
    config = {"hubert": HubertConfig, "wavlm": WavLMConfig}[system]
    return config(**shape | {"model_type": system, "num_clusters": 7, "final_dim": 8})


def rewound(config: PretrainConfig, output: Path, *, update: int) -> PretrainConfig:
    """Copy a finished run as if it had been stopped at an earlier checkpoint (kept by `trainer.keep_every`)."""
    shutil.copytree(config.output, output)
    (output / "checkpoints" / f"{update:07d}.ckpt").replace(output / "checkpoints" / "last.ckpt")
    assert saved_update(output / "checkpoints" / "last.ckpt") == update
    return dataclasses.replace(config, output=str(output))


def as_yaml_file(config: PretrainConfig, folder: Path) -> Path:
    """Write the settings to a file for `--config`."""
    path = folder / "settings.yaml"
    write_config(config, path)
    return path


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture
def rendered() -> None:
    """Request this fixture in tests that look at RUN/report.png."""


@pytest.fixture(autouse=True)
def _unrendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw reports without rendering them to pixels, which takes matplotlib as long as a short run trains."""
    if "rendered" not in request.fixturenames:
        monkeypatch.setattr("fastssl.train.report.write_figure", lambda figure, path: path.touch())


@pytest.fixture
def make_system() -> MakeSystem:
    """Let `make_system(config, "hubert")` return the same run with another system's model, without dropout."""

    def make(config: PretrainConfig, system: str) -> PretrainConfig:
        return dataclasses.replace(config, system=system, model=model_of(system))

    return make


@pytest.fixture
def make_config(recordings: Path, tmp_path: Path) -> MakeConfig:
    """Let `make_config("run", **{"trainer.max_steps": 4})` return the settings of a small run in the test's folder."""

    def make(
        output: str = "run", *, audio: Path = recordings, init: str | None = None, **changes: Any
    ) -> PretrainConfig:
        config = PretrainConfig(
            audio=str(audio),
            output=str(tmp_path / output),
            seed=3,
            init=init,
            model=TINY_MODEL,
            data=DataConfig(max_duration_s=6, crop_s=2, min_duration_s=1, valid=0.2, num_workers=0),
            optimizer=OptimizerConfig(lr=2e-3, warmup_updates=3, clip_norm=5.0),
            trainer=TrainerConfig(
                max_steps=8, log_every=1, checkpoint_every=2, val_check_interval=4, accelerator="cpu", progress=False
            ),
        )
        for name, value in changes.items():
            group, key = name.split(".")
            config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{key: value})})
        return config

    return make
