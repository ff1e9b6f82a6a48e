"""Test that every file name that Linux allows works: in every command, in every file that it writes, and on screen."""

import ast
import csv
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from jsonargparse import get_loader
from lhotse import CutSet, Recording
from lhotse.audio import AudioSource
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastssl
from fastssl import cli
from fastssl.cli.console import log_to_console
from fastssl.data.audio import read_waveform
from fastssl.data.batches import utterance_id
from fastssl.data.corpus import Problem, list_some, open_corpus, split_corpus
from fastssl.data.labels import LabelTable
from fastssl.data.teacher_frames import crop_key
from fastssl.eval.probe.tables import read_table
from fastssl.interop import load_encoder
from fastssl.models.distillation import DistillationConfig
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.model_card import ModelCard
from fastssl.names import ShownFormatter, encoded, json_line, plain_path, restored, shown, shown_lines, stored
from fastssl.train.config import DataConfig, OptimizerConfig, PretrainConfig, TrainerConfig
from fastssl.train.metrics_file import read_metrics
from fastssl.train.pretrain import pretrain
from tests.train.conftest import model_of

PACKAGE = Path(fastssl.__file__).parent
LATIN_1 = os.fsdecode(b"ma\xf1ana.wav")
NAMES = [
    LATIN_1,
    "line\nbreak\r.wav",
    "tab\tand 'both' \"quotes\".wav",
    "\x1b[31mred\x1b[0m\x07.wav",
    "[red]text[/red] :car:.wav",
    "--output.wav",
    "x" * 251 + ".wav",
    " a, b; #1 & {c}: %s ~ *?.wav",
    "back\\udcf1slash.wav",
    "man\u0303ana \u202egnp.wav",
    "ma\u00f1ana \u4f60.wav",
    "held out/in a folder that ends in a space /1.wav",
    os.fsdecode(b"\xff\xfe/\x85\xa0.wav"),
]
#: One folder name with all of it, for folders that are given as arguments.
FOLDER = os.fsdecode(b"[red]\xf3 \x1b[31m'\"\n#a::b ")
BROKEN = os.fsdecode(b"broken \xe9\n\x1b[31m.wav")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """Remove the handlers of the commands."""
    package = logging.getLogger("fastssl")
    before, level = package.handlers, package.level
    yield
    package.handlers = before
    package.setLevel(level)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names") / FOLDER
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def audio(place: Path) -> Path:
    """Make a folder of recordings with all the names, and a file that is not audio."""
    folder = place / "audio"
    for seed, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = 0.1 * np.random.default_rng(seed).standard_normal(16000 + 800 * seed)
        soundfile.write(os.fsencode(path), samples, 16000)
    (folder / BROKEN).write_bytes(b"not audio" * 100)
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    wav2vec2 = model_of("wav2vec2")
    shape = {field.name: getattr(wav2vec2, field.name) for field in dataclasses.fields(EncoderConfig)}
    torch.manual_seed(1)
    Encoder(EncoderConfig(**shape)).save_pretrained(place / "model")
    return place / "model"


def said(capsys: pytest.CaptureFixture[str], *, broken: bool = True) -> str:
    """Return what a command printed, which must be UTF-8 text that does nothing to a terminal."""
    printed = "".join(capsys.readouterr())
    printed.encode()
    assert "\x1b" not in printed
    if broken:
        assert "broken \\xe9\\n\\x1b[31m.wav does not open as audio" in printed
    return printed


def run(*arguments: object) -> None:
    assert cli.main([str(one) for one in arguments]) == 0


# The place that decides.


def test_hashes_keep_their_bits() -> None:
    assert encoded("ma\u00f1ana \U0001f600") == "ma\u00f1ana \U0001f600".encode()
    assert utterance_id("caf\u00e9/1.wav") == int.from_bytes(
        hashlib.blake2b("caf\u00e9/1.wav".encode(), digest_size=8).digest(), "little", signed=True
    )
    texts = [*NAMES, "\ud800", "\udcc3\udcb1", "\u00f1", "\udcf1", "\\udcf1"]
    assert len({encoded(text) for text in texts}) == len(texts)


