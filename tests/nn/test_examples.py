"""The examples in the docstrings of the modules that people use alone."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import fastssl
from fastssl import nn

MODULES = [f"fastssl.nn.{module.name}" for module in pkgutil.iter_modules(nn.__path__)]
#: What somebody may want alone in another model; `Compressed` is what one of them returns.
EXPORTED = sorted(name for name, value in vars(nn).items() if isinstance(value, type) and name != "Compressed")


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str) -> None:
    torch.manual_seed(0)
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.FAIL_FAST).failed == 0


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exported_module_has_an_example(name: str) -> None:
    assert ">>> " in (getattr(nn, name).__doc__ or "")


def test_exported_names() -> None:
    expected = {"ContrastiveLoss", "ConvolutionalPositionalEmbedding", "FeatureExtractor", "SelfAttention"}
    expected |= {"SequenceCompressor", "ConformerLayer", "LogMel", "RandomProjectionQuantizer"}
    assert expected <= set(EXPORTED)
    assert fastssl.nn is nn
