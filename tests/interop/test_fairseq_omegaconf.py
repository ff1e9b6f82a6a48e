"""Test checkpoints of fairseq whose settings are pickled by the real omegaconf, of today and the one fairseq pins."""

import collections
import operator
import os
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import fastssl
from tests.interop.test_fairseq import (
    SETTINGS,
    SETTINGS_LARGE,
    Evil,
    assert_opens,
    fairseq_weights,
    make_encoder,
)
from tests.interop.tiny_models import LARGE

WRITER = Path(__file__).with_name("write_fairseq.py")


def write(path: Path, python: str | Path, *, large: bool, nested: bool, **variables: str) -> tuple[Any, str]:
    """Write a checkpoint with the omegaconf of a Python; return the encoder in it, and omegaconf's version."""
    encoder = make_encoder(**LARGE if large else {}, do_normalize=large)
    wanted = {
        "weights": fairseq_weights(encoder, "w2v_encoder.w2v_model." if nested else ""),
        "model": (SETTINGS_LARGE if large else SETTINGS) | {"_name": "wav2vec2"},
        "task": {"normalize": large},
        "nested": nested,
    }
    torch.save(wanted, path)
    done = subprocess.run(
        [python, WRITER, path], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return encoder, done.stdout.strip()


def names_in(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return {str(given) for kind, given, _ in pickletools.genops(archive.read(pickled)) if kind.name == "GLOBAL"}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_settings_of_todays_omegaconf(large: bool, nested: bool, tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    encoder, version = write(tmp_path / "model.pt", sys.executable, large=large, nested=nested)
    assert version == omegaconf.__version__
    # What makes it the real thing: types and the cache of resolvers, besides the settings.
    assert {
        "collections defaultdict",
        "_operator getitem",
        "omegaconf.dictconfig DictConfig",
        "omegaconf.base ContainerMetadata",
        "__builtin__ unicode",
        "fairseq.models.wav2vec.wav2vec2 Choices",
    } <= names_in(tmp_path / "model.pt")
    assert_opens(tmp_path / "model.pt", encoder)


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
def test_settings_of_the_omegaconf_that_fairseq_pins(nested: bool, old_omegaconf: Path, tmp_path: Path) -> None:
    import numpy

    places = os.pathsep.join([str(old_omegaconf), str(Path(numpy.__file__).parents[1])])
    encoder, version = write(tmp_path / "model.pt", sys.executable, large=True, nested=nested, PYTHONPATH=places)
    assert version == "2.0.6"
    assert "collections defaultdict" in names_in(tmp_path / "model.pt")
    assert_opens(tmp_path / "model.pt", encoder)


@pytest.fixture(scope="module")
def old_omegaconf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install omegaconf 2.0.6 into an environment of its own, with a pip that still takes its metadata."""
    folder = tmp_path_factory.mktemp("old")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    for wanted in ("pip<24.1", "omegaconf==2.0.6"):
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", wanted], check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    return packages


def test_stand_ins_run_nothing(tmp_path: Path) -> None:
    """A defaultdict with a function for missing keys, and `operator.getitem`, which would call a method."""
    ran = tmp_path / "ran"
    cfg = {"model": SETTINGS, "task": {}}
    for value in (
        Evil(operator.getitem, Evil(collections.defaultdict, Evil(open, str(ran), "w")), "x"),
        Evil(collections.defaultdict, print),
    ):
        torch.save({"cfg": cfg, "model": fairseq_weights(make_encoder()), "extra_state": value}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"it names (_?io\.open|print), which is not run"):
            fastssl.load_encoder(tmp_path / "model.pt")
    assert not ran.exists()
    # With what is expected in such a file inside, they are inert.
    inside = Evil(operator.getitem, Evil(collections.defaultdict, dict), "x")
    encoder = make_encoder()
    torch.save({"cfg": cfg, "model": fairseq_weights(encoder), "extra_state": inside}, tmp_path / "model.pt")
    assert_opens(tmp_path / "model.pt", encoder)