def test_stored_names_come_back(tmp_path: Path) -> None:
    quoted = [f'"{LATIN_1}"', '"quoted"', '"', '""', '"half', "\ud800", "__metadata__", json.dumps(LATIN_1), "null", ""]
    for name in [*NAMES, FOLDER, BROKEN, *quoted]:
        assert restored(stored(name)) == name
        stored(name).encode()
        for load in (yaml.safe_load, get_loader("yaml")):
            assert restored(load(yaml.safe_dump([stored(name)]))[0]) == name
        line = json_line({"id": name})
        assert json.loads(line.encode()) == {"id": name}
        assert line.count("\n") == 1
    ordinary = [name for name in NAMES if name not in (LATIN_1, NAMES[-1])]
    assert [stored(name) for name in ordinary] == ordinary  # folders of earlier versions stay valid
    assert json_line({"id": "\u00f1"}) == '{"id": "\u00f1"}\n'
    keys = [stored(name) for name in [*NAMES, *quoted]]
    assert len(set(keys)) == len(keys)
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "a.safetensors")
    assert {restored(key) for key in load_file(tmp_path / "a.safetensors")} == {*NAMES, *quoted}


def test_restoring_accepts_what_people_write() -> None:
    for text in ('"', '"a" and "b"', '"\\"', "plain"):
        assert restored(text) == text


def test_shown_names_take_one_line() -> None:
    assert shown(FOLDER) == "[red]\\xf3 \\x1b[31m'\"\\n#a::b "
    assert shown("\x85\u2028\u202e\r\t\0\x7f\U000e0001") == "\\u0085\\u2028\\u202e\\r\\t\\x00\\x7f\\U000e0001"
    for name in (
        "[red]:car:",
        "ma\u00f1ana \u4f60",
        "\u0645\u06cc\u200c\u062e",
        "no\u00a0break",
        "\U0001f469\u200d\U0001f680",
    ):
        assert shown(name) == name
    assert shown_lines("one\ntwo\x1b\n") == "one\ntwo\\x1b\n"
    assert shown(Path(LATIN_1)) == "ma\\xf1ana.wav"


def test_problems_take_one_line() -> None:
    problem = Problem(BROKEN, "does not decode:\nbad")
    assert str(problem) == "broken \\xe9\\n\\x1b[31m.wav does not decode:\\nbad"
    assert len(list_some([problem] * 3).splitlines()) == 3


def test_log_lines(tmp_path: Path) -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "left %d:\n%s in %s", (1, FOLDER, Path(LATIN_1)), None)
    assert ShownFormatter().format(record) == f"left 1:\n{shown(FOLDER)} in ma\\xf1ana.wav"
    assert record.args == (1, FOLDER, Path(LATIN_1))


def test_the_console_obeys_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_console()
    logging.getLogger("fastssl").info("left out: %s", "[red]:car: [/nonsense] \x1b[31m\n")
    assert said(capsys, broken=False) == "left out: [red]:car: [/nonsense] \\x1b[31m\\n\n"


def test_cards() -> None:
    config = EncoderConfig()
    card = ModelCard(recipe=FOLDER).as_markdown(config, parameters=1)
    assert f"| recipe | {shown(FOLDER)} |" in card


def test_plain_paths(audio: Path, tmp_path: Path) -> None:
    with plain_path(tmp_path / "missing.wav") as path:
        assert path == str(tmp_path / "missing.wav")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with plain_path(audio / LATIN_1) as path:
        path.encode()
        assert Path(path).read_bytes() == (audio / LATIN_1).read_bytes()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_crops_of_a_folder_named_held_out_keep_their_own_keys() -> None:
    ids = ["a.wav", "held out/a.wav", "trained on/a.wav", "trained on/held out/a.wav"]
    keys = [crop_key(name, held_out=held_out) for name in ids for held_out in (False, True)]
    assert len(set(keys)) == len(keys)
    assert keys[:2] == ["a.wav", "held out/a.wav"]  # folders of earlier versions stay valid


# Recordings.


def test_scan_and_split(audio: Path, place: Path) -> None:
    corpus = open_corpus(audio, min_duration_s=0.5, max_bad_fraction=0.2)
    assert sorted(cut.id for cut in corpus.cuts) == sorted(NAMES)
    (problem,) = corpus.problems
    assert problem.name == str(audio / BROKEN)
    assert "/proc" not in problem.reason
    assert all(len(read_waveform(cut)) for cut in corpus.cuts)
    train, valid = split_corpus(corpus, fraction=0.5, seed=0)
    assert sorted(cut.id for part in (train, valid) for cut in part.cuts) == sorted(NAMES)
    (one,) = open_corpus(audio / LATIN_1, min_duration_s=0.5).cuts
    assert one.id == LATIN_1


