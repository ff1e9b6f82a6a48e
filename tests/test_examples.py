"""Test the scripts in docs/examples: without the lines that name fastssl, they are Transformers' and learn the same."""

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import fastssl
from tests.tiny import write_recording

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
TRAINER, LOOP = "ctc_trainer.py", "accelerate_loop.py"

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
state = pytest.importorskip("accelerate.state", reason="accelerate is not installed").AcceleratorState


@pytest.fixture(autouse=True)
def _own_state_of_accelerate() -> Iterator[None]:
    state._reset_state(reset_partial_state=True)
    yield
    state._reset_state(reset_partial_state=True)


def without_fastssl(name: str, folder: Path) -> Path:
    """Write the script without the line that accelerates its model, and without the import that it needs."""
    docstring, code = (EXAMPLES / name).read_text().split('"""\n', 1)
    lines = code.splitlines(keepends=True)
    assert [line for line in lines if "fastssl" in line] == ["import fastssl\n", "    fastssl.accelerate(model)\n"]
    before = folder / f"before_{name}"
    before.write_text(docstring + '"""\n' + "".join(line for line in lines if "fastssl" not in line))
    return before


def losses_of(name: str, output: Path, printed: str) -> list[float]:
    """Return the losses of all logged steps, or of all epochs."""
    if name == TRAINER:
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]
    return [float(number) for number in re.findall(r"epoch \d+: loss ([\d.]+)", printed)]


def transcripts(folder: Path, speech: Path, longest: float = 99.0) -> list[str]:
    """Transcribe recordings with plain Transformers, one at a time, and check that acceleration changes nothing."""
    model: Any = transformers.Wav2Vec2ForCTC.from_pretrained(folder)
    processor: Any = transformers.Wav2Vec2Processor.from_pretrained(folder)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    with (speech / "utterances.tsv").open(newline="", encoding="utf-8") as table:
        rows = [row for row in csv.DictReader(table, delimiter="\t") if float(row["seconds"]) <= longest]
    samples = [soundfile.read(speech / row["path"], dtype="float32")[0] for row in rows]

    def transcribe(group: list[Any]) -> list[str]:
        with torch.no_grad():
            logits = model(**processor(group, sampling_rate=16_000, padding=True, return_tensors="pt")).logits
        texts: list[str] = processor.batch_decode(logits.argmax(-1))
        return texts

    alone = [text for one in samples for text in transcribe([one])]
    fastssl.accelerate(model)
    assert transcribe(samples) == alone
    return alone


def in_process(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    state._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture
def noises(tmp_path: Path) -> Path:
    """Make a few short recordings with transcripts."""
    folder = tmp_path / "noises"
    rows = [("path", "text", "seconds")]
    for index, text in enumerate(["A, b.", "Don't", "to be", "oh no", "six", "seven"]):
        seconds = 0.6 + 0.1 * index
        write_recording(folder / f"{index}.wav", seconds, seed=index)
        rows.append((f"{index}.wav", text, str(seconds)))
    (folder / "utterances.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    return folder


def test_every_example_is_tested() -> None:
    assert {TRAINER, LOOP} == set(NAMES)


@pytest.mark.filterwarnings("error:.*original code")
@pytest.mark.parametrize(("name", "options"), [(TRAINER, ["--lora"]), (LOOP, [])])
def test_two_updates_are_those_of_the_original(
    name: str,
    options: list[str],
    noises: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--lora" in options:
        pytest.importorskip("peft", reason="peft is not installed")
    accelerated: list[Any] = []
    accelerate = fastssl.accelerate
    monkeypatch.setattr(fastssl, "accelerate", lambda model: accelerated.append(accelerate(model)))
    options = [*options, "--steps", "2"] if name == TRAINER else [*options, "--epochs", "1"]
    found = []
    for script in (EXAMPLES / name, without_fastssl(name, tmp_path)):
        output = tmp_path / script.stem
        in_process(script, [str(noises), "--output", str(output), *options], monkeypatch)
        found.append(losses_of(name, output, capsys.readouterr().out))
    assert len(accelerated) == 1
    assert len(found[0]) == (2 if name == TRAINER else 1)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    monkeypatch.undo()
    assert len(transcripts(tmp_path / Path(name).stem, noises)) == 6


def run(script: Path, speech: Path, output: Path, *options: str, processes: int = 1) -> list[float]:
    """Run a script as a user does, on the CPU, and return its losses."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(script), str(speech), "--output", str(output)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "original code" not in done.stderr
    return losses_of(script.name.removeprefix("before_"), output, done.stdout)


@pytest.mark.slow
def test_training_on_speech_before_and_after(tmp_path: Path) -> None:
    """Minutes of training on synthesised speech, until both models know their recordings by heart."""
    pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("espeakng_loader", reason="espeakng_loader is not installed")
    from torchmetrics.functional.text import char_error_rate

    from fastssl.data.synthetic import speak_corpus

    speech = speak_corpus(tmp_path / "speech", minutes=10, speakers=4)
    short = ["--longest", "3.7", "--learning-rate", "1e-3"]
    scripts = {name: {"after": EXAMPLES / name, "before": without_fastssl(name, tmp_path)} for name in (TRAINER, LOOP)}

    def both(name: str, to: str, *options: str, processes: int = 1) -> list[float]:
        """Run the script before and after, for few updates, and expect the same losses and transcripts."""
        found = {
            when: run(script, speech, tmp_path / f"{to}-{when}", *short, *options, processes=processes)
            for when, script in scripts[name].items()
        }
        np.testing.assert_allclose(found["after"], found["before"], rtol=1e-3)
        texts = [transcripts(tmp_path / f"{to}-{when}", speech, 3.7) for when in found]
        assert texts[0] == texts[1]
        return found["after"]

    long = {
        when: run(script, speech, tmp_path / f"full-{when}", *short, "--steps", "250")
        for when, script in scripts[TRAINER].items()
    }
    # Rounding grows with training: first the losses are equal up to 1e-5, at the end they are similar.
    np.testing.assert_allclose(long["after"][:15], long["before"][:15], rtol=1e-5)
    np.testing.assert_allclose(long["after"], long["before"], rtol=0.1)
    assert long["after"][-1] < 0.5 < 3 < long["after"][0]
    after, before = (transcripts(tmp_path / f"full-{when}", speech, 3.7) for when in ("after", "before"))
    assert all(len(text) > 5 for text in after)
    assert char_error_rate(after[2:], before[2:]) < 0.1  # the first two are held out

    start = ["--model", str(tmp_path / "full-after")]
    both(TRAINER, "lora", *start, "--lora", "--steps", "20")
    curve = both(LOOP, "loop", *start, "--epochs", "4")
    resumed = ["--epochs", "4", "--resume", str(tmp_path / "loop-after" / "epoch-2")]
    assert run(EXAMPLES / LOOP, speech, tmp_path / "resumed", *short, *start, *resumed) == curve[2:]
    both(LOOP, "two", *start, "--epochs", "2", "--batch-size", "1", processes=2)
