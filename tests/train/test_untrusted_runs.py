"""Test settings and checkpoints of runs that others wrote: what is wrong with them is refused by name."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fastssl.cli.settings_file import check_settings
from fastssl.data.rules import RULES, recorded_rules
from fastssl.models.folder import write_encoder_weights
from fastssl.reading import MOST_BYTES, brief, complete_lines, printable, read_json, read_text
from fastssl.train.checkpoints import check_size, initialise, saved_update
from fastssl.train.systems import build_model
from fastssl.train.yaml_file import read_yaml
from tests.train.conftest import MakeConfig, MakeSystem, model_of

#: Ten lines that stand for a billion words.
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"is not valid YAML: line 2 has an alias \(\*a\)"),
        ("[" * 5000, "is nested more than 32 levels deep"),
        ("".join(" " * level + "a:\n" for level in range(200)), "is nested more than 32 levels deep"),
        ("a:\n" + "".join(f"  k{index}: 1\n" for index in range(6000)), "has more than 10000 values"),
        ("- 1", "must contain settings by name, got a list"),
        ("1: 2", "must contain settings by name"),
        ("a: !!timestamp 2001-99-99", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not valid YAML: could not determine a constructor"),
        ('"a\x1b": 2', "is not valid YAML"),
    ],
)
def test_yaml_is_plain(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"settings\.yaml: .*{message}") as error:
        read_yaml(path)
    assert str(error.value).isprintable()


def test_pipes_and_giants_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"config\.yaml: is not a regular file"):
        read_yaml(tmp_path / "config.yaml")
    giant = tmp_path / "index.jsonl"
    giant.write_bytes(b"{}\n")
    os.truncate(giant, 1 << 36)
    lines = complete_lines(giant)
    assert next(lines) == (1, b"{}\n")
    with pytest.raises(ValueError, match=r"index\.jsonl: line 2 is longer than 64 MB"):
        next(lines)
    with pytest.raises(ValueError, match=r"nowhere: does not exist; check the path"):
        read_text(tmp_path / "nowhere")


def test_what_files_say_is_shown_on_one_short_line() -> None:
    assert printable("a\x1b[31m\nb\u202e\udc80") == r"a\x1b[31m\nb\u202e\x80"
    assert len(printable("x" * 10_000)) == 203
    assert brief("\n") == r"'\n'"
    assert brief(int("f" * 10_000, 16)) == "a number that is too long to show"
    assert len(brief([["x" * 1000] * 100] * 100)) == 403
    with pytest.raises(ValueError, match=r"there is no option \\x1b\[2J"):
        check_settings(Path("x.yaml"), {"\x1b[2J": 1}, {})


def saved_run(folder: Path, make_config: MakeConfig, **entries: Any) -> Path:
    """Write the folder of a run with a checkpoint; return the checkpoint."""
    from fastssl.train.config import write_config

    config = make_config()
    (folder / "checkpoints").mkdir(parents=True)
    write_config(config, folder / "config.yaml")
    torch.manual_seed(1)
    state = {f"model.{name}": tensor for name, tensor in build_model(config.model).state_dict().items()}
    whole = {"global_step": 3, "state_dict": state, "epoch": 0, "pytorch-lightning_version": "2.0", "loops": {}}
    whole |= {"callbacks": {}, "optimizer_states": [], "lr_schedulers": [], "PretrainDataModule": {}}
    torch.save(whole | entries, folder / "checkpoints" / "last.ckpt")
    return folder / "checkpoints" / "last.ckpt"


def test_a_checkpoint_is_compared_before_the_model_is_built(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config().model
    checkpoint = saved_run(tmp_path / "run", make_config)
    check_size(config, checkpoint)
    assert saved_update(checkpoint) == 3
    larger = make_config(**{"model.intermediate_size": 96}).model
    with pytest.raises(ValueError, match=r"--resume: .*last\.ckpt: .*has shape .*, expected \(96"):
        check_size(larger, checkpoint)
    wrong: dict[str, Any] = {"optimizer_states": None, "loops": [], "pytorch-lightning_version": 2}
    for name, entry in wrong.items():
        checkpoint = saved_run(tmp_path / name, make_config, **{name: entry})
        with pytest.raises(ValueError, match=rf"--resume: .*last\.ckpt: has no valid entry '{name}'"):
            check_size(config, checkpoint)
    with pytest.raises(ValueError, match=r"last\.ckpt: has no weights of a model"):
        check_size(config, saved_run(tmp_path / "a", make_config, state_dict={"a": 1}))
    with pytest.raises(ValueError, match=r"last\.ckpt does not say how many updates"):
        saved_update(saved_run(tmp_path / "b", make_config, global_step="x"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"last\.ckpt (is incomplete|cannot be read)"):
        saved_update(checkpoint)


def test_a_model_of_a_settings_file_must_fit_into_memory(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastssl.models.skeleton.physical_memory", lambda: 10_000)
    with pytest.raises(ValueError, match=r"model: it would take .*; choose smaller sizes"):
        check_size(make_config().model, None)


def test_init_says_what_a_folder_holds(make_config: MakeConfig, make_system: MakeSystem, tmp_path: Path) -> None:
    model = build_model(make_config().model)
    saved_run(tmp_path / "run", make_config)
    assert initialise(model, str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"--init .*run: is a run of wav2vec2, expected a run of hubert"):
        initialise(build_model(model_of("hubert")), str(tmp_path / "run"))
    build_model(model_of("best-rq")).speech_encoder.save_pretrained(tmp_path / "conformer" / "encoder")
    with pytest.raises(ValueError, match=r"--init .*conformer: is a best-rq encoder, expected a wav2vec2 encoder"):
        initialise(model, str(tmp_path / "conformer"))
    with pytest.raises(ValueError, match=r"is neither a run \(no .*last\.ckpt\) nor a model \(no .*config\.json\)"):
        initialise(model, str(tmp_path))
    for text, message in {
        "- 1": "must contain settings by name",
        "system: wav2vec2": "has no settings of a model",
        "system: [1]": r"is a run of \[1\], expected a run of wav2vec2",
        "model:\n  hidden_size: 10000000000": r"config\.yaml: model\.hidden_size: must be at most 65536",
        LAUGHS: "has an alias",
    }.items():
        (tmp_path / "run" / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=rf"--init .*run: .*{message}"):
            initialise(model, str(tmp_path / "run"))
    # Weights that are not finite are named too.
    broken = {name: tensor * torch.nan for name, tensor in model.speech_encoder.state_dict().items()}
    model.speech_encoder.save_pretrained(tmp_path / "model")
    write_encoder_weights(tmp_path / "model", broken)
    with pytest.raises(ValueError, match=r"--init .*model: \S+ has NaN or infinite weights"):
        initialise(build_model(make_config().model), str(tmp_path / "model"))


def test_a_compressed_checkpoint_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path / "run", make_config)
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("last/data.pkl", bytes(10_000_000))
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read \(its archive is compressed"):
        saved_update(checkpoint)


def test_a_name_that_occurs_twice_in_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"a": {"layer": 1, "rate": null, "layer": 2}}')
    with pytest.raises(ValueError, match=r"settings\.json: is not valid JSON: 'layer' occurs twice in an object"):
        read_json(path)
    path.write_text('{"a": {"layer": 1}, "b": {"layer": 1}}')
    assert read_json(path) == {"a": {"layer": 1}, "b": {"layer": 1}}


def test_recorded_rules_of_a_large_file_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    assert recorded_rules(path) == RULES  # a new folder
    for content, rules in (('{"rules": 1}', 1), ("{}", 1), ('{"rules": 1', RULES), ("[]", RULES)):
        path.write_text(content)
        assert recorded_rules(path) == rules
    path.write_text('{"rules": 1}' + " " * MOST_BYTES)
    assert recorded_rules(path) == RULES
    path.unlink()
    os.mkfifo(path)
    assert recorded_rules(path) == RULES