def test_paths_of_thousands_of_bytes(audio: Path, tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(9):
        folder = folder / ("x" * 250)
    folder.mkdir(parents=True)
    shutil.copy(audio / LATIN_1, folder / "a.wav")
    (cut,) = open_corpus(tmp_path, min_duration_s=0.5).cuts
    assert len(read_waveform(cut)) == 16000


def test_several_files_and_damaged_ones(audio: Path) -> None:
    """Lhotse decodes a recording of several files."""
    sources = [AudioSource("file", [channel], str(audio / name)) for channel, name in enumerate((LATIN_1, LATIN_1))]
    both = Recording("both", sources, 16000, 16000, 1.0).to_cut()
    one = Recording("one", sources[:1], 16000, 16000, 1.0).to_cut()
    np.testing.assert_array_equal(read_waveform(both), read_waveform(one))


def test_prepare(audio: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = place / os.fsdecode(b"\xe9\n.jsonl.gz")
    run("prepare", audio, "--output", output, "--min_duration_s", "0.5", "--max_bad_fraction", "0.2")
    said(capsys)
    here, there = open_corpus(audio, min_duration_s=0.5, max_bad_fraction=0.2), open_corpus(output, min_duration_s=0.5)
    assert list(here.cuts) == list(there.cuts)
    assert list(CutSet.from_file(output)) == list(here.cuts)
    assert all(len(read_waveform(cut)) for cut in there.cuts)


def test_shar(audio: Path, place: Path) -> None:
    cuts = open_corpus(audio, min_duration_s=0.5, max_bad_fraction=0.2).cuts
    named = CutSet.from_cuts(cut.with_id(f"{index}") for index, cut in enumerate(cuts))
    (place / "shar").mkdir()
    # Lhotse itself exports only ordinary names.
    named.filter(lambda cut: stored(cut.recording.id) == cut.recording.id).to_shar(
        place / "shar", fields={"recording": "wav"}
    )
    assert all(len(read_waveform(cut)) for cut in open_corpus(place / "shar", min_duration_s=0.5).cuts)


# Commands.


def test_label(audio: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("label", audio, "--output", place / "labels", "--clusters", "3", "--num_workers", "0")
    run("label", audio, "--output", place / "labels", "--clusters", "3", "--num_workers", "0")
    assert f"{len(NAMES)} of {len(NAMES)} recordings are already labelled" in said(capsys)
    run("label", audio, "--output", place / "again", "--kmeans", place / "labels", "--num_workers", "0")
    assert (place / "labels" / "labels.jsonl").read_bytes() == (place / "again" / "labels.jsonl").read_bytes()
    table = LabelTable(place / "labels")
    cuts = open_corpus(audio, min_duration_s=0.5, max_bad_fraction=0.2).cuts
    assert [table.problem(cut) for cut in cuts] == [None] * len(NAMES)


def test_extract(audio: Path, place: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("extract", model, audio, "--output", place / "features", "--device", "cpu")
    run("extract", model, audio, "--output", place / "features", "--device", "cpu")
    assert f"{len(NAMES)} recordings were extracted by an earlier run" in said(capsys)
    entries = [json.loads(line) for line in (place / "features" / "index.jsonl").read_text().splitlines()]
    assert sorted(restored(entry["key"]) for entry in entries) == sorted(NAMES)
    for entry in entries:
        assert Path(entry["file"]) == audio / restored(entry["key"])
        with plain_path(place / "features" / entry["shard"]) as path, safe_open(path, framework="pt") as shard:
            assert len(shard.get_tensor(entry["key"])) == entry["frames"]


def test_quality(audio: Path, place: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("quality", model, audio, "--output", place / f"{FOLDER}.json", "--layers", "[1]", "--device", "cpu")
    said(capsys)
    report = json.loads((place / f"{FOLDER}.json").read_text())
    assert (report["audio"], report["model"]) == (str(audio), str(model))
    assert report["left_out"][0]["name"] == str(audio / BROKEN)
    assert (place / f"{FOLDER}.png").is_file()


def test_probe(audio: Path, place: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = place / "table.tsv"
    with table.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["path", "speaker"])
        rows.writerows([[f"audio/{name}", "ab"[index % 2]] for index, name in enumerate([*NAMES, BROKEN])])
    parts = [option for part in ("--dev", "--test") for option in (part, table)]
    run(
        *("probe", model, table, *parts, "--task", "classification", "--target", "speaker"),
        *("--steps", "2", "--output", place / "probe.json", "--device", "cpu"),
    )
    printed = said(capsys)
    assert "[red]" in printed
    results = json.loads((place / "probe.json").read_text())["results"]
    assert results[0]["encoder"] == str(model)
    assert results[0]["runs"][0]["parts"]["test"]["recordings"] == len(NAMES)


def test_labels_of_a_table_must_be_text(tmp_path: Path) -> None:
    (tmp_path / "table.tsv").write_bytes(b"path\tspeaker\nma\xf1ana.wav\tPe\xf1a\n")
    with pytest.raises(ValueError, match="row 2 is not UTF-8 text; save the table as UTF-8"):
        read_table(tmp_path / "table.tsv")
    (tmp_path / "table.tsv").write_bytes("path\tspeaker\r\na.wav\tb\r\n".encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-8"):
        read_table(tmp_path / "table.tsv")


def settings_of(audio: Path, output: Path, system: str) -> PretrainConfig:
    return PretrainConfig(
        audio=str(audio),
        output=str(output),
        system=system,
        recipe=str(output / f"{FOLDER}.yaml"),
        model=model_of(system),
        data=DataConfig(max_duration_s=6, crop_s=1, min_duration_s=0.5, valid=0.3, num_workers=0, max_bad_fraction=0.2),
        optimizer=OptimizerConfig(warmup_updates=1),
        trainer=TrainerConfig(max_steps=2, log_every=1, val_check_interval=2, accelerator="cpu", progress=False),
    )


def test_pretrain_and_resume(audio: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run makes its own labels, mixes in noise, holds out recordings, continues and begins another run."""
    config = settings_of(audio, place / "run", "wavlm")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, noise=str(audio)))
    pretrain(config)
    run_folder = place / "run"
    run("pretrain", "--resume", "--output", run_folder, "--trainer.max_steps", "4")
    said(capsys)
    rows = read_metrics(run_folder / "metrics.csv")
    assert [row["update"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["update"] for row in rows if "valid_loss" in row] == [2, 4]
    log = (run_folder / "logs" / "pretrain.log").read_text(encoding="utf-8")
    assert all(line[:4].isdigit() for line in log.splitlines())  # every line begins with a date
    assert f"left out: {shown(audio / BROKEN)} does not open as audio" in log
    assert list((run_folder / "logs").glob("events*"))
    settings = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
    assert restored(settings["audio"]) == str(audio)
    assert "[red]\\xf3" in (run_folder / "encoder" / "README.md").read_text(encoding="utf-8")
    assert len(LabelTable(run_folder / "labels")) == len(NAMES)
    load_encoder(run_folder)
    again = ("--config", run_folder / "config.yaml", "--init", run_folder, "--trainer.max_steps", "1")
    run("pretrain", *again, "--data.labels", run_folder / "labels", "--output", place / "again from it")
    said(capsys)


def test_distil_from_a_cache(audio: Path, place: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings_of(audio, place / "distilled", "hubert")
    shape = {field.name: getattr(model_of("wav2vec2"), field.name) for field in dataclasses.fields(EncoderConfig)}
    student = DistillationConfig(**shape | {"model_type": "hubert"})
    data = dataclasses.replace(config.data, fixed_crops=True, teacher_cache=str(place / "cache"))
    config = dataclasses.replace(config, system="distillation", model=student, data=data, teacher=str(model))
    pretrain(config)
    pretrain(dataclasses.replace(config, output=str(place / "distilled again")))
    first, second = (read_metrics(place / name / "metrics.csv") for name in ("distilled", "distilled again"))
    assert [row["loss"] for row in first if "loss" in row] == [row["loss"] for row in second if "loss" in row]


def test_errors_are_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = place / "nowhere\n\x1b"
    assert cli.main(["prepare", str(missing), "--output", "a.jsonl.gz"]) == 1
    assert said(capsys, broken=False).startswith(f"fastssl prepare: source: {shown(missing)} does not exist")


def test_a_settings_file_must_be_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_bytes(b"audio: /ma\xf1ana\n")
    assert cli.main(["pretrain", "--config", str(tmp_path / "a.yaml"), "--output", str(tmp_path / "run")]) == 1
    assert "a.yaml: is not text in UTF-8" in said(capsys, broken=False)


def test_a_console_that_knows_only_ascii(audio: Path, tmp_path: Path) -> None:
    environment = os.environ | {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    command = ["prepare", str(audio), "--output", str(tmp_path / "ma\u00f1ana.jsonl.gz")]
    options = ["--min_duration_s", "0.5", "--max_bad_fraction", "0.2"]
    done = subprocess.run(
        [sys.executable, "-m", "fastssl", *command, *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"ma\\xf1ana.jsonl.gz: {len(NAMES)} recordings" in done.stdout
    assert "broken \\xe9\\n\\x1b[31m.wav" in done.stderr


# Nothing else encodes, stores or opens a name.

#: (file, call) -> number of calls, and why it concerns no name or every name is right in it.
PLACES = {
    ("data/audio.py", "soundfile.SoundFile"): (2, "an open file, or its descriptor"),
    ("names.py", "name.encode"): (1, "the question itself: is it UTF-8?"),
    ("names.py", "json.dumps"): (1, "only if UTF-8 can encode the line"),
    ("data/synthetic.py", "text.encode"): (2, "our own English sentences"),
    ("data/synthetic.py", "voice.name.encode"): (1, "our own voices"),
    ("data/synthetic.py", "soundfile.write"): (1, "a path as bytes"),
    ("kernels/dispatch.py", "report.read_text"): (1, "JSON in ASCII"),
    ("cli/info.py", "report.read_text"): (1, "JSON in ASCII"),
    ("cli/info.py", "path.read_text"): (1, "/proc/cpuinfo"),
    ("kernels/gemm.py", "processors.read_text"): (1, "/proc/cpuinfo"),
    ("files.py", "text.encode"): (1, "its callers give lines of JSON, or what `shown_lines` returned"),
    ("folder_lock.py", "f'{os.getpid()} {socket.gethostname()}\\n'.encode"): (1, "a number and a host"),
    ("models/folder.py", "name.encode"): (1, "a key of safetensors, which is UTF-8"),
    ("models/folder.py", "wanted.encode"): (1, "our own metadata"),
    ("train/peers.py", "f' {self._rank}\\n'.encode"): (1, "a number"),
    ("train/peers.py", "secrets.token_hex(16).encode"): (1, "digits"),
    ("train/peers.py", "word.encode"): (1, "decoded from UTF-8"),
    (
        "train/stopping.py",
        "f'fastssl: {name}: saving a checkpoint after this update, then stopping{again}\\n'.encode",
    ): (1, "the name of a signal"),
}
#: Methods that open something else.
OTHERS_OPEN = {"Features.open", "archive.open", "cache.open", "os.open", "self.open", "tarfile.open"}
#: Calls that take a path and pass it on as UTF-8.
OPENERS = {"soundfile.SoundFile", "soundfile.write", "load_file", "safe_open", "SummaryWriter", "torch.load"}


def _calls(path: Path) -> list[str]:
    """Return the calls in a file that may fail on a name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    plain = {"file"}  # from `_opened`, in data/audio.py
    for node in ast.walk(tree):
        if isinstance(node, ast.withitem) and "plain_path(" in ast.unparse(node.context_expr) and node.optional_vars:
            plain.add(ast.unparse(node.optional_vars))
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {option.arg for option in node.keywords}
        arguments = [ast.unparse(one) for one in node.args]
        last = name.rpartition(".")[2]
        if (
            (last == "encode" and isinstance(node.func, ast.Attribute) and not options and len(arguments) == 0)
            or (last in ("read_text", "write_text", "FileHandler") and name != last and "encoding" not in options)
            or (_opens_text(name, arguments) and "encoding" not in options)
            or (name in OPENERS and arguments[0] not in plain and "plain_path(" not in arguments[0])
            or "ensure_ascii" in options
            or last == "to_jsonl"
        ):
            found.append(name)
    return found


def _opens_text(name: str, arguments: list[str]) -> bool:
    """Return whether a call is `open(path)`, `open(path, "w")`, `path.open()`, `path.open("w")` or similar."""
    if name not in ("open", "gzip.open") and (not name.endswith(".open") or name in OTHERS_OPEN):
        return False
    mode = arguments[name in ("open", "gzip.open") :][:1]
    return mode == [] or "b" not in mode[0]


def test_no_name_is_encoded_otherwise() -> None:
    found: dict[tuple[str, str], int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in _calls(path):
            place = path.relative_to(PACKAGE).as_posix(), name
            found[place] = found.get(place, 0) + 1
    assert found == {place: number for place, (number, _) in PLACES.items()}
