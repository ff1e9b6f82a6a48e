"""Run the docstring examples of the modules that users may want without the rest of the package."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import fastssl
from fastssl import nn

MODULES = [f"fastssl.nn.{module.name}" for module in pkgutil.iter_modules(nn.__path__)]
#: The exported modules; `Compressed` is left out because it is only a return type.
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
