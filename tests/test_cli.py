"""Test the command line: its output, its settings, and the errors for bad arguments."""

import ast
import dataclasses
import logging
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest
import yaml

import fastssl
from benchmarks.recipes import recipe_model
from fastssl import cli
from fastssl.cli import pretrain
from fastssl.data.rules import RULES
from fastssl.eval.probe.settings import ProbeSettings
from fastssl.kernels import dispatch
from fastssl.kernels.randomness import RANDOMNESS
from fastssl.models.encoder import EncoderConfig
from fastssl.models.wav2vec2 import GumbelTemperature, Wav2Vec2Config
from fastssl.train.config import PretrainConfig, check_resumable, write_config
from fastssl.train.systems import SYSTEMS, system_of


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """Restore the loggers afterwards, because the command line installs handlers that would disturb other tests."""
    package = logging.getLogger("fastssl")
    handlers, level = package.handlers, package.level
    yield
    package.handlers = handlers
    package.setLevel(level)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[PretrainConfig, bool]]:
    """Replace `pretrain`, and record the arguments of each call."""
    calls: list[tuple[PretrainConfig, bool]] = []
    monkeypatch.setattr(
        "fastssl.train.pretrain.pretrain", lambda config, *, resume: calls.append((config, resume)), raising=True
    )
    return calls


def test_help_lists_the_commands_and_explains_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for command in (
        "pretrain",
        "distill",
        "report",
        "extract",
        "label",
        "quality",
        "probe",
        "prepare",
        "info",
        "check",
    ):
        assert f"  {command} " in text
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        assert f"fastssl {command}" in capsys.readouterr().out


