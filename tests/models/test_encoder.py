"""Test that every architecture equals Transformers' in outputs, weight names and saved folders; test model cards."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import fastssl
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.model_card import ModelCard
from fastssl.nn.attention import RelativePositionEmbedding
from fastssl.packing import Packed
from tests.interop.tiny_models import (
    EVERY_FAMILY,
    EVERY_VARIANT,
    FAMILIES,
    TINY,
    assert_close,
    assert_same_weights,
    transformers_model,
    waveforms_of,
)

transformers = pytest.importorskip("transformers")

SMALL = EncoderConfig.from_dict(TINY)


def encoder_of(theirs: Any) -> Encoder:
    encoder = Encoder(EncoderConfig.from_dict(theirs.config.to_dict())).eval()
    encoder.load_state_dict(theirs.state_dict())
    return encoder


@EVERY_VARIANT
def test_every_hidden_state_equals_transformers_on_each_utterance_alone(variant: str) -> None:
    theirs = transformers_model(variant)
    encoder = encoder_of(theirs)
    waveforms = waveforms_of(16_000, 4_321, 400, 30_011)
    with torch.no_grad():
        output = encoder(waveforms, normalize=False)
        for row, waveform in enumerate(waveforms.unpack()):
            expected = theirs(waveform.view(1, -1), output_hidden_states=True)
            # With pre-norm, our last hidden state comes after the final norm; in Transformers 5 it comes before it.
            states = [*expected.hidden_states[:-1], expected.last_hidden_state]
            for layer, (ours, state) in enumerate(zip(output.hidden_states, states, strict=True)):
                assert_close(ours.unpack()[row], state[0], 2e-4, f"hidden state {layer}")
    assert torch.equal(output.features.values, output.hidden_states[-1].values)


@pytest.mark.parametrize("variant", ["wavlm base", "wavlm large", "data2vec", "hubert without projection norm"])
def test_batch_mates_do_not_matter(variant: str) -> None:
    encoder = encoder_of(transformers_model(variant))
    waveforms = waveforms_of(9_000, 400, 3_210, 720)
    with torch.no_grad():
        together = encoder(waveforms).features.unpack()
        for found, waveform in zip(together, waveforms.unpack(), strict=True):
            assert torch.equal(found, encoder(Packed.pack([waveform])).features.values)


@pytest.mark.parametrize("variant", ["wavlm base", "wavlm large", "data2vec"])
def test_gradients_in_training_equal_transformers(variant: str) -> None:
    theirs = transformers_model(variant, mask_time_prob=0.0, mask_feature_prob=0.0).train()
    encoder = Encoder(EncoderConfig.from_dict(theirs.config.to_dict())).train()
    encoder.load_state_dict(theirs.state_dict(), strict=False)  # without masking, their model has no mask vector
    waveforms = waveforms_of(8_000, 3_300)

    def score(frames: Tensor) -> Tensor:
        return (frames * torch.sin(torch.arange(frames.numel())).view_as(frames)).sum()

    together = encoder(waveforms, normalize=False).features.unpack()
    torch.stack([score(frames) for frames in together]).sum().backward()
    alone = [theirs(waveform.view(1, -1)).last_hidden_state[0] for waveform in waveforms.unpack()]
    torch.stack([score(frames) for frames in alone]).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert {name for name, p in encoder.named_parameters() if p.grad is not None} == expected.keys()
    for name, parameter in encoder.named_parameters():
        if name != "masked_spec_embed":
            # Attention is invariant to a bias on the keys, so in both models its gradient is only rounding.
            scale = expected[name.replace("k_proj.bias", "q_proj.bias")].abs().max()
            assert scale > 0, name
            assert parameter.grad is not None
            assert (parameter.grad - expected[name]).abs().max() <= 1e-3 * scale, name


@EVERY_VARIANT
def test_round_trip_through_transformers_is_exact(variant: str, tmp_path: Path) -> None:
    encoder = encoder_of(transformers_model(variant))
    encoder.save_pretrained(tmp_path / "ours")
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(theirs).__name__ == theirs.config.architectures[0]
    assert_same_weights(dict(theirs.state_dict()), dict(encoder.state_dict()))
    theirs.save_pretrained(tmp_path / "theirs")
    for source in (theirs, tmp_path / "theirs", tmp_path / "ours"):
        again = fastssl.load_encoder(source)
        assert not again.training
        assert_same_weights(dict(again.state_dict()), dict(encoder.state_dict()))
        assert again.config == encoder.config
    assert not list((tmp_path / "ours").glob("*.partial"))


@EVERY_FAMILY
def test_configs_have_the_defaults_of_their_type(variant: str) -> None:
    theirs = type(transformers_model(variant).config)()
    full = EncoderConfig.from_dict(theirs.to_dict())
    assert EncoderConfig.from_dict({"model_type": theirs.model_type}) == full
    assert full.model_type == theirs.model_type
    if variant == "data2vec":
        assert (full.num_conv_pos_embeddings, full.conv_pos_kernel_size) == (5, 19)


def test_every_type_is_tried() -> None:
    from fastssl.models.folder import MODEL_CLASSES

    found = {type(transformers_model(variant)).__name__ for variant in FAMILIES}
    assert found == set(MODEL_CLASSES.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "whisper"}, "model_type: must be one of wav2vec2, hubert, .*got 'whisper'"),
        ({"model_type": "hubert", "conv_pos_batch_norm": True}, "conv_pos_batch_norm=True is not supported"),
        ({"model_type": "wavlm", "add_adapter": "yes"}, "add_adapter: must be of type bool, got 'yes'"),
        ({"add_adapter": True, "adapter_stride": 0}, "adapter_stride: must be at least 1, got 0"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
    ],
)
def test_what_is_not_served_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig.from_dict(values)


def test_settings_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="num_buckets: must be 320 for hubert, got 20"):
        EncoderConfig(model_type="hubert", num_buckets=20)
    with pytest.raises(ValueError, match="feat_extract_norm: must be 'layer' for data2vec-audio, got 'group'"):
        EncoderConfig(model_type="data2vec-audio")
    with pytest.raises(ValueError, match="max_bucket_distance: must be above a quarter of num_buckets=320, got 80"):
        Encoder(EncoderConfig.from_dict(TINY | {"model_type": "wavlm", "max_bucket_distance": 80}))
    # In a config.json of another architecture, the setting is ignored.
    assert EncoderConfig.from_dict({"model_type": "hubert", "num_buckets": 20}) == EncoderConfig(model_type="hubert")


def test_buckets_of_distance_are_those_of_transformers() -> None:
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    for buckets, reach in ((320, 800), (32, 128), (5, 9)):
        theirs = WavLMAttention(8, 2, num_buckets=buckets, max_distance=reach)
        ours = RelativePositionEmbedding(buckets, 2, max_distance=reach)
        ours.load_state_dict(theirs.rel_attn_embed.state_dict())
        distances = torch.arange(-2 * reach, 2 * reach + 1)
        expected = theirs.rel_attn_embed(theirs._relative_positions_bucket(distances)).t()
        assert torch.equal(ours.by_distance()[:, distances.clamp(-reach, reach) + reach], expected)


def test_wavlm_never_skips_the_layer_that_has_the_bias() -> None:
    config = EncoderConfig.from_dict(TINY | {"model_type": "wavlm", "layerdrop": 0.999})
    torch.manual_seed(0)
    encoder = Encoder(config).train()
    states = encoder(waveforms_of(3_000)).hidden_states
    skipped = [torch.equal(a.values, b.values) for a, b in itertools.pairwise(states)]
    assert skipped == [False, True, True]


def test_the_dtype_of_the_weights_is_in_the_config(tmp_path: Path) -> None:
    encoder = Encoder(SMALL).to(torch.bfloat16)
    encoder.save_pretrained(tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    assert_same_weights(dict(theirs.state_dict()), dict(encoder.state_dict()))


def test_model_card(tmp_path: Path) -> None:
    card = ModelCard(
        recipe="wav2vec2-tiny",
        data_hours=12.345,
        seen_hours=99.5,
        license="cc-by-4.0",
        language=("en", "de"),
        data=("owner/set", 'calls: "private"'),
        updates=800,
        version="0.1.0",
        commit="abc123",
        quality={"accuracy | held out": 0.123456},
    )
    Encoder(EncoderConfig.from_dict(TINY | {"model_type": "unispeech-sat"})).save_pretrained(tmp_path, card=card)
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["library_name"] == "transformers"
    assert matter["pipeline_tag"] == "feature-extraction"
    assert {"speech", "fastssl", "unispeech-sat"} <= set(matter["tags"])
    assert (matter["license"], matter["language"], matter["datasets"]) == ("cc-by-4.0", ["en", "de"], ["owner/set"])
    for fact in (
        "| recipe | wav2vec2-tiny |",
        "| training audio | 12.35 hours |",
        "| audio seen | 99.50 hours |",
        "| licence | cc-by-4.0 |",
        "| language | en, de |",
        '| training data | owner/set, calls: "private" |',
        "| updates | 800 |",
        "| fastssl | 0.1.0, commit abc123 |",
        "| accuracy \\| held out | 0.1235 |",
        "AutoModel.from_pretrained",
        "fastssl.load_encoder",
        "(frames, 48), one every 20 ms",
    ):
        assert fact in body, fact


def test_what_is_not_known_is_not_in_the_card_and_a_card_that_is_there_is_kept(tmp_path: Path) -> None:
    encoder = Encoder(SMALL)
    encoder.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert not [
        word
        for word in ("recipe", "hours", "updates", "commit", "Quality", "None", "licen", "lang", "data")
        if word in text
    ]
    (tmp_path / "README.md").write_text("mine")
    encoder.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    encoder.save_pretrained(tmp_path, card=ModelCard(updates=3))
    assert "| updates | 3 |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("variant", ["wavlm base", "data2vec"])
def test_the_snippet_of_the_card_runs(variant: str, tmp_path: Path) -> None:
    encoder_of(transformers_model(variant)).save_pretrained(tmp_path)
    blocks = (tmp_path / "README.md").read_text().split("```python\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        exec(block.partition("```")[0].replace('"..."', repr(str(tmp_path))), {})


def test_a_broken_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(SMALL)
    encoder.save_pretrained(tmp_path)

    def break_off(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("fastssl.models.folder.save_file", break_off)
    with pytest.raises(OSError, match="the disk is full"):
        Encoder(SMALL).save_pretrained(tmp_path)
    assert_same_weights(dict(fastssl.load_encoder(tmp_path).state_dict()), dict(encoder.state_dict()))
