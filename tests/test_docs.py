"""Test docs/: its examples run, its links lead somewhere, and its table of tools says what tests hold."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastssl.interop import in_place
from tests.interop import test_drop_in, test_recorded, test_sharded, test_torchaudio, test_transformers
from tests.interop.tiny_models import ACCELERATED, transformers_model

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "drop-in.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
#: Name on the Hub -> variant and head of the tiny model that takes its place.
LOCAL = {
    "facebook/wav2vec2-base-960h": ("wav2vec2 base", "ForCTC"),
    "facebook/hubert-base-ls960": ("hubert base", "Model"),
    "facebook/hubert-large-ls960-ft": ("hubert large", "ForCTC"),
    "microsoft/wavlm-base-plus": ("wavlm base", "Model"),
}
#: Column of the tables -> tests of it, whose parameters are the architectures that they hold for.
COLUMNS: dict[str, tuple[Any, ...]] = {
    "inference": (
        test_transformers.test_equals_the_original_on_each_utterance_alone,
        test_torchaudio.test_equals_the_original_on_each_utterance_alone,
    ),
    "training": (
        test_transformers.test_training_gives_the_loss_and_gradients_of_each_utterance_alone,
        test_torchaudio.test_training_gives_the_loss_and_gradients_of_each_utterance_alone,
    ),
    "LoRA": (test_drop_in.test_lora,),
    "gradient checkpointing": (test_drop_in.test_gradient_checkpointing,),
    "DDP": (),
    "FSDP2": (test_sharded.test_sharded_layers_run_packed, test_sharded.test_torchaudio),
    "`torch.compile`": (test_drop_in.test_compile_leaves_the_encoder_packed,),
    "export, trace": (test_recorded.test_recordings_of_transformers_are_of_the_original,),
    "export, script": (test_recorded.test_torchaudio_can_be_scripted,),
}


def held(test: Any) -> Iterator[tuple[str, str]]:
    """Yield the libraries and architectures that a test is run with."""
    for mark in test.pytestmark:
        if mark.name == "parametrize" and "variant" in mark.args[0]:
            for value in mark.args[1]:
                library, variant = "transformers", value
                if "library" in mark.args[0]:
                    library, variant = value
                elif "head" in mark.args[0]:
                    variant, _ = value
                elif "torchaudio" in f"{test.__module__}.{test.__name__}":
                    library = "torchaudio"
                yield library, architecture(library, variant)


def architecture(library: str, variant: str) -> str:
    """Return the name of a variant's architecture in the page's tables."""
    if library == "transformers":
        return f"`{ACCELERATED[variant][0]}`"
    return "WavLM" if variant.startswith("wavlm") else "wav2vec 2.0, HuBERT, XLS-R"


def table(library: str) -> dict[str, dict[str, str]]:
    """Return a table of the page: architecture -> column -> cell."""
    lines = PAGE.partition(f"\n| {library} |")[2].partition("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {name: dict(zip(header, cells, strict=True)) for name, *cells in rows}


@pytest.mark.parametrize("library", ["Transformers", "torchaudio"])
def test_every_cell_is_tested(library: str) -> None:
    rows = table(library)
    for name, cells in rows.items():
        for column, cell in cells.items():
            found = {one for test in COLUMNS[column] for one in held(test)}
            if column == "DDP":
                found = {(kind, architecture(kind, variant)) for kind, variant in test_drop_in.ALL}
            if name == "`Wav2Vec2Conformer`" and cell.startswith("original"):
                continue  # in test_conformer.py
            assert ((library.lower(), name) in found) == (cell != "torchaudio has none"), f"{name}: {column}"


def test_every_served_architecture_has_a_row() -> None:
    served = {name for classes in in_place._served() if classes.width for name in classes.sources}
    assert {f"{name.strip('`')}Model" for name in table("Transformers")} == served
    assert set(table("torchaudio")) == {architecture("torchaudio", variant) for variant in test_drop_in.TORCHAUDIO}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks(block: str, tmp_path: Path) -> None:
    if "peft" in block:
        pytest.importorskip("peft", reason="peft is not installed")
    for name in re.findall(r'"([\w-]+/[\w.-]+)"', block):
        transformers_model(*LOCAL[name]).save_pretrained(tmp_path / name)
        block = block.replace(f'"{name}"', repr(str(tmp_path / name)))
    assert "fastssl" in block
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(original code|no effect)")
        exec(compile(block, "drop-in.md", "exec"), {})


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "docs/drop-in.md"])
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, target
