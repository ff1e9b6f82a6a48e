"""Test that the README's examples run and that it names every recipe and folder; recipes contain only changes."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.recipes import recipe_model
from fastssl.cli.pretrain import recipes
from fastssl.models.encoder import Encoder
from fastssl.train.config import DataConfig, OptimizerConfig, QualityConfig, TrainerConfig
from fastssl.train.systems import SYSTEMS

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks(block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "transformers" in block:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    Encoder(recipe_model("wav2vec2-tiny")).save_pretrained(tmp_path / "runs" / "demo" / "encoder")
    exec(compile(block.replace("runs/demo", str(tmp_path / "runs" / "demo")), "README.md", "exec"), {})
    if "print(" in block:
        assert capsys.readouterr().out


@pytest.mark.parametrize("name", recipes())
def test_recipes_say_what_differs_from_the_defaults_and_no_more(name: str) -> None:
    recipe = yaml.safe_load(recipes()[name].read_text())
    groups = {"data": DataConfig, "optimizer": OptimizerConfig, "trainer": TrainerConfig, "quality": QualityConfig}
    groups |= {"model": SYSTEMS[recipe.pop("system")].config_class}
    for group, values in recipe.items():
        defaults = json.loads(json.dumps(dataclasses.asdict(groups[group]())))  # tuples as lists
        assert values
        for option, value in values.items():
            if isinstance(value, dict):
                assert value
                assert all(defaults[option][part] != value[part] for part in value), (
                    f"{group}.{option}: repeats a default"
                )
            else:
                assert defaults[option] != value, f"{group}.{option} repeats the default"


def test_every_recipe_and_folder_is_named() -> None:
    text = README.read_text()
    tree = text.partition("## Where things are")[2]
    for name in recipes():
        system, _, size = name.rpartition("-")
        named = re.search(rf"[ ;,]{name}[,;\s]", tree) or re.search(rf"recipes/.*{system}-[^;]*{size}", tree)
        assert named, f"README's tree leaves out {name}"
    for path in (README.parent / "fastssl").iterdir():
        if path.is_dir() and any(path.glob("*.py")):
            assert f"  {path.name}/" in text, f"README's tree leaves out {path.name}/"
