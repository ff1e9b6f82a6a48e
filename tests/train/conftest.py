"""A corpus of a few seconds and a model of a few thousand parameters."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from fastssl.models.best_rq import BestRqConfig
from fastssl.models.distillation import DistillationConfig
from fastssl.models.encoder import EncoderConfig
from fastssl.models.hubert import HubertConfig
from fastssl.models.wav2vec2 import GumbelTemperature, Wav2Vec2Config
from fastssl.train.checkpoints import saved_update
from fastssl.train.config import (
    DataConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainerConfig,
    write_config,
)
from fastssl.train.systems import ModelConfig

MakeConfig = Callable[..., PretrainConfig]
MakeSystem = Callable[[PretrainConfig, str], PretrainConfig]

_MODEL = Wav2Vec2Config(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    activation_dropout=0.1,
    feat_proj_dropout=0.0,
    feat_quantizer_dropout=0.1,
    layerdrop=0.2,
    do_normalize=True,
    feature_grad_mult=1.0,
    conv_dim=(16,) * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    num_codevectors_per_group=8,
    codevector_dim=16,
    proj_codevector_dim=16,
    gumbel_temperature=GumbelTemperature(decay=0.9),
)
WITHOUT_DROPOUT = {
    f"model.{name}": 0.0
    for name in ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_quantizer_dropout", "layerdrop")
}


def model_of(system: str) -> ModelConfig:
    """The settings of a tiny model without dropout."""
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
    wav2vec2 = dataclasses.replace(_MODEL, **plain)
    if system == "wav2vec2":
        return wav2vec2
    shape = {field.name: getattr(wav2vec2, field.name) for field in dataclasses.fields(EncoderConfig)}
    if system == "distillation":
        return DistillationConfig(**shape | {"model_type": "hubert", "teacher_hidden_size": 32})
    return HubertConfig(**shape | {"model_type": "hubert", "num_clusters": 7, "final_dim": 8})


def write_recording(path: Path, seconds: float, seed: int) -> None:
    """Noise that comes and goes."""
    random = np.random.default_rng(seed)
    samples = random.standard_normal(round(16000 * seconds)).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples * (0.02 + 0.1 * np.abs(np.sin(np.arange(len(samples)) / 1600))), 16000)


def rewound(config: PretrainConfig, output: Path, *, update: int) -> PretrainConfig:
    """A copy of a finished run that stands behind a checkpoint which it kept (`trainer.keep_every`)."""
    shutil.copytree(config.output, output)
    (output / "checkpoints" / f"{update:07d}.ckpt").replace(output / "checkpoints" / "last.ckpt")
    assert saved_update(output / "checkpoints" / "last.ckpt") == update
    return dataclasses.replace(config, output=str(output))


def as_yaml_file(config: PretrainConfig, folder: Path) -> Path:
    """Settings for `--config`."""
    path = folder / "settings.yaml"
    write_config(config, path)
    return path


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen recordings of 1 to 4 seconds."""
    folder = tmp_path_factory.mktemp("recordings")
    for index in range(14):
        write_recording(folder / f"speaker{index % 3}" / f"{index:02d}.wav", 1.0 + 3.0 * index / 13, seed=index)
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Two cores are shared with the decoding processes; and the processes of a test must add up in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_system() -> MakeSystem:
    """`make_system(config, "hubert")`: the same run of another system, without dropout."""

    def make(config: PretrainConfig, system: str) -> PretrainConfig:
        return dataclasses.replace(config, system=system, model=model_of(system))

    return make


@pytest.fixture
def make_config(recordings: Path, tmp_path: Path) -> MakeConfig:
    """`make_config("run", **{"trainer.max_steps": 4})`: the settings of a small run in the test's folder."""

    def make(
        output: str = "run", *, audio: Path = recordings, init: str | None = None, **changes: Any
    ) -> PretrainConfig:
        config = PretrainConfig(
            audio=str(audio),
            output=str(tmp_path / output),
            seed=3,
            init=init,
            model=_MODEL,
            data=DataConfig(max_duration_s=6, crop_s=2, min_duration_s=1, valid=0.2, num_workers=1),
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
