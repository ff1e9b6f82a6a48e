"""Test the schedules of learning rate and temperature, refused settings, and the metrics file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fastssl.models.wav2vec2 import GumbelTemperature
from fastssl.train.account import Account
from fastssl.train.config import DataConfig, OptimizerConfig, TrainerConfig
from fastssl.train.metrics_file import MetricsFile, read_metrics
from fastssl.train.monitors import Monitor


def test_learning_rate_rises_and_falls_linearly() -> None:
    config = OptimizerConfig(warmup_updates=4)
    factors = [config.lr_factor(update, 10) for update in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert config.lr_factor(10, 10) == 0
    assert OptimizerConfig(warmup_updates=0).lr_factor(0, 1) == 1
    assert OptimizerConfig(warmup_updates=10).lr_factor(4, 5) == 0.5


def test_temperature_falls_to_its_end() -> None:
    config = GumbelTemperature(start=2.0, end=0.5, decay=0.999)
    assert config.at(0) == 2.0
    assert config.at(100) == pytest.approx(2 * 0.999**100)
    assert config.at(10_000) == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(crop_s=0), r"data\.crop_s"),
        (lambda: DataConfig(crop_s=90), r"data\.crop_s: must be at most data\.max_duration_s=87\.5, got 90"),
        (lambda: DataConfig(valid=1.0), r"data\.valid"),
        (lambda: OptimizerConfig(lr=0), r"optimizer\.lr"),
        (lambda: OptimizerConfig(clip_norm=-1), r"optimizer\.clip_norm"),
        (lambda: GumbelTemperature(end=0), r"gumbel_temperature\.end"),
        (lambda: TrainerConfig(max_steps=0), r"trainer\.max_steps"),
        (lambda: TrainerConfig(checkpoint_every=10, keep_every=15), r"trainer\.keep_every: must be a multiple"),
    ],
)
def test_settings_without_sense_are_named(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_metrics_file_drops_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, ["update", "loss", "valid_loss"])
    for update in range(1, 5):
        file.append({"update": update, "loss": 1 / update})
    file.append({"update": 4, "valid_loss": 0.5})
    with path.open("a") as broken:
        broken.write("5,0.")
    resumed = MetricsFile(path, ["update", "loss", "valid_loss"], resume_at=3)
    resumed.append({"update": 4, "loss": 7.0})
    assert [row["update"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert read_metrics(path)[-1] == {"update": 4, "loss": 7.0}
    MetricsFile(path, ["update", "loss", "valid_loss"])
    assert read_metrics(path) == []


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    good = "update,loss\r\n1,2.5\r\n"
    for content, line in (
        ("updat,loss\r\n", 1),
        (good + "2,x\r\n3,1\r\n", 3),
        (good + ",1\r\n", 3),
        (good + "2,1,1\r\n", 3),
        (good + "2,\xff\r\n", 3),
        (good + f"2,{'9' * 200_000}\r\n", 3),
    ):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=rf"metrics\.csv: line {line} is damaged, expected"):
            read_metrics(path)
    # A file from a spreadsheet; the number in its last line may be incomplete.
    path.write_text("\ufeff" + good + "2,1", encoding="utf-8")
    assert read_metrics(path) == [{"update": 1.0, "loss": 2.5}]
    path.write_text("")
    assert read_metrics(path) == []


def test_values_of_schedules_are_in_the_metrics(tmp_path: Path) -> None:
    monitor = Monitor(
        tmp_path,
        Account(1, 0.05, []),
        score_names=("prediction_loss",),
        counts_codes=True,
        columns=("temperature", "mixing"),
        log_every=1,
        resume_at=None,
    )
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=1)
    (tmp_path / "logs").mkdir()
    monitor.setup(trainer, cast(Any, None), "fit")
    monitor._window = {"masked_frames": 2.0, "utterances": 1.0, "loss": 2.0, "prediction_loss": 2.0}
    monitor._close_window(trainer, {"temperature": 2.0, "mixing": 0.25, "grad_norm": 1.0})
    (row,) = read_metrics(tmp_path / "metrics.csv")
    assert (row["temperature"], row["mixing"], row["grad_norm"], row["loss"]) == (2.0, 0.25, 1.0, 1.0)
