"""Kills and full disks at any moment: the next start continues, and ends with the bits of an unbroken run."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.train.systems import build_model
from tests.soak.cases import generator
from tests.soak.commands import NAMES, Command, check_again, differences, last_lines, make, result, start
from tests.soak.conftest import Count
from tests.train.conftest import MakeConfig, model_of

Unbroken = dict[str, tuple[Command, dict[str, Any], float]]
_RUN = {"trainer.max_steps": 12, "trainer.checkpoint_every": 2, "trainer.val_check_interval": 4}


@pytest.fixture
def encoder() -> SpeechEncoder:
    return build_model(model_of("hubert")).speech_encoder.eval()


def _unbroken(name: str, known: Unbroken, make_config: MakeConfig, tmp_path: Path, encoder: SpeechEncoder) -> Command:
    """Run a command once without interruption, and keep its result and its time."""
    if name not in known:
        command = make(name, make_config(**_RUN), tmp_path, encoder)
        ended = start(command, tmp_path / f"{name}-unbroken")
        assert ended.status == 0, last_lines(ended.stderr)
        known[name] = (command, result(tmp_path / f"{name}-unbroken"), ended.seconds)
    return known[name][0]


def test_killed_commands_end_like_unbroken_ones(
    make_config: MakeConfig, tmp_path: Path, encoder: SpeechEncoder, count: Count, seed: int
) -> None:
    known: Unbroken = {}
    kills, case = 0, 0
    while kills < count(6):
        random = generator(seed, case)
        name = NAMES[case % len(NAMES)]
        command = _unbroken(name, known, make_config, tmp_path, encoder)
        _, expected, seconds = known[name]
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        output, story = tmp_path / f"{name}-{case}", [f"{name}, case {case}"]
        # Most of the time goes to imports, so kill in the second half, where the folder is being written.
        for _ in range(random.choice((1, 2, 3))):
            ended = start(command, output, kill_after_s=seconds * random.uniform(0.4, 1.0))
            story.append(f"status {ended.status} after {ended.seconds:.2f} s")
            assert ended.status in (0, -9), "\n".join([*story, last_lines(ended.stderr)])
            kills += ended.status != 0
        check_again(command, output, expected, story)
        shutil.rmtree(output)
        case += 1
    print(f"{kills} kills in {case} runs")


def test_full_disk_is_named_and_loses_nothing(
    make_config: MakeConfig, tmp_path: Path, encoder: SpeechEncoder, count: Count, seed: int
) -> None:
    known: Unbroken = {}
    failed = 0
    for case in range(count(6)):
        random = generator(seed, case)
        name = NAMES[case % len(NAMES)]
        command = _unbroken(name, known, make_config, tmp_path, encoder)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        output = tmp_path / f"{name}-{case}"
        sizes = [path.stat().st_size for path in (tmp_path / f"{name}-unbroken").rglob("*") if path.is_file()]
        file_bytes = round(math.exp(random.uniform(math.log(10), math.log(max(sizes)))))
        ended = start(command, output, file_bytes=file_bytes)
        story = [f"{name}, case {case}: files of at most {file_bytes} bytes, status {ended.status}"]
        if ended.status != 0:
            failed += 1
            line = last_lines(ended.stderr, 1)
            named = line.startswith(f"fastssl {command.arguments[0]}: ") and "--" in line
            clean = ended.status == 1 and named and "Traceback" not in ended.stderr
            assert clean, "\n".join([*story, last_lines(ended.stderr, 30)])
        check_again(command, output, known[name][1], story)
    assert failed, "no disk was full"
    print(f"{failed} full disks")


def test_differences_are_seen(tmp_path: Path) -> None:
    one: dict[str, Any] = {"metrics": [1], "tensors": {"weight": [1, 2]}}
    assert differences(one, {"metrics": [1], "tensors": {"weight": [1, 2]}}) == []
    assert differences(one, {"metrics": [2], "tensors": {"weight": [1, 3]}}) == ["metrics", "weight"]
    assert differences({"tensors": {}}, {"tensors": {"weight": [1]}}) == ["weight"]
