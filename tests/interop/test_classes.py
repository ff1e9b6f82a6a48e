"""Test what Transformers decides by a model's class: initial weights, and which outputs a model can record."""

import copy

import pytest
import torch

import fastssl
from tests.interop.tiny_models import EVERY_FAMILY, padded_batch, transformers_model

pytest.importorskip("transformers")


@EVERY_FAMILY
def test_an_accelerated_class_initialises_as_the_original(variant: str) -> None:
    """Transformers leaves out some initial weights of classes that are defined elsewhere."""
    original = transformers_model(variant)
    models = []
    for one in (fastssl.accelerate(copy.deepcopy(original)), original):
        torch.manual_seed(3)
        models.append(type(one)(one.config))
        assert not type(one).is_custom_code()
    for (name, found), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_attentions_without_a_model_of_the_original_class() -> None:
    """A process may have made accelerated models only, and Transformers notes by class what it can record."""
    registry = pytest.importorskip("transformers.utils.output_capturing")._CAN_RECORD_REGISTRY
    model = fastssl.accelerate(transformers_model("wav2vec2 base", attn_implementation="eager"))
    registry.pop(str(type(model).__mro__[1]))
    waveforms, _ = padded_batch([5000])
    with torch.no_grad(), pytest.warns(UserWarning, match="attention weights"):
        output = model(waveforms, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 3
    assert len(output.hidden_states) == 4
