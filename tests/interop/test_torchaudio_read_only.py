"""Test which modules torchaudio's encoders call, and which they only read, as the attention weights of WavLM."""

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fastssl
from tests.interop.test_read_only import listed, never_called, silent
from tests.interop.tiny_models import assert_close
from tests.interop.tiny_torchaudio import VARIANTS, batch_of, make


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_is_what_torchaudio_does_not_call(variant: str) -> None:
    model = make(variant)
    found = never_called(model, batch_of([5000])[0])
    assert found == listed(model, model.encoder.transformer.layers)
    assert len(found) == (3 if variant.startswith("wavlm") else 0)


def test_modules_that_are_only_read_are_only_read() -> None:
    class Louder(nn.MultiheadAttention):
        def forward(self, *args: Any, **options: Any) -> Any:
            raise AssertionError

    original = make("wavlm base")
    attention = original.encoder.transformer.layers[1].attention
    louder = Louder(48, 4, batch_first=True)
    louder.load_state_dict(attention.attention.state_dict())
    attention.attention = louder
    model = copy.deepcopy(original)
    name = r"encoder\.transformer\.layers\.1\.attention\.attention have adapters .* Put adapters on other modules"
    with pytest.warns(UserWarning, match=name):
        fastssl.accelerate(model)
    waveforms, _ = batch_of([5000])
    with torch.no_grad():
        assert_close(silent(model, waveforms)[0], original(waveforms)[0], 2e-4)


def test_what_cannot_be_called_is_refused() -> None:
    model = make("wavlm base")
    kind = type(model)
    with pytest.raises(ValueError, match=r"call_projections: .*WavLMSelfAttention.* no module to call"):
        fastssl.accelerate(model, call_projections=True)
    assert type(model) is kind
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastssl.accelerate(make("wav2vec2 base"), call_projections=True)


@pytest.mark.filterwarnings("ignore:.*so the original code runs")
@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_run_on_every_module_that_the_original_calls(variant: str) -> None:
    original = make(variant)
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = batch_of([5000])
    called: dict[bool, set[str]] = {False: set(), True: set()}
    for name in [name for name, _ in original.named_modules() if name]:
        for one in (original, model):
            add = partial(called[one is model].add, name)
            handle = one.get_submodule(name).register_forward_pre_hook(lambda *args, add=add: add())
            with torch.no_grad():
                one(waveforms)
            handle.remove()
    assert len(called[False]) > 40
    assert called[True] == called[False]


@pytest.mark.parametrize("frozen", ["", "feature_extractor", "encoder.feature_projection"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_outputs_need_gradients(variant: str, frozen: str) -> None:
    """torchaudio never marks waveforms."""
    original = make(variant).train()
    original.get_submodule(frozen).requires_grad_(False)
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = batch_of([5000])
    found, expected = ([x.requires_grad for x in one.extract_features(waveforms)[0]] for one in (model, original))
    assert found == expected == [bool(frozen)] * 3
