"""Test which torchaudio models are accelerated, and that models which contain them still work."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastssl
from tests.interop.tiny_models import TORCHAUDIO_FACTORIES, assert_close
from tests.interop.tiny_torchaudio import TINY, batch_of, make, models

pipelines = pytest.importorskip("torchaudio.pipelines")
wrappers = pytest.importorskip("torchaudio.pipelines._wav2vec2.utils")


@pytest.mark.parametrize("normalize_waveform", [False, True])
@pytest.mark.parametrize("variant", ["wav2vec2 base, logits", "wavlm large"])
def test_wrappers_of_pipelines(variant: str, normalize_waveform: bool) -> None:
    options = {"normalize_waveform": normalize_waveform, "apply_log_softmax": True, "append_star": True}
    original = wrappers._extend_model(make(variant), **options)
    model = fastssl.accelerate(copy.deepcopy(original))
    assert type(model) is type(original)
    waveforms, _ = batch_of([5000])
    with torch.no_grad():
        assert_close(model(waveforms)[0], original(waveforms)[0], 2e-4)
        for found, expected in zip(*(m.extract_features(waveforms)[0] for m in (model, original)), strict=True):
            assert_close(found, expected, 2e-4)


BUNDLES = [name for name, value in vars(pipelines).items() if isinstance(value, pipelines.Wav2Vec2Bundle)]


@pytest.mark.parametrize("name", TORCHAUDIO_FACTORIES)
def test_every_factory_is_served(name: str) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
    assert type(fastssl.accelerate(model)) is not models.Wav2Vec2Model


def test_every_pipeline_is_served() -> None:
    assert len(BUNDLES) > 20
    made: dict[str, nn.Module] = {}
    for name in BUNDLES:
        bundle = getattr(pipelines, name)
        settings = bundle._params | {"encoder_num_layers": 1, "aux_num_out": None}
        if repr(settings) not in made:
            with torch.device("meta"):
                made[repr(settings)] = fastssl.accelerate(wrappers._get_model(bundle._model_type, settings))
    assert all(type(model) is not models.Wav2Vec2Model for model in made.values())


def test_hubert_pretraining_computes_what_it_did() -> None:
    """The pre-training model calls the parts of its encoder directly, so these must still run the original code."""
    options = {key: value for key, value in TINY.items() if key != "aux_num_out"}
    heads = {"mask_prob": 0.8, "mask_selection": "static", "mask_other": 0.0, "mask_length": 3, "final_dim": 16}
    spaces = {"no_mask_overlap": False, "mask_min_space": 1, "skip_masked": False, "skip_nomask": False}
    channels = {
        "mask_channel_prob": 0.0,
        "mask_channel_selection": "static",
        "mask_channel_other": 0.0,
        "mask_channel_length": 10,
        "no_mask_channel_overlap": False,
        "mask_channel_min_space": 1,
    }
    torch.manual_seed(0)
    original = models.hubert_pretrain_model(
        **(options | heads | spaces | channels), num_classes=5, feature_grad_mult=0.1
    )
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, lengths = batch_of([9000, 7000])
    labels = torch.randint(5, (2, 27))
    outputs = []
    for m in (model, original):
        torch.manual_seed(1)
        outputs.append(m(waveforms, labels, lengths))
    for found, expected in zip(*outputs, strict=True):
        assert torch.equal(found, expected)
    with torch.no_grad():
        alone = original.wav2vec2(waveforms[:1])[0]
        assert_close(model.wav2vec2(waveforms[:1])[0], alone, 2e-4)


def test_torchaudio_is_not_imported_unless_somebody_did() -> None:
    """A broken torchaudio must not prevent the acceleration of Transformers' models."""
    code = """
import sys
from torch import nn
import fastssl
class Broken:
    def find_spec(self, name, path=None, target=None):
        assert name != "torchaudio", "imported"
sys.meta_path.insert(0, Broken())
fastssl.restore(nn.Linear(1, 1))
try:
    fastssl.accelerate(nn.Linear(1, 1))
except ValueError as error:
    assert "torchaudio.Wav2Vec2Model" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(fastssl.__file__).parent.parent)


def test_what_is_not_known_or_not_served_is_named() -> None:
    with pytest.raises(ValueError, match=r"Linear has no encoder.*torchaudio\.Wav2Vec2Model"):
        fastssl.accelerate(nn.Linear(2, 2))
    for path in ("feature_extractor", "encoder.transformer", "encoder.transformer.layers.1"):
        model = make("wav2vec2 base")
        model.set_submodule(path, nn.Identity())
        with pytest.raises(
            ValueError, match=rf"model: {path} is a torch\.nn\.modules\.linear\.Identity; only torchaudio"
        ):
            fastssl.accelerate(model)
        assert type(model) is models.Wav2Vec2Model
    model = make("wav2vec2 base")
    model.feature_extractor.conv_layers[0].layer_norm = nn.GroupNorm(4, 32)
    with pytest.raises(ValueError, match=r"conv_layers\.0\.layer_norm has 4 groups for 32 channels"):
        fastssl.accelerate(model)
