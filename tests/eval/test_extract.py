"""Test that `fastssl extract` writes the right features of every recording, exactly once."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastssl.data.recordings import Chunk, read_chunks
from fastssl.eval import encode as encode_module
from fastssl.eval.extract import extract
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.packing import Packed
from tests.tiny import TINY_MODEL, write_recording


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    """Save an encoder with layer norm, whose front end computes no statistics over time, in `tmp_path / "model"`."""
    model = TINY_MODEL
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(EncoderConfig)}
    values |= {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "do_normalize": False}
    torch.manual_seed(1)
    encoder = Encoder(EncoderConfig(**values)).eval()
    encoder.save_pretrained(tmp_path / "model")
    return encoder


def _read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    entries = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    features = {}
    for entry in entries:
        with safe_open(folder / entry["shard"], framework="pt") as shard:
            features[entry["key"]] = shard.get_tensor(entry["key"])
    return entries, features


def _encode(encoder: Encoder, path: Path, layer: int) -> Tensor:
    samples, _ = soundfile.read(path, dtype="float32")
    with torch.inference_mode():
        features: Tensor = encoder(Packed.pack([torch.from_numpy(samples)[:, None]])).hidden_states[layer].values
        return features


@pytest.mark.parametrize("layer", [0, 1, None])
def test_features_are_those_of_the_encoder(
    encoder: Encoder, recordings: Path, tmp_path: Path, layer: int | None
) -> None:
    assert extract(tmp_path / "model", recordings, tmp_path / "out", layer=layer) == []
    entries, features = _read(tmp_path / "out")
    paths = sorted(recordings.rglob("*.wav"))
    assert [entry["key"] for entry in entries] == [path.relative_to(recordings).as_posix() for path in paths]
    for entry, path in zip(entries, paths, strict=True):
        assert entry["file"] == str(path)
        assert entry["layer"] == (2 if layer is None else layer)
        assert entry["frame_period_s"] == 0.02
        assert entry["frames"] == len(features[entry["key"]])
        torch.testing.assert_close(features[entry["key"]], _encode(encoder, path, entry["layer"]), rtol=0, atol=1e-5)


def test_chunks_fit_together(encoder: Encoder, tmp_path: Path) -> None:
    # Layer 0 depends only on the few frames that the positional convolution covers. Half the overlap covers them too,
    # so chunks do not change it. Later layers attend to the whole chunk, so they would differ.
    path = tmp_path / "audio" / "long.wav"
    write_recording(path, 11.3, seed=5)
    write_recording(tmp_path / "audio" / "short.wav", 2.0, seed=6)
    extract(tmp_path / "model", tmp_path / "audio", tmp_path / "chunks", layer=0, chunk_s=3.0, overlap_s=0.5)
    entries, features = _read(tmp_path / "chunks")
    assert [(entry["key"], entry["frames"]) for entry in entries] == [("long.wav", 564), ("short.wav", 99)]
    torch.testing.assert_close(features["long.wav"], _encode(encoder, path, 0), rtol=0, atol=1e-5)


def test_goes_on_where_it_was(
    encoder: Encoder, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    extract(tmp_path / "model", recordings, whole, shard_mb=0.02)
    _, expected = _read(whole)
    extract(tmp_path / "model", recordings, stopped, shard_mb=0.02)
    shards = sorted(stopped.glob("*.safetensors"))
    assert len(shards) > 3
    # The state after a kill: a shard that the index does not list, an incomplete line, a half-written shard.
    lines = (stopped / "index.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["shard"] in ("features-00000.safetensors", shards[1].name)]
    (stopped / "index.jsonl").write_text("".join(kept) + lines[len(kept)][:30])
    for shard in shards[3:]:
        shard.unlink()
    (stopped / "features-00003.safetensors.tmp").write_bytes(b"half")
    done = {json.loads(line)["key"] for line in kept}
    read: list[str] = []

    def count(cut: Any, **settings: Any) -> Any:
        read.append(cut.id)
        return read_chunks(cut, **settings)

    monkeypatch.setattr("fastssl.eval.encode.read_chunks", count)
    extract(tmp_path / "model", recordings, stopped, shard_mb=0.02)
    assert set(read) == expected.keys() - done
    entries, found = _read(stopped)
    assert len(entries) == len(expected)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_prepacked_weights_give_the_features_of_that_format(encoder: Encoder, recordings: Path, tmp_path: Path) -> None:
    extract(tmp_path / "model", recordings, tmp_path / "plain")
    extract(tmp_path / "model", recordings, tmp_path / "packed", inference="bf16")
    (_, plain), (_, packed) = _read(tmp_path / "plain"), _read(tmp_path / "packed")
    assert plain.keys() == packed.keys()
    for key, tensor in plain.items():
        assert not packed[key].equal(tensor)
        assert float((packed[key] - tensor).abs().max()) <= 0.05 * float(tensor.abs().max())
    with pytest.raises(ValueError, match=r"begun with other settings \(.*inference: bf16 there, None now\)"):
        extract(tmp_path / "model", recordings, tmp_path / "packed")
    settings = json.loads((tmp_path / "plain" / "settings.json").read_text())
    assert settings.pop("inference") is None  # as in a folder that an earlier version began
    (tmp_path / "plain" / "settings.json").write_text(json.dumps(settings))
    extract(tmp_path / "model", recordings, tmp_path / "plain")
    with pytest.raises(ValueError, match="--inference: bf16 runs on the CPU only, got --device cuda"):
        extract(tmp_path / "model", recordings, tmp_path / "other", inference="bf16", device="cuda")


def test_refuses_to_mix(encoder: Encoder, recordings: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    extract(model, recordings, tmp_path / "out", layer=1)
    with pytest.raises(ValueError, match=r"begun with other settings \(layer: 1 there, 2 now\)"):
        extract(model, recordings, tmp_path / "out")
    with pytest.raises(ValueError, match="audio: "):
        extract(model, recordings / "speaker0", tmp_path / "out", layer=1)
    torch.manual_seed(2)
    Encoder(encoder.config).save_pretrained(model)
    with pytest.raises(ValueError, match="weights: "):
        extract(model, recordings, tmp_path / "out", layer=1)
    with pytest.raises(ValueError, match="layers 0 to 2, got 3"):
        extract(model, recordings, tmp_path / "out", layer=3)
    with pytest.raises(ValueError, match="contains no features"):
        extract(model, recordings, recordings)


def _set_do_normalize(model: Path, value: bool) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        values = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(values | {"do_normalize": value}))


def test_recordings_are_normalised_once_and_a_folder_keeps_how(
    encoder: Encoder, recordings: Path, tmp_path: Path
) -> None:
    model, audio, out = tmp_path / "model", recordings / "speaker0", tmp_path / "out"
    extract(model, audio, tmp_path / "raw")
    _set_do_normalize(model, True)
    extract(model, audio, out)
    assert json.loads((out / "settings.json").read_text())["normalize"] is True
    entries, features = _read(out)
    for entry in entries:
        samples, _ = soundfile.read(entry["file"], dtype="float32")
        with torch.no_grad():
            expected = encoder(Packed.pack([torch.from_numpy(samples)]), normalize=True).features.values
        torch.testing.assert_close(features[entry["key"]], expected, rtol=0, atol=1e-5)
    # The model's config changes, and one of the shards is lost: what is made again is made as before.
    _set_do_normalize(model, False)
    for shard in out.glob("*.safetensors"):
        shard.unlink()
    extract(model, audio, out)
    for key, tensor in _read(out)[1].items():
        assert torch.equal(tensor, features[key])
        assert not torch.allclose(tensor, _read(tmp_path / "raw")[1][key], atol=1e-3)
    extract(model, audio, out, normalize=True)
    with pytest.raises(ValueError, match="normalize: True there, False now"):
        extract(model, audio, out, normalize=False)
    extract(model, audio, tmp_path / "other", normalize=True)
    assert all(torch.equal(tensor, features[key]) for key, tensor in _read(tmp_path / "other")[1].items())


def test_a_folder_that_does_not_say_was_made_as_the_model_says(
    encoder: Encoder, recordings: Path, tmp_path: Path
) -> None:
    audio, out = recordings / "speaker0", tmp_path / "out"
    extract(tmp_path / "model", audio, out)
    settings = json.loads((out / "settings.json").read_text())
    assert settings.pop("normalize") is False
    (out / "settings.json").write_text(json.dumps(settings))
    extract(tmp_path / "model", audio, out)
    with pytest.raises(ValueError, match="normalize: False there, True now"):
        extract(tmp_path / "model", audio, out, normalize=True)


def test_a_folder_that_does_not_say_was_made_without_processor_config(
    encoder: Encoder, recordings: Path, tmp_path: Path
) -> None:
    model, audio, out = tmp_path / "model", recordings / "speaker0", tmp_path / "out"
    # fastssl 0.1.0 read preprocessor_config.json only, and without it took Transformers' default.
    of_audio = (model / "preprocessor_config.json").read_text()
    (model / "preprocessor_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    del config["do_normalize"]
    (model / "config.json").write_text(json.dumps(config))
    extract(model, audio, out)
    settings = json.loads((out / "settings.json").read_text())
    assert settings.pop("normalize") is True
    (out / "settings.json").write_text(json.dumps(settings))
    before = _read(out)[1]
    for shard in out.glob("*.safetensors"):
        shard.unlink()
    (model / "processor_config.json").write_text(f'{{"feature_extractor": {of_audio}}}')
    extract(model, audio, out)
    after = _read(out)[1]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(ValueError, match="normalize: True there, False now"):
        extract(model, audio, out, normalize=False)


def test_a_model_without_a_mask_vector_is_the_same_every_time(
    encoder: Encoder, recordings: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["masked_spec_embed"]
    save_file(weights, path)
    extract(tmp_path / "model", recordings, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    extract(tmp_path / "model", recordings, tmp_path / "out")  # continues, because it is the same model
    assert before
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("wrong", [{"chunk_s": 1.0, "overlap_s": 2.0}, {"overlap_s": 0.0}, {"layer": 9}])
def test_wrong_settings_leave_no_trace(
    encoder: Encoder, recordings: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"chunk_s: |overlap_s: |--layer: "):
        extract(tmp_path / "model", recordings, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_damaged_recordings_are_left_out(encoder: Encoder, tmp_path: Path) -> None:
    for index in range(3):
        write_recording(tmp_path / "audio" / f"{index}.wav", 4.0, seed=index)
    path = tmp_path / "audio" / "1.flac"
    samples, rate = soundfile.read(tmp_path / "audio" / "1.wav")
    soundfile.write(path, samples, rate)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    # Its first chunks can be decoded, but must not be written.
    problems = extract(tmp_path / "model", tmp_path / "audio", tmp_path / "out", chunk_s=1.0, overlap_s=0.2)
    assert [Path(problem.name).name for problem in problems] == ["1.flac"]
    assert [entry["key"] for entry in _read(tmp_path / "out")[0]] == ["0.wav", "1.wav", "2.wav"]


@pytest.mark.usefixtures("encoder")
def test_features_keep_the_rules_that_they_were_begun_with(recordings: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "settings.json"
    extract(tmp_path / "model", recordings, path.parent)
    settings = json.loads(path.read_text())
    assert settings.pop("rules") == 2
    path.write_text(json.dumps(settings))  # as an earlier version wrote it
    extract(tmp_path / "model", recordings, path.parent)
    with pytest.raises(ValueError, match=r"begun with other settings \(rules: 1 there, 2 now\)"):
        extract(tmp_path / "model", recordings, path.parent, rules=2)


def test_recordings_without_finite_features_are_named(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        write_recording(tmp_path / "audio" / f"{name}.wav", 1.0, seed=len(name))
    # The samples are finite, but their squares overflow inside the encoder. The reader would refuse them.
    monkeypatch.setattr("fastssl.data.audio._LARGEST_SAMPLE", np.inf)
    loud = np.full(16_000, 3e38, dtype=np.float32)
    soundfile.write(tmp_path / "audio" / "loud.wav", loud, 16_000, subtype="FLOAT")
    (problem,) = extract(tmp_path / "model", tmp_path / "audio", tmp_path / "out")
    assert str(problem).endswith(
        "loud.wav has NaN or infinite features; check its sample values and the model's weights"
    )
    entries, features = _read(tmp_path / "out")
    assert [entry["key"] for entry in entries] == ["one.wav", "two.wav"]
    assert torch.equal(features["one.wav"], _encode(encoder, tmp_path / "audio" / "one.wav", 2))


def test_a_model_of_nan_weights_is_refused(encoder: Encoder, recordings: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        encoder.get_parameter("encoder.layers.0.attention.q_proj.weight")[0, 0] = torch.nan
    encoder.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model: encoder\.layers\.0\.attention\.q_proj\.weight has NaN or infinite"):
        extract(tmp_path / "model", recordings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recordings_in_a_damaged_shard_are_extracted_again(encoder: Encoder, recordings: Path, tmp_path: Path) -> None:
    def run() -> None:
        assert extract(tmp_path / "model", recordings, tmp_path / "out", shard_mb=0.02) == []

    run()
    before = {key: tensor.clone() for key, tensor in _read(tmp_path / "out")[1].items()}  # else mapped from the file
    first = tmp_path / "out" / "features-00000.safetensors"
    first.write_bytes(first.read_bytes()[:100])
    run()
    entries, after = _read(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert first.name not in {entry["shard"] for entry in entries}


@pytest.mark.parametrize("compressor", ["none", "integrate-and-fire"])
def test_a_batch_is_copied_to_the_host_once(monkeypatch: pytest.MonkeyPatch, compressor: str) -> None:
    """The host waits for a GPU in each copy, so their number must not grow with the number of utterances."""
    values = {field.name: getattr(TINY_MODEL, field.name) for field in dataclasses.fields(EncoderConfig)}
    encoder = Encoder(EncoderConfig(**values | {"compressor": compressor})).eval()
    copies = []
    cpu = Tensor.cpu

    def spy(x: Tensor) -> Tensor:
        copies.append(x.shape)
        return cpu(x)

    monkeypatch.setattr(Tensor, "cpu", spy)
    parts: dict[int, list[Tensor]] = {}
    chunks = [(index, Chunk(torch.randn(4000 + index, 1), 0, slice(1, 9), 0)) for index in range(4)]
    encode_module._encode(encoder, chunks, parts, layer=1)
    assert len(copies) == (1 if compressor == "none" else 2)
    assert parts.keys() == {0, 1, 2, 3}
