"""Test other libraries' encoders with our compressor: layers see fewer frames, heads the original number."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl.nn import SequenceCompressor
from fastssl.packing import Packed
from tests.interop.tiny_models import FAMILIES, TINY, assert_close, padded_batch, transformers_model

LENGTHS = [5000, 900, 9300]
KINDS: dict[str, dict[str, Any]] = {
    "average": {"factor": 3},
    "integrate-and-fire": {},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def make_compressor(kind: str, width: int = TINY["hidden_size"]) -> SequenceCompressor:
    torch.manual_seed(0)
    compressor = SequenceCompressor(width, kind=kind, **KINDS[kind]).eval()  # type: ignore[arg-type]
    if kind == "integrate-and-fire":
        compressor.frame_period_ms = 50.0
    return compressor


@torch.no_grad()
@EVERY_KIND
@pytest.mark.parametrize("variant", [*FAMILIES, "conformer base"])
def test_equals_the_layers_of_transformers_on_fewer_frames(variant: str, kind: str) -> None:
    original, compressor = transformers_model(variant), make_compressor(kind)
    model = fastssl.accelerate(copy.deepcopy(original), compressor=compressor)
    waveforms, mask = padded_batch(LENGTHS)
    output = model(waveforms, attention_mask=mask, output_hidden_states=True)
    for row, samples in enumerate(LENGTHS):
        frames = original.feature_extractor(waveforms[row : row + 1, :samples]).transpose(1, 2)
        projected = original.feature_projection(frames)
        projected = projected[0] if isinstance(projected, tuple) else projected
        compressed = compressor(Packed.pack([projected[0]]))
        assert len(compressed.frames.values) <= max(2, len(projected[0]) / 2)
        count = len(projected[0])
        expected = compressed.upsample(original.encoder(compressed.frames.values[None]).last_hidden_state[0])
        assert_close(output.last_hidden_state[row, :count], expected, 2e-4)
        for state in output.hidden_states:
            assert state.shape == output.last_hidden_state.shape
        if "large" not in variant and "conformer" not in variant:  # there, the last hidden state comes before a norm
            assert_close(output.hidden_states[-1][row, :count], expected, 2e-4)


@torch.no_grad()
def test_rate_zero_changes_no_output() -> None:
    original, compressor = transformers_model("wav2vec2 base", head="ForCTC"), make_compressor("integrate-and-fire")
    compressor.frame_period_ms, compressor.rate = None, 0.0
    plain = fastssl.accelerate(copy.deepcopy(original))
    model = fastssl.accelerate(original, compressor=compressor)
    waveforms, mask = padded_batch(LENGTHS)
    assert torch.equal(model(waveforms, attention_mask=mask).logits, plain(waveforms, attention_mask=mask).logits)
    compressor.rate = 1.0
    fewer = model(waveforms, attention_mask=mask).logits
    assert fewer.shape == plain(waveforms, attention_mask=mask).logits.shape
    restored = fastssl.restore(model)
    assert not hasattr(restored.wav2vec2, "fastssl_compressor")
    assert restored.state_dict().keys() == fastssl.restore(plain).state_dict().keys()


def test_it_learns_with_the_model() -> None:
    compressor = make_compressor("integrate-and-fire")
    model = fastssl.accelerate(transformers_model("hubert large", head="ForCTC"), compressor=compressor).train()
    waveforms, mask = padded_batch(LENGTHS)
    labels = torch.tensor([[1, 2, 3], [1, -100, -100], [4, 5, 6]])
    model(waveforms, attention_mask=mask, labels=labels).loss.backward()
    parameters = dict(model.named_parameters())
    for name, parameter in compressor.named_parameters():
        assert parameters[f"hubert.fastssl_compressor.{name}"] is parameter
        assert parameter.grad is not None
        assert parameter.grad.any(), name
    again = fastssl.accelerate(model, norm="padded")  # the model keeps its compressor
    assert again.hubert.fastssl_compressor is compressor


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_not_lost_without_a_word(kind: str, tmp_path: Path) -> None:
    compressor = make_compressor(kind)
    model = fastssl.accelerate(transformers_model("wav2vec2 base", head="ForCTC"), compressor=compressor)
    with pytest.raises(ValueError, match=r"path_or_model: Wav2Vec2ForCTC has a compressor that `fastssl\.accelerate`"):
        fastssl.load_encoder(model)
    model.save_pretrained(tmp_path)
    if compressor.state_dict():
        with pytest.raises(
            ValueError, match=r"contains a compressor .* \(wav2vec2\.fastssl_compressor\.\S*, \.\.\.\) and"
        ):
            fastssl.load_encoder(tmp_path)
    assert fastssl.load_encoder(fastssl.restore(model)).compressor is None


@torch.no_grad()
def test_what_the_original_would_have_to_run_is_an_error() -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base"), compressor=make_compressor("average"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="the original code cannot apply the compressor"):
            model(torch.randn(1, 4000), output_attentions=True)


@torch.no_grad()
def test_it_takes_mode_and_dtype_of_the_encoder() -> None:
    compressor = make_compressor("integrate-and-fire").train()
    model = fastssl.accelerate(transformers_model("wav2vec2 base").bfloat16(), compressor=compressor)
    assert not compressor.training
    assert model(torch.randn(1, 9000, dtype=torch.bfloat16)).last_hidden_state.isfinite().all()


def test_rejects_what_does_not_fit() -> None:
    model = transformers_model("wav2vec2 base")
    with pytest.raises(ValueError, match="compressor: has 16 channels, but the encoder's width is 48"):
        fastssl.accelerate(model, compressor=make_compressor("average", width=16))
    two = torch.nn.ModuleList([model, transformers_model("hubert base")])
    with pytest.raises(ValueError, match="compressor: expected a model with one encoder, but ModuleList has 2"):
        fastssl.accelerate(two, compressor=make_compressor("average"))
    assert not hasattr(model, "_fastssl_norm")


@torch.no_grad()
@EVERY_KIND
def test_torchaudio(kind: str) -> None:
    torchaudio = pytest.importorskip("tests.interop.tiny_torchaudio")
    for variant in ("wav2vec2 base, logits", "wavlm large"):
        original, compressor = torchaudio.make(variant), make_compressor(kind)
        model = fastssl.accelerate(copy.deepcopy(original), compressor=compressor)
        waveforms, lengths = torchaudio.batch_of(LENGTHS)
        last, _ = model(waveforms, lengths)
        layers, _ = model.extract_features(waveforms, lengths)
        for row, samples in enumerate(LENGTHS):
            expected, of_layers = _by_torchaudio(original, compressor, waveforms[row : row + 1, :samples])
            assert_close(last[row, : len(expected)], expected, 2e-4)
            for found, of_layer in zip(layers, of_layers, strict=True):
                assert_close(found[row, : len(of_layer)], of_layer, 2e-4)


def _by_torchaudio(model: Any, compressor: SequenceCompressor, waveform: Tensor) -> tuple[Tensor, list[Tensor]]:
    frames, _ = model.feature_extractor(waveform, None)
    compressed = compressor(Packed.pack([model.encoder.feature_projection(frames)[0]]))
    fewer = compressed.frames.values[None]
    last, layers = model.encoder.transformer(fewer), model.encoder.transformer.get_intermediate_outputs(fewer)
    last = last if model.aux is None else model.aux(last)
    return compressed.upsample(last[0]), [compressed.upsample(layer[0]) for layer in layers]
