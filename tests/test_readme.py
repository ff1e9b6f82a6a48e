"""What the README shows runs."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from fastssl.cli.pretrain import recipes
from fastssl.models import best_rq, distillation, hubert, wav2vec2
from fastssl.models.encoder import Encoder
from fastssl.train.systems import SYSTEMS

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks(block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "transformers" in block:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    Encoder(wav2vec2.PRESETS["wav2vec2-tiny"]).save_pretrained(tmp_path / "runs" / "demo" / "encoder")
    exec(compile(block.replace("runs/demo", str(tmp_path / "runs" / "demo")), "README.md", "exec"), {})
    if "print(" in block:
        assert capsys.readouterr().out


@pytest.mark.parametrize("name", recipes())
def test_recipes_train_the_presets(name: str) -> None:
    recipe = yaml.safe_load(recipes()[name].read_text())
    preset = (wav2vec2.PRESETS | hubert.PRESETS | best_rq.PRESETS | distillation.PRESETS)[name]
    values = recipe["model"] | {"model_type": preset.model_type}
    assert SYSTEMS[recipe["system"]].config.from_dict(values) == preset


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