def test_ctrl_c_has_the_exit_status_of_a_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def info(arguments: Sequence[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastssl.cli.info.info", info)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "fastssl info: interrupted\n"


def test_help_imports_nothing_that_takes_seconds() -> None:
    program = """if True:
        import contextlib, io, sys
        from fastssl import cli
        for command in sys.argv[1:]:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                cli.main([command, "--help"])
            print(command, *{"lightning", "transformers", "sklearn", "lhotse"}.intersection(sys.modules))
    """
    # The signatures of the last four are in modules that read audio; after torch, Lhotse adds a tenth of a second.
    without = ("info", "prepare", "report", "pretrain", "distill")
    with_lhotse = ("extract", "label", "quality", "probe")
    command = [sys.executable, "-c", program, *without, *with_lhotse]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.splitlines() == [*without, *(f"{name} lhotse" for name in with_lhotse)]


def test_options_come_from_signature_and_docstring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def probe(
        model: str,
        settings: ProbeSettings,
        *,
        table: str | Path,
        compare: Sequence[str] = (),
        rate: float | None = None,
    ) -> None:
        """Try it.

        For a test.

        Args:
            model: Which: one
                of several lines.
            settings: Not shown.
            table: A table.
            compare: More.
            rate: A rate.

        Raises:
            ValueError: Never.
        """
        calls.append((model, settings, table, compare, rate))

    monkeypatch.setattr("fastssl.eval.probe.command.probe", probe)
    given = ["m", "12", "--target", "text", "--compare", "a", "b", "--seeds", "2"]
    monkeypatch.setitem(cli._COMMANDS, "probe", cli._COMMANDS["probe"]._replace(positionals=("model", "table")))
    assert cli.main(["probe", *given]) == 0
    assert calls == [("m", ProbeSettings("text", seeds=2), "12", ["a", "b"], None)]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["probe", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "MODEL TABLE Try it. For a test. positional arguments:" in text
    assert "MODEL Which: one of several lines. (required)" in text
    assert "--rate RATE A rate. (type: float | null, default: null)" in text
    assert "Not shown" not in text


def test_help_shows_the_values_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["pretrain", "--recipe", "wav2vec2-tiny", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "random place on every draw; null trains on whole recordings. (type: float | null, default: 4.0)" in text
    assert "WAV, FLAC, Ogg, MP3" in text


def test_settings_of_two_systems_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("system: hubert\nmodel:\n  num_clusters: 7\n")
    begin = ["pretrain", str(tmp_path), "--output", str(tmp_path / "run")]
    for options, expected in (
        (["--recipe", "best-rq-tiny", "--system", "hubert"], "best-rq-tiny.yaml has settings for best-rq; choose"),
        (["--system", "hubbert"], "--system: got hubbert, but "),
        (["--recipe", "wav2vec2-tiny", "--config", str(config)], f"for wav2vec2; {config} has settings for hubert"),
    ):
        assert cli.main([*begin, *options]) == 1
        assert expected in capsys.readouterr().err


def test_unknown_words_get_an_answer_that_lists_what_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["destill"])
    assert (
        "choose from 'pretrain', 'distill', 'report', 'extract', 'label', 'quality', 'probe', 'prepare', 'info'"
        in capsys.readouterr().err
    )
    assert cli.main(["pretrain", str(tmp_path), "--recipe", "wav2vec3", "--output", str(tmp_path / "run")]) == 1
    assert "wav2vec2-base, wav2vec2-large, wav2vec2-tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["pretrain", str(tmp_path), "--output", str(tmp_path / "run"), "--data.crop", "3"])
    message = capsys.readouterr().err
    assert "unrecognized arguments: --data.crop" in message
    assert "--data.crop_s" in message
    (tmp_path / "wrong.yaml").write_text("model: {width: 3}")
    arguments = ["pretrain", str(tmp_path), "--output", str(tmp_path / "run"), "--config", str(tmp_path / "wrong.yaml")]
    assert cli.main(arguments) == 1
    assert "wrong.yaml: model has no option 'width'; choose from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


_STRANGER = "strangers_module"


@pytest.mark.parametrize(
    "text",
    [
        f"model: {{class_path: {_STRANGER}.A}}",
        f"model: {_STRANGER}.A",
        f"model.class_path: {_STRANGER}.A",
        f"model: {{class_path: {_STRANGER}.A, init_args: {{}}}}",
        f"data: {{class_path: {_STRANGER}.A, dict_kwargs: {{}}}}",
        f"model: {{gumbel_temperature: {{class_path: {_STRANGER}.A}}}}",
        f"model: {{gumbel_temperature: {_STRANGER}.A}}",
        "model: {gumbel_temperature: nested.yaml}",
        f"model: {{gumbel_temperature: {{start: {{class_path: {_STRANGER}.A}}}}}}",
        f"temperature: {{class_path: {_STRANGER}.A}}",
        f"{{temperature: {_STRANGER}.A, model: {_STRANGER}.A}}",
        f"data: {{crop_s: {{class_path: {_STRANGER}.A}}}}",
        f"optimizer: {{betas: [{{class_path: {_STRANGER}.A}}]}}",
        "trainer: nested.yaml",
        f"seed: {{class_path: {_STRANGER}.A}}",
    ],
)
@pytest.mark.parametrize("way", ["config", "recipe", "resume"])
def test_settings_of_a_stranger_import_nothing(
    text: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path(f"{_STRANGER}.py").write_text("raise SystemExit('imported')")
    Path("nested.yaml").write_text(f"class_path: {_STRANGER}.A")
    Path("run").mkdir()
    file = Path("run/config.yaml") if way == "resume" else Path("settings.yaml")
    if way == "resume":  # every run has these settings
        text = text.replace("{", "{audio: nowhere, ", 1) if text.startswith("{") else f"audio: nowhere\n{text}"
    file.write_text(text)
    option = ["--resume"] if way == "resume" else [f"--{way}", str(file)]
    assert cli.main(["pretrain", "nowhere", "--output", "run", *option]) == 1
    assert f"{file}: " in capsys.readouterr().err
    assert _STRANGER not in sys.modules


def test_a_teacher_named_in_a_file_is_not_downloaded(
    tmp_path: Path, started: list[tuple[PretrainConfig, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stranger.yaml").write_text("system: distillation\nteacher: strangers/model\n")
    arguments = ["distill", str(tmp_path), "--output", "run", "--config", str(tmp_path / "stranger.yaml")]
    assert cli.main(arguments) == 1
    assert (
        "teacher: no such file or folder: strangers/model; a model that a settings file names is not"
        in capsys.readouterr().err
    )
    assert cli.main([*arguments, "--teacher", "mine/model"]) == 0
    assert started[0][0].teacher == "mine/model"


def test_facts_for_the_card(
    started: list[tuple[PretrainConfig, bool]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pretrain", str(tmp_path), "--output", "run", "--card.license", "cc-by-4.0", "--card.language"]
    assert cli.main([*arguments, "[en,de]", "--card.data", "[owner/set,calls]"]) == 0
    card = started[0][0].card
    assert (card.license, card.language, card.data) == ("cc-by-4.0", ("en", "de"), ("owner/set", "calls"))
    assert cli.main([*arguments, "[English]"]) == 1
    assert "card.language: must be codes of two or three letters" in capsys.readouterr().err


def test_weights_named_in_a_file_are_not_downloaded(
    tmp_path: Path, started: list[tuple[PretrainConfig, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stranger.yaml").write_text("init: strangers/model\n")
    arguments = ["pretrain", str(tmp_path), "--output", "run", "--config", str(tmp_path / "stranger.yaml")]
    assert cli.main(arguments) == 1
    why = "init: no such file or folder: strangers/model; a model that a settings file names is not downloaded"
    assert why in capsys.readouterr().err
    assert cli.main([*arguments, "--init=mine/model"]) == 0
    assert started.pop()[0].init == "mine/model"
    # The name in a run's settings: not used any more once the run has weights of its own.
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"audio: {tmp_path}\ninit: strangers/model\n")
    assert cli.main(["pretrain", "--output", str(run), "--resume"]) == 1
    assert why in capsys.readouterr().err
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    assert cli.main(["pretrain", "--output", str(run), "--resume"]) == 0
    assert started.pop()[0].init == "strangers/model"


def test_a_group_of_options_is_no_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nested.yaml").write_text("class_path: strangers_module.A")
    for group in ("trainer", "model.gumbel_temperature"):
        for argument in ([f"--{group}", "nested.yaml"], [f"--{group}=nested.yaml"]):
            assert cli.main(["pretrain", "nowhere", "--output", "run", *argument]) == 1
            assert f"--{group}: is a group of options; set one (--{group}.OPTION)" in capsys.readouterr().err


def test_a_file_of_settings_is_parsed_once(
    started: list[tuple[PretrainConfig, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("system: hubert\ndata: {crop_s: 3.0}\noptimizer: {lr: 1e-5}\n")
    (tmp_path / "wrong.yaml").write_text("system: hubert\noptimizer: {lr: fast}\n")
    parsed: list[str] = []
    load = yaml.load

    def count(stream: str, Loader: Any) -> Any:  # noqa: N803 - PyYAML's name
        parsed.extend(["file"] * ("system: " in stream))
        return load(stream, Loader)

    monkeypatch.setattr(yaml, "load", count)
    begin = ["pretrain", str(tmp_path), "--output", str(tmp_path / "run"), "--config"]
    assert cli.main([*begin, str(tmp_path / "mine.yaml")]) == 0
    assert len(parsed) == 2  # the system's recipe and the config
    with pytest.raises(SystemExit, match="2"):
        cli.main([*begin, str(tmp_path / "wrong.yaml")])
    assert len(parsed) == 4
    assert (started[0][0].optimizer.lr, started[0][0].system, len(started)) == (1e-5, "hubert", 1)


def test_a_file_that_the_system_refuses_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["report", "x" * 5000]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(
        "fastssl report: x+/config.yaml: File name too long; check the path and its permissions\n", error
    )


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", str(tmp_path), "--recipe", "wav2vec2-tiny", "--output", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"fastssl pretrain: source: no audio in {tmp_path} (looked for .wav")
    assert not (tmp_path / "run").exists()
    assert cli.main(["pretrain", str(tmp_path), "--output", "run", "--trainer.max_steps", "0"]) == 1
    assert "trainer.max_steps: must be at least 1, got 0" in capsys.readouterr().err


def test_command_line_wins_over_config_and_config_over_recipe(
    started: list[tuple[PretrainConfig, bool]], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("data: {crop_s: 3.0}\noptimizer: {lr: 0.1}\naudio: /recordings\n")
    config = ["--config", str(tmp_path / "mine.yaml")]
    cli.main(["pretrain", "--data.crop_s", "null", "--recipe", "wav2vec2-tiny", *config, "--output", "run"])
    cli.main(["pretrain", "elsewhere", *config, "--output", "run", "--model.conv_dim", "[8,8,8,8,8,8,8]"])
    first, second = started[0][0], started[1][0]
    assert (first.data.crop_s, first.optimizer.lr, first.audio) == (None, 0.1, "/recordings")
    assert first.model.hidden_size == 192
    assert (second.data.crop_s, second.audio) == (3.0, str(Path.cwd() / "elsewhere"))
    assert second.model.conv_dim == (8,) * 7
    assert second.optimizer.warmup_updates == 32000
    # A config file that does not name its recipe may have replaced every setting, so the run names no recipe.
    assert (first.recipe, second.recipe) == ("wav2vec2-tiny", None)
    cli.main(["pretrain", "elsewhere", "--output", "run"])
    assert started[2][0].recipe == "wav2vec2-base"


def test_paths_are_kept_absolute(
    started: list[tuple[PretrainConfig, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("teacher").mkdir()
    data = ("--data.valid", "valid", "--data.labels", "labels", "--data.noise", "noise")
    assert cli.main(["pretrain", "audio", "--output", "run", "--recipe", "wavlm-tiny", "--init", "init", *data]) == 0
    assert cli.main(["distill", "audio", "--output", "run", "--teacher", "teacher"]) == 0
    assert cli.main(["distill", "audio", "--output", "run", "--teacher", "name/on-the-hub"]) == 0
    assert cli.main(["pretrain", "audio", "--output", "run", "--init", "name/on-the-hub"]) == 0
    assert cli.main(["pretrain", "audio", "--output", "run", "--init", "./no/such"]) == 0
    first, second, third, fourth, fifth = (config for config, _ in started)
    assert (fourth.init, fifth.init) == ("name/on-the-hub", str(tmp_path / "no" / "such"))
    paths = (first.audio, first.init, first.data.valid, first.data.labels, first.data.noise)
    assert paths == tuple(str(tmp_path / name) for name in ("audio", "init", "valid", "labels", "noise"))
    assert (first.output, first.teacher, first.data.segments) == ("run", None, None)
    assert (second.teacher, third.teacher) == (str(tmp_path / "teacher"), "name/on-the-hub")


@pytest.mark.parametrize("recipe", ["wav2vec2-large", "hubert-tiny"])
def test_config_file_reproduces_the_run(
    recipe: str, started: list[tuple[PretrainConfig, bool]], tmp_path: Path
) -> None:
    arguments = ["--recipe", recipe, "--seed", "5", "--data.valid", "0.1", "--optimizer.clip_norm", "1"]
    cli.main(["pretrain", str(tmp_path), "--output", str(tmp_path / "run"), *arguments])
    (tmp_path / "run").mkdir()
    write_config(started[0][0], tmp_path / "run" / "config.yaml")
    cli.main(["pretrain", "--config", str(tmp_path / "run" / "config.yaml"), "--output", str(tmp_path / "run")])
    cli.main(["pretrain", "--output", str(tmp_path / "run"), "--resume"])
    assert started[0][0].recipe == recipe
    assert started[1] == started[0]
    assert started[2] == (started[0][0], True)


@pytest.mark.parametrize("way", ["config", "resume"])
def test_the_temperature_of_earlier_versions_is_read(
    way: str, started: list[tuple[PretrainConfig, bool]], tmp_path: Path
) -> None:
    cli.main(["pretrain", str(tmp_path), "--output", "run", "--recipe", "wav2vec2-large"])
    path = tmp_path / "run" / "config.yaml"
    path.parent.mkdir()
    write_config(started[0][0], path)
    values = yaml.safe_load(path.read_text())
    assert values["model"].pop("gumbel_temperature") == {"start": 2.0, "end": 0.1, "decay": 0.999995}
    path.write_text(yaml.safe_dump(values | {"temperature": {"start": 3.0, "end": 0.125, "decay": 0.75}}))
    options = ["--resume"] if way == "resume" else ["--config", str(path)]
    cli.main(["pretrain", "--output", str(path.parent), *options, "--model.gumbel_temperature.end", "0.25"])
    cli.main(["pretrain", "--output", str(path.parent), *options])
    first, second = started[1][0].model, started[2][0].model
    assert isinstance(first, Wav2Vec2Config)
    assert first.gumbel_temperature == GumbelTemperature(start=3.0, end=0.25, decay=0.75)
    assert dataclasses.replace(first, gumbel_temperature=GumbelTemperature(3.0, 0.125, 0.75)) == second
    # A resumed run must keep its settings.
    with pytest.raises(ValueError, match=r"model\.gumbel_temperature\.end: 0\.125 in the run, 0\.25 now"):
        check_resumable(started[1][0], path)
    check_resumable(dataclasses.replace(started[2][0], recipe=None), path)


@pytest.mark.parametrize("way", ["config", "resume", "recipe"])
def test_runs_from_before_there_were_versions_keep_the_oldest(
    way: str, started: list[tuple[PretrainConfig, bool]], tmp_path: Path
) -> None:
    cli.main(["pretrain", str(tmp_path), "--output", "run", "--recipe", "wav2vec2-tiny"])
    assert started[0][0].data.rules == RULES == 2
    assert started[0][0].randomness == RANDOMNESS == 2
    path = tmp_path / "run" / "config.yaml"
    path.parent.mkdir()
    write_config(started[0][0], path)
    values = yaml.safe_load(path.read_text())
    assert values["data"].pop("rules") == 2
    assert values.pop("randomness") == 2
    path.write_text(yaml.safe_dump(values))
    options = ["--resume"] if way == "resume" else [f"--{way}", str(path)]
    cli.main(["pretrain", "--output", str(path.parent), *options])
    cli.main(["pretrain", "--output", str(path.parent), *options, "--data.rules", "2"])
    cli.main(["pretrain", "--output", str(path.parent), *options, "--randomness", "2"])
    assert [config.data.rules for config, _ in started[1:]] == [1, 2, 1]
    assert [config.randomness for config, _ in started[1:]] == [1, 1, 2]
    check_resumable(dataclasses.replace(started[1][0], recipe=None), path)
    with pytest.raises(ValueError, match=r"data\.rules: 1 in the run, 2 now"):
        check_resumable(started[2][0], path)
    with pytest.raises(ValueError, match=r"randomness: 1 in the run, 2 now"):
        check_resumable(started[3][0], path)


def test_settings_that_are_not_those_of_a_run_get_the_newest_versions(
    started: list[tuple[PretrainConfig, bool]], tmp_path: Path
) -> None:
    (tmp_path / "some.yaml").write_text("data:\n  crop_s: 3.0\n")
    cli.main(["pretrain", str(tmp_path), "--output", "run", "--config", str(tmp_path / "some.yaml")])
    assert (started[0][0].data.rules, started[0][0].randomness, started[0][0].data.crop_s) == (2, 2, 3.0)


@pytest.mark.parametrize("name", list(pretrain.recipes()))
def test_recipes_load_and_runs_keep_every_setting(
    name: str, started: list[tuple[PretrainConfig, bool]], tmp_path: Path
) -> None:
    recipe = yaml.safe_load(pretrain.recipes()[name].read_text())
    command = SYSTEMS[recipe["system"]].command
    assert name in pretrain.recipes(command)
    cli.main([command, str(tmp_path), "--recipe", name, "--output", str(tmp_path / "run")])
    config = started[0][0]
    assert config.system == recipe["system"] == system_of(config.model)
    assert config.model == recipe_model(name)
    for group in ("data", "optimizer", "trainer"):
        for option, value in recipe.get(group, {}).items():
            assert getattr(getattr(config, group), option) == pytest.approx(float(value) if option == "lr" else value)
    write_config(config, tmp_path / "config.yaml")
    kept = yaml.safe_load((tmp_path / "config.yaml").read_text())
    whole = dataclasses.asdict(config)
    assert kept.keys() == whole.keys() - {"output"} - ({"teacher"} if command == "pretrain" else set())
    for group in ("model", "data", "optimizer", "trainer", "quality"):
        assert kept[group].keys() == whole[group].keys()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("wav2vec2-base", {"feat_quantizer_dropout": 0.1, "mask_time_prob": 0.65, "layerdrop": 0.05}),
        ("hubert-base", {"mask_time_prob": 0.8, "layerdrop": 0.05, "num_hidden_layers": 12}),
        ("distilhubert", {"layerdrop": 0.0, "num_hidden_layers": 2, "activation_dropout": 0.1}),
    ],
)
def test_the_defaults_of_a_system_are_those_of_its_base_recipe(recipe: str, expected: dict[str, Any]) -> None:
    config = recipe_model(recipe)
    assert config == type(config)()
    if recipe != "distilhubert":
        expected |= {"activation_dropout": 0.0, "feat_proj_dropout": 0.1, "features_penalty_weight": 10.0}
    expected |= {"hidden_dropout": 0.1, "do_normalize": False, "feature_grad_mult": 0.1, "hidden_size": 768}
    assert {name: getattr(config, name) for name in expected} == expected
    # Settings missing from a config.json get Transformers' defaults.
    of_transformers = type(config).from_dict({"model_type": config.model_type})
    for field in dataclasses.fields(EncoderConfig):
        if field.name != "model_type":
            assert getattr(of_transformers, field.name) == field.default


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name in ("lhotse", "rich") else find_spec(name))
    assert cli.main(["prepare", "somewhere", "--output", "x.jsonl.gz"]) == 1
    assert "needs lhotse, rich: run `pip install '.[train]'` in a clone of the project" in capsys.readouterr().err
    assert cli.main(["info"]) == 0


def test_a_stranger_of_the_same_name_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"fastssl": "0.0.9"}

    def version(name: str) -> str:
        try:
            return versions[name]
        except KeyError:
            raise metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(metadata, "version", version)
    told = "the distribution fastssl 0.0.9 is also installed, but it is not this project (fastssl-speech)"
    assert cli.main(["info"]) == 0
    assert told in capsys.readouterr().out
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert cli.main(["prepare", "somewhere", "--output", "x.jsonl.gz"]) == 1
    assert told in capsys.readouterr().err
    versions.clear()
    assert cli.main(["info"]) == 0
    assert "distribution" not in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fastssl {fastssl.__version__}\n"
    assert metadata.version("fastssl-speech") == fastssl.__version__


def test_nobody_is_sent_to_the_strangers_package() -> None:
    root = Path(fastssl.__file__).parent.parent
    files = [*root.glob("*.md"), *root.glob("_build/*.py"), *(root / "fastssl").rglob("*.py"), root / "Makefile"]
    for path in files:
        assert not re.search(r"pip3? install [^`\n]*\bfastssl(?!-speech)\b", path.read_text()), path


def test_info_gives_backends_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for op, devices in (dispatch.BACKENDS | dispatch.INFERENCE_BACKENDS).items():
        section = text.split(f"\n{op}\n")[1].split("\n\n")[0]
        for device, backends in devices.items():
            assert f"  {device}: {', '.join(backends)}\n" in section + "\n"
        for (backend, _), reason in dispatch.MISSING[op].items():
            assert f"no {backend}: {reason}" in section
    assert "torch " in text
    assert "CPU: " in text
    assert "compiled module for data workers: " in text


def test_info_says_why_the_host_module_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fastssl._host", None)
    assert cli.main(["info"]) == 0
    assert "compiled module for data workers: compiled module _host was not built: " in capsys.readouterr().out


def test_info_and_help_need_none_of_the_extras() -> None:
    blocked = (
        "jsonargparse",
        "lhotse",
        "lightning",
        "matplotlib",
        "rich",
        "soundfile",
        "tensorboard",
        "sklearn",
        "yaml",
    )
    program = f"import sys; sys.modules |= dict.fromkeys({blocked!r}); from fastssl.cli import main; main(['info'])"
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert outcome.returncode == 0, outcome.stderr
    assert "contrastive_loss" in outcome.stdout


def test_prepare_writes_what_pretrain_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    import soundfile

    from fastssl.data.corpus import open_corpus

    folder = tmp_path / "audio"
    folder.mkdir()
    for index in range(20):
        soundfile.write(folder / f"{index}.wav", np.zeros(16000 * 3), 16000)
    (folder / "empty.wav").touch()
    manifest = tmp_path / "corpus.jsonl.gz"
    assert cli.main(["prepare", str(folder), "--output", str(manifest)]) == 0
    outcome = capsys.readouterr()
    assert "20 recordings, 0.02 hours, 1 left out" in outcome.out
    assert "empty.wav is empty" in outcome.err
    assert open_corpus(manifest).num_recordings == 20


#: Modules of commands and what only these commands use; a message in them may name the options of all.
_OWN_MODULES = {
    "extract": ["eval/extract.py", "eval/encode.py"],
    "label": ["eval/label"],
    "quality": ["eval/quality", "eval/encode.py"],
    "probe": ["eval/probe", "eval/encode.py"],
    "prepare": ["cli/prepare.py"],
    "report": ["cli/report.py"],
    "distill": ["train", "cli/pretrain.py"],
}


@pytest.mark.parametrize("command", _OWN_MODULES)
def test_messages_name_options_that_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    known = set(re.findall(r"--[a-z][a-z_]*", capsys.readouterr().out))
    package = Path(fastssl.__file__).parent
    texts = [str(cli._worker_ended(command))]
    for place in _OWN_MODULES[command]:
        for path in sorted((package / place).rglob("*.py")) or [package / place]:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            texts += [
                node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and str is type(node.value)
            ]
    named = {name for text in texts for name in re.findall(r"(?<![\w`-])--[a-z][a-z_]*", text)}
    assert named - known == set()


def test_only_commands_with_processes_to_leave_out_are_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli._COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        options = re.findall(r"--[\w.]+", capsys.readouterr().out)
        named = re.findall(r"--[\w.]+", str(cli._worker_ended(command)))
        assert named == [option for option in ("--data.num_workers", "--num_workers") if option in options]
