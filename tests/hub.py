"""A stand-in for the Hugging Face Hub: its cache on this machine, in a folder of the test, with nothing to fetch."""

import hashlib
import shutil
from pathlib import Path

import pytest


def put_into_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, name: str, folder: Path) -> None:
    """Put a model folder into a cache under a name, as a download does, and let huggingface_hub use only this cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = hashlib.sha1(name.encode()).hexdigest()
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
