"""Test `push_to_hub` with a stand-in for the Hub that keeps what is uploaded in a folder."""

import inspect
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastssl
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.model_card import ModelCard
from fastssl.models.speech_encoder import SpeechEncoder
from tests.interop.tiny_models import TINY, assert_same_weights


class Hub:
    """The part of huggingface_hub's `HfApi` that an upload needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, Any]] = []
        self.error: Exception | None = None

    def __call__(self, *, token: str | None) -> "Hub":
        self.calls.append(("token", token))
        return self

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> None:
        if self.error is not None:
            raise self.error
        assert exist_ok
        self.calls.append(("private", private))
        (self.folder / name).mkdir(parents=True, exist_ok=True)

    def file_exists(self, name: str, file: str) -> bool:
        return (self.folder / name / file).exists()

    def upload_folder(
        self, *, repo_id: str, folder_path: str, commit_message: str, ignore_patterns: list[str] | None
    ) -> Any:
        for path in Path(folder_path).iterdir():
            if not any(fnmatch(path.name, pattern) for pattern in ignore_patterns or []):
                shutil.copy(path, self.folder / repo_id / path.name)
        self.calls.append(("message", commit_message))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    made, real = Hub(tmp_path / "hub"), huggingface_hub.HfApi
    # The real one takes these calls.
    inspect.signature(real).bind(token=None)
    inspect.signature(real.create_repo).bind(real, "me/mine", private=None, exist_ok=True)
    inspect.signature(real.file_exists).bind(real, "me/mine", "README.md")
    upload = {"repo_id": "me/mine", "folder_path": "x", "commit_message": "m", "ignore_patterns": ["README.md"]}
    inspect.signature(real.upload_folder).bind(real, **upload)
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    return made


def make() -> SpeechEncoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig.from_dict(TINY))


def card_on(hub: Hub) -> str:
    return (hub.folder / "me" / "mine" / "README.md").read_text()


def test_what_is_uploaded_opens_again(hub: Hub) -> None:
    encoder = make()
    url = encoder.push_to_hub("me/mine", private=True, token="t", message="m", card=ModelCard(license="mit"))
    assert url == "https://hub/me/mine/commit/1"
    assert hub.calls == [("token", "t"), ("private", True), ("message", "m")]
    assert 'license: "mit"' in card_on(hub)
    again = fastssl.load_encoder(hub.folder / "me" / "mine")
    assert_same_weights(dict(again.state_dict()), dict(encoder.state_dict()))


def test_which_card_is_uploaded(hub: Hub, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "run" / "encoder", card=ModelCard(recipe="of the run", data_hours=3.0))
    opened = fastssl.load_encoder(tmp_path / "run")
    opened.push_to_hub("me/mine")
    assert "| recipe | of the run |" in card_on(hub)
    # A card that somebody has edited there stays, unless a new one is given.
    (hub.folder / "me" / "mine" / "README.md").write_text("edited")
    opened.push_to_hub("me/mine")
    make().push_to_hub("me/mine")
    assert card_on(hub) == "edited"
    opened.push_to_hub("me/mine", card=ModelCard(recipe="another"))
    assert "| recipe | another |" in card_on(hub)
    # A new encoder has a plain card.
    make().push_to_hub("me/new")
    assert "recipe" not in (hub.folder / "me" / "new" / "README.md").read_text()


def test_why_it_was_not_uploaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.error = OSError("403 Forbidden\nmore")
    with pytest.raises(ValueError, match=r"^push_to_hub: me/mine: the Hub refused: OSError: 403 Forbidden; .*hf auth"):
        make().push_to_hub("me/mine")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        make().push_to_hub("me/mine")
