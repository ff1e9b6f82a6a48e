"""Test the comparison of training runs with those of another commit: which runs and results, and where runs resume."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.bits.compare import compare
from benchmarks.bits.record import Record, Results
from benchmarks.bits.runs import VARIATIONS, results_of, rewind, runs_of

UPDATES, HALF = 20, 10


def write_run(folder: Path, *, weight: float = 1.0, loss: str = "2.5", seconds: str = "3") -> Path:
    """Write the files of a finished run that the comparison reads."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "encoder").mkdir()
    for name, update in ((f"{HALF:07d}", HALF), (f"{UPDATES:07d}", UPDATES), ("last", UPDATES)):
        state = {"weight": torch.tensor([weight])}
        content = {"global_step": update, "state_dict": state, "optimizer_states": [state], "lr_schedulers": []}
        torch.save(content, folder / "checkpoints" / f"{name}.ckpt")
    (folder / "metrics.csv").write_text(f"update,loss,valid_loss,audio_s_per_s\n1,{loss},,{seconds}\n")
    save_file({"weight": torch.tensor([weight])}, folder / "encoder" / "model.safetensors")
    (folder / "encoder" / "config.json").write_text(json.dumps({"hidden_size": 4}))
    return folder


def recorded(run: Path) -> Results:
    record = Record()
    record.add("run/unbroken", results_of(run))
    return record.results


def different(one: Path, other: Path) -> set[str]:
    return set(compare(recorded(one), recorded(other))["run"].different)


def test_weights_optimiser_metrics_and_encoder_are_compared_and_the_clock_is_not(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    assert not different(run, write_run(tmp_path / "same", seconds="4"))
    assert different(run, write_run(tmp_path / "loss", loss="2.5000001")) == {"run/unbroken.metrics.loss"}
    assert different(run, write_run(tmp_path / "weight", weight=1 + 2**-23)) == {
        "run/unbroken.weights.weight",
        "run/unbroken.optimizer.0.weight",
        "run/unbroken.encoder.weight",
    }


def test_a_run_is_resumed_half_way_and_the_original_stays(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rewind(run, tmp_path / "copy", UPDATES)
    assert different(run, tmp_path / "copy") == {"run/unbroken.update"}
    assert results_of(tmp_path / "copy")["update"] == HALF
    assert [path.name for path in (tmp_path / "copy" / "checkpoints").iterdir()] == ["last.ckpt"]
    assert len(list((run / "checkpoints").iterdir())) == 3


def test_every_tiny_recipe_of_the_other_tree_is_run(tmp_path: Path) -> None:
    for name in ("old-tiny", "distil-tiny-ofa", "large"):
        (tmp_path / f"{name}.yaml").touch()
    runs = runs_of(tmp_path, "")
    assert set(runs) == {"old-tiny", "distil-tiny-ofa"} | set(VARIATIONS)
    assert {name: run.command for name, run in runs_of(tmp_path, "tiny-ofa").items()} == {
        "distil-tiny-ofa": "distill",
        "wav2vec2-tiny-ofa, segments": "pretrain",
    }
