"""Test that encoders take raw audio: they normalise where their config asks for it, and take (N,) as well as (N, 1)."""

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.eval.extract import extract
from fastssl.models import speech_encoder
from fastssl.models.conformer import ConformerConfig, ConformerEncoder
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.nn.waveforms import normalize_waveforms
from fastssl.packing import Packed
from tests.interop.tiny_models import LARGE, TINY, assert_close, transformers_model

_CONFORMER = ConformerConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    conv_dim=(16, 16),
    conv_depthwise_kernel_size=7,
    do_normalize=True,
)


def raw(*lengths: int) -> Packed:
    """Return quiet noise with an offset, (N,), as audio is read from a file."""
    generator = torch.Generator().manual_seed(1)
    return Packed.pack([0.1 + 0.02 * torch.randn(length, generator=generator) for length in lengths])


def make_encoder(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig.from_dict(TINY | LARGE | changes)).eval()


@pytest.fixture
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_encoder, "_said_that_calls_normalize", False)


def test_raw_audio_gives_the_features_of_transformers_with_its_feature_extractor(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers_model("wav2vec2 large")
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    theirs.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    encoder = fastssl.load_encoder(tmp_path)
    waveforms = raw(9_000, 3_210, 400)
    with torch.no_grad():
        output = encoder(waveforms)
        for found, waveform in zip(output.features.unpack(), waveforms.unpack(), strict=True):
            values = extractor(waveform.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"]
            assert_close(found, theirs(values).last_hidden_state[0], 2e-4, "features")
        as_they_are = encoder(waveforms, normalize=False).features.values
    assert (
        torch.cosine_similarity(as_they_are, output.features.values).mean() < 0.9
    )  # so the comparison shows something


@pytest.mark.parametrize("encoder", [make_encoder(), ConformerEncoder(_CONFORMER).eval()], ids=["encoder", "conformer"])
def test_every_call_normalises_each_utterance_alone(encoder: SpeechEncoder) -> None:
    waveforms = raw(5_000, 2_000, 1_600)
    scaled = normalize_waveforms(waveforms)
    with torch.no_grad():
        expected = encoder(scaled, normalize=False)
        for found in (encoder(waveforms), encoder(waveforms, normalize=True)):
            assert torch.equal(found.features.values, expected.features.values)
        frames = encoder.extract_features(waveforms)
        assert torch.equal(frames.values, encoder.extract_features(scaled, normalize=False).values)
        assert torch.equal(encoder.encode(frames).features.values, expected.features.values)
        for waveform, together in zip(waveforms.unpack(), expected.features.unpack(), strict=True):
            assert torch.equal(encoder(Packed.pack([waveform])).features.values, together)


@pytest.mark.parametrize("encoder", [make_encoder(), ConformerEncoder(_CONFORMER).eval()], ids=["encoder", "conformer"])
def test_silence_and_empty_utterances_have_finite_features(encoder: SpeechEncoder) -> None:
    silent = Packed.pack([torch.zeros(2_000), torch.empty(0), torch.full((2_000,), 0.5)])
    with torch.no_grad():
        features = encoder(silent).features
    assert features.values.isfinite().all()
    assert features.layout.lengths[1] == 0
    assert encoder(Packed(torch.empty(0), fastssl.Layout.from_lengths([]))).features.values.shape[0] == 0


def test_the_setting_is_that_of_the_call_then_of_the_encoder_then_of_the_config(tmp_path: Path) -> None:
    waveforms = raw(3_000)
    for do_normalize in (False, True):
        make_encoder(do_normalize=do_normalize).save_pretrained(tmp_path)
        plain = fastssl.load_encoder(tmp_path)
        with torch.no_grad():
            features = {x: plain(waveforms, normalize=x).features.values for x in (False, True)}
            assert not torch.equal(features[False], features[True])
            for given in (None, False, True):
                encoder = fastssl.load_encoder(tmp_path, normalize=given)
                expected = do_normalize if given is None else given
                assert encoder.normalizes is expected
                assert encoder.config.do_normalize is do_normalize
                for copied in (encoder, copy.deepcopy(encoder)):
                    assert torch.equal(copied(waveforms).features.values, features[expected])
                assert torch.equal(encoder(waveforms, normalize=not expected).features.values, features[not expected])
                # What is saved says what the weights were trained on.
                encoder.save_pretrained(tmp_path / "again")
                assert fastssl.load_encoder(tmp_path / "again").normalizes is do_normalize
    assert fastssl.load_encoder(plain) is plain
    assert plain.normalize is None
    assert fastssl.load_encoder(plain, normalize=False).normalizes is False


@pytest.mark.usefixtures("_nothing_said")
def test_a_call_says_once_that_it_normalises_unless_it_was_told_to() -> None:
    waveforms = raw(2_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_encoder(do_normalize=False)(waveforms)
        make_encoder()(waveforms, normalize=True)
        make_encoder()(waveforms, normalize=False)
        fastssl.load_encoder(make_encoder(), normalize=True)(waveforms)
    with pytest.warns(
        UserWarning, match=r"scales each waveform .* do_normalize=True.* earlier versions.*normalize=False"
    ):
        make_encoder()(waveforms)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_encoder()(waveforms)


def test_gradients_reach_raw_waveforms_through_the_normalisation() -> None:
    encoder, waveforms = make_encoder().requires_grad_(requires_grad=False), raw(1_200, 700)

    def gradient(scale: Any) -> Tensor:
        values = waveforms.values.clone().requires_grad_()
        features = encoder(scale(Packed(values, waveforms.layout)), normalize=scale is not normalize_waveforms)
        (
            features.features.values * torch.linspace(-1, 1, features.features.values.numel()).view(-1, 48)
        ).sum().backward()
        assert values.grad is not None
        return values.grad

    found = gradient(lambda x: x)
    assert found.abs().max() > 0
    assert torch.equal(found, gradient(normalize_waveforms))
    # An offset of the waveform changes nothing, so its gradient is zero.
    assert all(part.sum().abs() < 1e-4 * part.abs().sum() for part in found.split(waveforms.layout.lengths))


@pytest.mark.parametrize("do_normalize", [False, True])
def test_waveforms_of_both_shapes_give_the_same_bits(do_normalize: bool) -> None:
    flat = raw(3_000, 0, 1_700)
    column = Packed(flat.values.unsqueeze(1), flat.layout)
    for encoder in (
        make_encoder(do_normalize=do_normalize),
        make_encoder(do_normalize=do_normalize, feat_extract_norm="group"),
        ConformerEncoder(dataclasses.replace(_CONFORMER, do_normalize=do_normalize)).eval(),
    ):
        with torch.no_grad():
            assert torch.equal(encoder(flat).features.values, encoder(column).features.values)
        with pytest.raises(ValueError, match=r"waveforms: expected \(N,\) or \(N, 1\) samples, got \(4700, 2\)"):
            encoder(Packed(torch.zeros(4_700, 2), flat.layout))
        with pytest.raises(ValueError, match="divide 16-bit audio by 32768"):
            encoder(Packed(torch.zeros(4_700, dtype=torch.int16), flat.layout))


def test_a_call_refuses_audio_at_another_rate() -> None:
    waveforms = raw(2_000)
    for encoder in (make_encoder(), ConformerEncoder(_CONFORMER).eval()):
        with torch.no_grad():
            found = encoder(waveforms, sampling_rate=16_000).features.values
            assert torch.equal(found, encoder(waveforms).features.values)
        message = (
            r"sampling_rate: the encoder takes waveforms at 16000 Hz, got 8000; resample each.*waveform, 8000, 16000\)"
        )
        with pytest.raises(ValueError, match=message):
            encoder(waveforms, sampling_rate=8_000)


def _set_up_processor(folder: Path, name: str, **settings: Any) -> None:
    make_encoder(do_normalize=True).save_pretrained(folder)
    (folder / "preprocessor_config.json").unlink()
    inner = {"feature_extractor": settings} if name == "processor_config.json" else settings
    (folder / name).write_text(json.dumps(inner))


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_the_preprocessor_of_a_model_says_its_rate_and_whether_it_normalises(name: str, tmp_path: Path) -> None:
    for do_normalize in (False, True):
        _set_up_processor(tmp_path, name, sampling_rate=16_000, do_normalize=do_normalize)
        assert fastssl.load_encoder(tmp_path).config.do_normalize is do_normalize
    _set_up_processor(tmp_path, name, sampling_rate=8_000)
    message = rf"{name}: sampling_rate is 8000, expected 16000: fastssl resamples all audio to 16000 Hz.*choose one"
    with pytest.raises(ValueError, match=message):
        fastssl.load_encoder(tmp_path)
    with pytest.raises(ValueError, match=message):
        extract(tmp_path, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["feature_extractor", "audio_processor"])
def test_a_saved_encoder_is_not_hidden_by_an_older_processor(part: str, tmp_path: Path) -> None:
    older = {part: {"do_normalize": False, "dither": 0.5}, "processor_class": "Wav2Vec2Processor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(older))
    make_encoder(do_normalize=True).save_pretrained(tmp_path)
    assert fastssl.load_encoder(tmp_path).normalizes
    newer = json.loads((tmp_path / "processor_config.json").read_text())
    assert newer["processor_class"] == "Wav2Vec2Processor"
    assert newer[part]["dither"] == 0.5


def test_nothing_is_saved_beside_a_damaged_processor(tmp_path: Path) -> None:
    """The new config would have been there with the old weights."""
    make_encoder(do_normalize=False).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text("{")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"processor_config\.json: is not valid JSON"):
        make_encoder(do_normalize=True).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("part", ["feature_extractor", "audio_processor"])
def test_a_processor_whose_settings_of_audio_are_not_an_object_is_refused(part: str, tmp_path: Path) -> None:
    make_encoder(do_normalize=False).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({part: [{"do_normalize": True}]}))
    with pytest.raises(ValueError, match=rf"processor_config\.json: {part} is .*, expected an object; restore"):
        fastssl.load_encoder(tmp_path)


def test_the_processor_counts_if_there_are_both_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4}))
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False)
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    make_encoder(do_normalize=True).save_pretrained(tmp_path)
    assert fastssl.load_encoder(tmp_path).normalizes
    transformers.Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(tmp_path)
    assert not transformers.AutoFeatureExtractor.from_pretrained(tmp_path).do_normalize
    assert not fastssl.load_encoder(tmp_path).normalizes
    (tmp_path / "processor_config.json").write_text('{"processor_class": "Wav2Vec2Processor"}')
    assert fastssl.load_encoder(tmp_path).normalizes


@pytest.mark.parametrize("by", ["argument", "attribute"])
def test_normalize_must_be_a_bool(by: str) -> None:
    encoder, wrong = make_encoder(), "no"  # which would count as true
    options: dict[str, Any] = {"normalize": wrong} if by == "argument" else {}
    if by == "attribute":
        encoder.normalize = wrong  # type: ignore[assignment]
    with pytest.raises(ValueError, match="normalize: must be True, False or None, got 'no'"):
        encoder(raw(2_000), **options)


def test_normalize_of_load_encoder_must_be_a_bool() -> None:
    with pytest.raises(ValueError, match="normalize: must be True, False or None, got 1"):
        fastssl.load_encoder("nowhere", normalize=1)  # type: ignore[arg-type]
