"""Test the Conformer encoder: batch mates, short utterances, saved folders, and refused configs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import fastssl
from fastssl.models.conformer import ConformerConfig, ConformerEncoder
from fastssl.models.encoder import Encoder
from fastssl.models.model_card import ModelCard
from fastssl.packing import Packed
from tests.interop.tiny_models import assert_same_weights, waveforms_of

SMALL = ConformerConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=40,
    conv_dim=(16, 20),
    conv_depthwise_kernel_size=5,
)


def make_encoder(**changes: Any) -> ConformerEncoder:
    torch.manual_seed(0)
    return ConformerEncoder(replace(SMALL, **changes)).eval()


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 12_000), min_size=2, max_size=5))
def test_features_alone_and_in_any_batch_are_equal_bit_for_bit(lengths: list[int]) -> None:
    encoder = make_encoder()
    waveforms = waveforms_of(*lengths)
    with torch.no_grad():
        together = encoder(waveforms)
        for row, waveform in enumerate(waveforms.unpack()):
            alone = encoder(Packed.pack([waveform.clone()]))
            for ours, expected in zip(together.hidden_states, alone.hidden_states, strict=True):
                assert torch.equal(ours.unpack()[row], expected.values)


def test_gradients_do_not_see_batch_mates() -> None:
    encoder = make_encoder()
    waveforms = waveforms_of(9_000, 4_000, 1_360)
    values = waveforms.values.requires_grad_()
    first = encoder(waveforms).features.unpack()[1]
    weights = torch.sin(torch.arange(first.numel())).view_as(first)
    (grad,) = torch.autograd.grad((first * weights).sum(), values)
    assert grad[:9_000].eq(0).all()
    assert grad[13_000:].eq(0).all()
    assert grad[9_000:13_000].ne(0).any()


def test_frames_and_hidden_states() -> None:
    encoder = make_encoder()
    output = encoder(waveforms_of(1_359, 1_360, 1_999, 2_000, 0, 16_000))
    assert output.features.layout.lengths == (0, 1, 1, 2, 0, 23)
    assert (encoder.config.receptive_field_samples, encoder.config.samples_per_frame) == (1360, 640)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.features.values, output.hidden_states[-1].values)
    again = encoder.encoder.layers[0](output.hidden_states[0].values, output.features.layout)
    assert torch.equal(again, output.hidden_states[1].values)


def test_a_frame_of_the_front_end_sees_what_the_config_says() -> None:
    encoder = make_encoder()
    waveforms = waveforms_of(6_000)
    values = waveforms.values.requires_grad_()
    mel = encoder.log_mel(waveforms)
    front = encoder.subsampling(mel).values
    (grad,) = torch.autograd.grad(front[2].sum(), values)
    seen = grad[:, 0].nonzero()[:, 0]
    # The window function is zero at its first sample, which therefore gets no gradient.
    assert (seen[0].item(), seen[-1].item()) == (2 * 640 + 1, 2 * 640 + 1360 - 1)


def test_the_level_of_a_recording_does_not_matter() -> None:
    encoder = make_encoder()
    waveforms = waveforms_of(8_000)
    louder = Packed(30 * waveforms.values, waveforms.layout)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(louder).features.values, encoder(waveforms).features.values, rtol=0, atol=1e-3
        )


def test_round_trip_through_a_folder(tmp_path: Path) -> None:
    encoder = make_encoder(num_mel_bins=40)
    encoder.save_pretrained(tmp_path / "run" / "encoder", card=ModelCard(recipe="best-rq-tiny"))
    waveforms = waveforms_of(5_000, 1_500)
    for source in (tmp_path / "run", tmp_path / "run" / "encoder", encoder):
        again = fastssl.load_encoder(source)
        assert isinstance(again, ConformerEncoder)
        assert not again.training
        assert again.config == encoder.config
        assert_same_weights(dict(again.state_dict()), dict(encoder.state_dict()))
        with torch.no_grad():
            assert torch.equal(again(waveforms).features.values, encoder(waveforms).features.values)
    assert not list(tmp_path.rglob("*.partial"))
    names = {path.name for path in (tmp_path / "run" / "encoder").iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}


def test_model_card_does_not_promise_transformers(tmp_path: Path) -> None:
    make_encoder().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["library_name"] == "fastssl"
    assert "best-rq" in matter["tags"]
    assert "ransformers" not in text
    assert "(frames, 24), one every 40 ms" in body
    (block,) = body.split("```python\n")[1:]
    exec(block.partition("```")[0].replace('"..."', repr(str(tmp_path))), {})
    (tmp_path / "README.md").write_text("mine")
    make_encoder().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_models_of_half_precision() -> None:
    encoder = make_encoder()
    waveforms = waveforms_of(8_000, 3_000)
    with torch.no_grad():
        expected = encoder(waveforms).features.values
        with torch.autocast("cpu", torch.bfloat16):
            autocast = encoder(waveforms).features.values
        half = encoder.to(torch.bfloat16)(Packed(waveforms.values.bfloat16(), waveforms.layout)).features.values
    assert half.dtype == autocast.dtype == torch.bfloat16
    for found in (autocast, half):
        assert (found.float() - expected).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "48"}, "hidden_size: must be of type int, got '48'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: must be at least 0, got -1"),
        ({"num_attention_heads": 8}, "num_attention_heads: must divide hidden_size=24 into even widths, got 8"),
        ({"hidden_dropout": 1.0}, "hidden_dropout: must be at least 0 and below 1, got 1.0"),
        ({"conv_dim": [16]}, r"conv_dim: must have two entries, one per convolution, got \(16,\)"),
        ({"conv_depthwise_kernel_size": 4}, "conv_depthwise_kernel_size: must be odd, got 4"),
        ({"num_mel_bins": 0}, "num_mel_bins: must be at least 1, got 0"),
    ],
)
def test_values_that_no_config_has_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_encoder().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        fastssl.load_encoder(tmp_path)


def test_what_is_no_conformer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_type: must be 'best-rq' for a Conformer, got 'hubert'"):
        ConformerConfig(model_type="hubert")
    make_encoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'best-rq', expected one of wav2vec2"):
        Encoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"waveforms: expected \(N,\) or \(N, 1\)"):
        make_encoder()(waveforms_of(400)._replace(values=torch.zeros(400, 2)))
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"hidden_size": 24', '"hidden_size": 32'))
    with pytest.raises(ValueError, match=r"has shape .*, expected"):
        fastssl.load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ValueError, match=r"weights are missing: encoder\.layers\.2"):
        fastssl.load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(config.replace("best-rq", "whisper"))
    with pytest.raises(ValueError, match=r"model_type is 'whisper', expected one of .*, best-rq"):
        fastssl.load_encoder(tmp_path)
