"""Test encoders with a compressor: a rate per call, equality with Transformers at rate 0, and training."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastssl
from benchmarks.recipes import recipe_model
from fastssl.data.segments import FrameSegments
from fastssl.models.compression import draw_compression
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2ForPreTraining
from fastssl.nn.random import draw_keys
from fastssl.packing import Packed

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "do_normalize": True,
    "feature_grad_mult": 1.0,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "average": {"compressor_factor": 3},
    "strided": {"compressor_factor": 2},
    "integrate-and-fire": {},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def make_encoder(kind: str) -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**SHAPE, compressor=kind, **KINDS[kind])).eval()


def make_model(**changes: Any) -> Wav2Vec2ForPreTraining:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_codevectors_per_group": 8, "codevector_dim": 16, "proj_codevector_dim": 16}
    options |= {"feat_quantizer_dropout": 0.0, "compressor": "integrate-and-fire", "num_negatives": 10}
    return Wav2Vec2ForPreTraining(Wav2Vec2Config(**SHAPE | options | changes))


def waveforms_of(*lengths: int) -> Packed:
    generator = torch.Generator().manual_seed(1)
    return Packed.pack([torch.randn(length, 1, generator=generator) for length in lengths])


@torch.no_grad()
def test_rate_zero_is_the_encoder_without_a_compressor_and_that_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = make_encoder("integrate-and-fire")
    plain = Encoder(EncoderConfig(**SHAPE)).eval()
    plain.load_state_dict({key: value for key, value in encoder.state_dict().items() if "compressor" not in key})
    waveforms = waveforms_of(16_000, 4_321, 30_011)
    ours, theirs = encoder(waveforms, rate=0.0), plain(waveforms)
    for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(one.values, other.values)
    assert ours.compressed is not None
    assert ours.compressed.frame_period_ms.tolist() == [20.0] * 3
    assert theirs.compressed is None

    encoder.save_pretrained(tmp_path)
    assert (tmp_path / "compressor.safetensors").is_file()
    opened = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert not any("compressor" in name for name, _ in opened.named_parameters())
    # Converted back from Transformers, the encoder has no compressor.
    back = fastssl.load_encoder(opened)
    assert back(waveforms).features.layout.lengths == theirs.features.layout.lengths
    for found, waveform in zip(ours.features.unpack(), waveforms.unpack(), strict=True):
        expected = opened(waveform.view(1, -1)).last_hidden_state[0]
        assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


@torch.no_grad()
@EVERY_KIND
def test_a_folder_gives_the_compressor_back(kind: str, tmp_path: Path) -> None:
    encoder = make_encoder(kind)
    options = {"frame_period_ms": 52.0} if kind == "integrate-and-fire" else {}
    waveforms = waveforms_of(16_000, 9_000)
    encoder.save_pretrained(tmp_path)
    opened = fastssl.load_encoder(tmp_path)
    assert isinstance(opened, Encoder)
    expected, found = encoder(waveforms, **options), opened(waveforms, **options)
    assert torch.equal(found.features.values, expected.features.values)
    assert found.compressed is not None
    before = plain_layout(encoder, waveforms)
    assert found.features.layout.total < before.total
    for period, obtained in zip(found.compressed.frame_period_ms, found.features.layout.lengths, strict=True):
        assert period == 20 * before.lengths[found.features.layout.lengths.index(obtained)] / obtained
    if kind == "average":
        assert not (tmp_path / "compressor.safetensors").exists()
        return
    (tmp_path / "compressor.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights are missing: those of compressor\.safetensors"):
        fastssl.load_encoder(tmp_path)
    # Saving an encoder without a compressor removes the file.
    encoder.save_pretrained(tmp_path)
    Encoder(EncoderConfig(**SHAPE)).save_pretrained(tmp_path)
    assert not (tmp_path / "compressor.safetensors").exists()
    assert fastssl.load_encoder(tmp_path).config == EncoderConfig(**SHAPE)


def test_weights_of_a_compressor_and_its_encoder_are_replaced_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_encoder("strided").save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert before.keys() == {"model.safetensors", "compressor.safetensors"}
    other = make_encoder("strided")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)

    def fails(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        if path.name.startswith("compressor"):
            raise OSError("no space left on device")
        save_file(tensors, path, **options)

    monkeypatch.setattr("fastssl.models.folder.save_file", fails)
    with pytest.raises(OSError, match="no space"):
        other.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == before


def plain_layout(encoder: Encoder, waveforms: Packed) -> fastssl.Layout:
    return encoder.extract_features(waveforms).layout


@torch.no_grad()
@EVERY_KIND
def test_batch_mates_do_not_matter(kind: str) -> None:
    encoder = make_encoder(kind)
    options = {"rate": 0.6} if kind == "integrate-and-fire" else {}
    waveforms = waveforms_of(9_000, 400, 3_210, 720, 30_000)
    together = encoder(waveforms, **options).features.unpack()
    for found, waveform in zip(together, waveforms.unpack(), strict=True):
        assert torch.equal(found, encoder(Packed.pack([waveform]), **options).features.values)


@torch.no_grad()
def test_a_call_without_a_rate_takes_the_encoders_own() -> None:
    encoder = make_encoder("integrate-and-fire")
    waveforms = waveforms_of(16_000, 9_000)
    learned = encoder(waveforms, rate=1.0).features
    assert torch.equal(encoder(waveforms).features.values, learned.values)
    assert encoder.compressor is not None
    encoder.compressor.frame_period_ms = 90.0
    assert encoder(waveforms).features.layout.total < learned.layout.total
    assert torch.equal(encoder(waveforms, rate=1.0).features.values, learned.values)
    encoder.compressor.frame_period_ms, encoder.compressor.rate = None, torch.tensor(0.0)
    assert encoder(waveforms).features.layout.lengths == plain_layout(encoder, waveforms).lengths


@torch.no_grad()
@pytest.mark.parametrize(("draw", "number"), [("rate", 0.4), ("period", 55.0)])
def test_what_is_trained_at_one_rate_or_period_is_opened_at_it(draw: str, number: float, tmp_path: Path) -> None:
    model = make_model(compression_draw=draw, compression_range=(number, number))
    model.wav2vec2.save_pretrained(tmp_path)
    encoder, waveforms = fastssl.load_encoder(tmp_path), waveforms_of(32_000, 20_000)
    options = {"rate": number} if draw == "rate" else {"frame_period_ms": number}
    asked = model.wav2vec2.eval()(waveforms, **options).features
    assert torch.equal(encoder(waveforms).features.values, asked.values)
    assert not torch.equal(encoder(waveforms, rate=1.0).features.values, asked.values)
    card = (tmp_path / "README.md").read_text()
    unit = "a rate" if draw == "rate" else "a frame period in ms"
    assert f"trained at {unit} of {number:g}, which is the default" in card
    assert "Transformers ignores the compressor and keeps every frame, which this encoder was not trained for" in card


@torch.no_grad()
def test_the_card_says_what_transformers_opens(tmp_path: Path) -> None:
    make_encoder("average").save_pretrained(tmp_path / "average")
    assert "every frame, which this encoder was not trained for" in (tmp_path / "average" / "README.md").read_text()
    make_model().wav2vec2.save_pretrained(tmp_path / "any")
    card = (tmp_path / "any" / "README.md").read_text()
    assert "keeps every frame, as at rate 0." in card
    assert "trained at a rate of 0 to 1; the default is rate 1" in card
    Encoder(EncoderConfig(**SHAPE)).save_pretrained(tmp_path / "plain")
    assert "compressor" not in (tmp_path / "plain" / "README.md").read_text()


def test_a_rate_of_the_encoder_takes_a_gradient() -> None:
    encoder = make_encoder("integrate-and-fire").requires_grad_(requires_grad=False)
    adaptive = fastssl.nn.AdaptiveRate(0.5)
    assert encoder.compressor is not None
    encoder.compressor.rate = adaptive()
    encoder(waveforms_of(16_000)).features.values.square().sum().backward()
    assert adaptive.rate.grad is not None
    assert adaptive.rate.grad != 0
    assert "rate" not in encoder.state_dict()


def test_training_draws_a_rate_for_each_utterance() -> None:
    keys = draw_keys(200, generator=torch.Generator().manual_seed(0))
    config = make_model().config
    rates = draw_compression(config, keys)["rate"]
    assert rates.min() < 0.05
    assert rates.max() > 0.95
    one = draw_compression(dataclasses.replace(config, compression_per_batch=True), keys)["rate"]
    assert one.tolist() == [rates[0]] * 200
    periods = dataclasses.replace(config, compression_draw="period", compression_range=(30.0, 90.0))
    drawn = draw_compression(periods, keys)
    assert drawn.keys() == {"frame_period_ms"}
    assert 30 <= drawn["frame_period_ms"].min() < 32 < 88 < drawn["frame_period_ms"].max() <= 90
    for fixed in (make_model(compressor="none"), make_model(compressor="average", compressor_factor=2)):
        assert fixed.draw_compression(keys) == draw_compression(fixed.config, keys) == {}


def segments_of(total: int) -> tuple[Tensor, Tensor]:
    """Return target weights and ends for segments of five frames each."""
    return torch.full((total,), 0.2), torch.arange(total) % 5 == 4


def test_the_objective_is_of_the_frames_that_are_left() -> None:
    """Quantiser and transformer see only the compressed frames; compression losses are weighted by masked frames."""
    model = make_model(compression_range=(0.7, 0.7), quantity_loss_weight=2.0, features_penalty_weight=0.0)
    waveforms, keys = waveforms_of(32_000, 20_000), draw_keys(2, generator=torch.Generator().manual_seed(0))
    frames = model.wav2vec2.extract_features(waveforms)
    weights, ends = segments_of(frames.layout.total)
    options: dict[str, Any] = {"keys": keys, "gumbel_temperature": 1.0}
    output = model(waveforms, **options, segments=FrameSegments(weights, ends))
    kept = model.wav2vec2.project(frames, rate=0.7)
    assert kept.compressed is not None
    assert output.features.layout.lengths == kept.frames.layout.lengths
    assert output.features.layout.total < frames.layout.total
    assert output.compression is not None
    assert set(output.scores()) == set(model.score_names)
    plain = model(waveforms, **options)
    assert plain.compression.segment_loss == plain.compression.frame_loss == 0
    scores = {name: value.item() for name, value in output.compression._asdict().items()}
    expected = plain.loss.item() + 0.05 * scores["segment_loss"] + 0.5 * scores["frame_loss"]
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.masked_frames * 20 < scores["frame_period_ms"] < output.masked_frames * 60
    unweighted = dataclasses.replace(model.config, quantity_loss_weight=0.0)
    model.config = unweighted
    assert plain.loss.item() - model(waveforms, **options).loss.item() == pytest.approx(
        2.0 * scores["quantity_loss"], rel=1e-3
    )
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.wav2vec2.compressor is not None
    assert all(parameter.grad.any() for parameter in model.wav2vec2.compressor.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("factor", [2, 3])
def test_a_fixed_factor_trains_too(factor: int) -> None:
    model = make_model(compressor="average", compressor_factor=factor)
    output = model(waveforms_of(32_000, 600), keys=draw_keys(2), gumbel_temperature=1.0)
    assert output.features.layout.lengths == (99 // factor, 1)
    assert set(output.scores()) == set(model.score_names)
    output.loss.backward()
    no_audio = Packed(torch.empty(0, 1), fastssl.Layout.from_lengths([]))
    assert model(no_audio, keys=draw_keys(0), gumbel_temperature=1.0).loss == 0


def test_batches_add_up() -> None:
    model = make_model(diversity_loss_weight=0.0).eval()
    waveforms, keys = waveforms_of(32_000, 20_000, 9_000), draw_keys(3)
    lengths = model.wav2vec2.extract_features(waveforms).layout.lengths
    weights, ends = segments_of(sum(lengths))
    whole = model(waveforms, keys=keys, gumbel_temperature=1.0, segments=FrameSegments(weights, ends)).loss
    parts = []
    for waveform, key, weight, end in zip(
        waveforms.unpack(), keys.split(1), weights.split(lengths), ends.split(lengths), strict=True
    ):
        options = {"gumbel_temperature": 1.0, "segments": FrameSegments(weight, end)}
        parts.append(model(Packed.pack([waveform]), keys=key, **options).loss)
    torch.testing.assert_close(whole, torch.stack(parts).sum(), rtol=1e-4, atol=0)


def test_sizes_of_presets() -> None:
    """At width 512, the weight network has 1.31 M parameters, as in the paper."""
    for size in ("tiny", "base"):
        with torch.device("meta"):
            plain, compressed = (Encoder(recipe_model(f"wav2vec2-{size}{suffix}")) for suffix in ("", "-ofa"))
        more = sum(p.numel() for p in compressed.parameters()) - sum(p.numel() for p in plain.parameters())
        assert more == (1_312_769 if size == "base" else 5 * 128 * 128 + 4 * 128 + 1)


def test_rejects_bad_input() -> None:
    waveforms = waveforms_of(4_000)
    with pytest.raises(ValueError, match="has no compressor"):
        Encoder(EncoderConfig(**SHAPE))(waveforms, rate=0.5)
    with pytest.raises(ValueError, match="has a fixed factor"):
        make_encoder("average")(waveforms, rate=0.5)
    with pytest.raises(ValueError, match="rate: must be from 0 to 2"):
        make_encoder("integrate-and-fire")(waveforms, rate=3.0)
    of_encoders: dict[str, dict[str, Any]] = {
        "compressor: must be one of none, average.* got 'median'": {"compressor": "median"},
        "compressor_factor: must be 1 unless": {"compressor_factor": 2},
        "compressor_factor: must be 1 unless .* got 2 with compressor='int": {
            "compressor": "integrate-and-fire",
            "compressor_factor": 2,
        },
        "compressor_factor: must be at least 1": {"compressor": "average", "compressor_factor": 0},
    }
    for message, options in of_encoders.items():
        with pytest.raises(ValueError, match=message):
            EncoderConfig(**SHAPE, **options)
    of_training: dict[str, dict[str, Any]] = {
        "compression_draw": {"compression_draw": "lambda"},
        "compression_range": {"compression_range": (0.5,)},
        "from 0 to 2.* got .0.5, 0.2": {"compression_range": (0.5, 0.2)},
        "from 0 to 2.* got .0.5, 2.5": {"compression_range": (0.5, 2.5)},
        "from 20 to inf": {"compression_draw": "period"},
        "frame_loss_weight": {"frame_loss_weight": -1.0},
    }
    for message, options in of_training.items():
        with pytest.raises(ValueError, match=message):
            Wav2Vec2Config(**options)
