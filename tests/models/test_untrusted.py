"""Test models that others made to fill the memory, to hang or to write to the terminal: each is refused by name."""

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastssl import load_encoder
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.folder import read_weights
from fastssl.models.skeleton import skeleton
from tests.interop.test_fairseq import SETTINGS
from tests.interop.tiny_models import TINY
from tests.models.damage import damaged_models, good_models, outcome

State = dict[str, Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    Encoder(EncoderConfig.from_dict(TINY)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def pickled(model: Path, change: Callable[[State], Any]) -> Path:
    """Replace the weights of a model by a pickled file with what `change` makes of them."""
    torch.save(change(read_weights(model)), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return model / "pytorch_model.bin"


def refused(path: Path) -> str:
    message = outcome(path)
    assert message != "loads"
    return message


def test_damaged_models_are_opened_or_refused(tmp_path: Path) -> None:
    paths = good_models(tmp_path / "good")
    assert {outcome(path) for path in paths} == {"loads"}
    found = {
        what: outcome(path) for what, path in damaged_models(tmp_path / "good", tmp_path / "work", count=100, seed=0)
    }
    assert len(found) == 100
    assert 5 < sum(message == "loads" for message in found.values()) < 50


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 100_000}, "num_hidden_layers: must be at most 1024, got 100000"),
        ({"num_hidden_layers": 1000}, "describes 1000 layers, but there are only 67 weights"),
        ({"num_hidden_layers": 10**400}, r"num_hidden_layers: must be at most 1024, got 10*\.\.\.0*$"),
        ({"hidden_size": 10**9}, "hidden_size: must be at most 65536"),
        (
            {"hidden_size": 65_536, "intermediate_size": 2**20},
            r"would take .* GB, more than this machine's memory|shape",
        ),
        ({"intermediate_size": 2**20}, r"intermediate_dense.* has shape \(64,\), expected \(1048576,\)"),
        ({"conv_dim": [32] * 100_000}, "conv_dim: must have at most 1024 entries, got 100000"),
        ({"conv_stride": [10**9] * 7}, "conv_stride: must be at most 65536"),
        ({"compressor": "average", "compressor_factor": 10**9}, "compressor_factor: must be at most 1024"),
        ({"model_type": "wavlm", "max_bucket_distance": 10**12}, "max_bucket_distance: must be at most"),
        ({"model_type": "data2vec-audio", "num_conv_pos_embeddings": 60_000}, "describes 60000 layers, but"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps: must be at most 4294967296"),
        ({"hidden_dropout": "\x1b[2J\n"}, r"hidden_dropout: must be of type float, got '\\x1b\[2J\\n'"),
    ],
)
def test_sizes_that_the_weights_do_not_have(settings: dict[str, Any], message: str, model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=message):
        load_encoder(model)


def test_a_model_larger_than_the_memory_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    shape = skeleton(lambda: Encoder(EncoderConfig.from_dict(TINY)))
    assert {parameter.device.type for parameter in shape.parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr("fastssl.models.skeleton.physical_memory", lambda: 100_000)
    with pytest.raises(ValueError, match=r"it would take .* GB, more than this machine's memory of 0\.0001 GB"):
        skeleton(lambda: Encoder(EncoderConfig.from_dict(TINY)))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json"]
)
def test_what_is_not_a_file_is_not_opened(name: str, model: Path) -> None:
    path = model / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert f"{name}: is not a regular file" in refused(model)
    path.unlink()
    path.mkdir()
    assert f"{name}: is a folder; check the path" in refused(model)
    path.rmdir()
    path.symlink_to("/dev/zero")
    assert f"{name}: is not a regular file" in refused(model)
    if name.endswith("config.json"):
        path.unlink()
        path.touch()
        os.truncate(path, 1 << 36)
        assert f"{name}: is larger than 4 MB" in refused(model)


def test_settings_that_are_not_settings(model: Path) -> None:
    path = model / "preprocessor_config.json"
    for content, message in {
        b'{"do_normalize": "yes"}': "do_normalize is 'yes', expected true or false",
        b'{"sampling_rate": [1]}': r"sampling_rate is \[1\], expected 16000",
        b"\xff\xfe": "is not text in UTF-8",
        b"[" * 100_000: "is not valid JSON",
        b'{"a":' * 500 + b"1" + b"}" * 500: "is nested more than 32 levels deep",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {message}"):
            load_encoder(model)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (struct.pack("<Q", 1 << 60) + b"{}", "its header would have 1152921504606846976 bytes"),
        (b"", "its header would have 0 bytes"),
        ({"a": {"dtype": "F32", "shape": [10**9] * 2, "data_offsets": [0, 4]}}, "overflow"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}, "cannot be read"),
        ({f"\x1b{index}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for index in range(99)}, "missing"),
    ],
)
def test_headers_that_do_not_fit_the_file(header: Any, message: str, model: Path) -> None:
    if isinstance(header, dict):
        text = json.dumps(header).encode()
        header = struct.pack("<Q", len(text)) + text + bytes(4 if "a" in header else 0)
    (model / "model.safetensors").write_bytes(header)
    assert message in refused(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {key: torch.zeros(()).expand(t.shape) for key, t in state.items()}, "has fewer numbers than"),
        (lambda state: {key: tensor.to("meta") for key, tensor in state.items()}, "has fewer numbers than"),
        (lambda state: {key: tensor.to_sparse() for key, tensor in state.items()}, "is not a plain tensor"),
        (lambda state: {key: tensor.to(torch.complex64) for key, tensor in state.items()}, "dtype torch.complex64"),
        (lambda state: {key: tensor.to(torch.float8_e5m2) for key, tensor in state.items()}, "dtype torch.float8"),
        (lambda state: with_number(state, torch.nan), "encoder.layer_norm.weight has NaN or infinite weights"),
        (lambda state: with_number(state, 1e300), "encoder.layer_norm.weight has NaN or infinite weights"),
        (lambda state: nested(60), "must contain a state dict"),
        (
            lambda state: {**state, "print": print},
            "pytorch_model.bin: cannot be read: it names print, which is not run",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_pickled_weights_that_are_not_weights(change: Callable[[State], Any], message: str, model: Path) -> None:
    pickled(model, change)
    assert message in refused(model)


def with_number(state: dict[str, Tensor], number: float) -> dict[str, Tensor]:
    state = {key: tensor.double() for key, tensor in state.items()}
    state["encoder.layer_norm.weight"][3] = number
    return state


def nested(levels: int) -> list[Any]:
    """Return a list of 2^levels entries that takes no room, because each level contains the next one twice."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value, value]
    return value


def test_pickles_that_cost_more_than_their_size(model: Path) -> None:
    path = pickled(model, dict)
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w", zipfile.ZIP_DEFLATED) as smaller:
        for member in archive.infolist():
            smaller.writestr(member.filename, archive.read(member))
    path.write_bytes(copy.getvalue())
    assert "pytorch_model.bin: cannot be read: its archive is compressed" in refused(model)

    # A tuple that contains another one twice, and so on, as the key of a dictionary: hashing it takes 2^60 steps.
    levels = b"".join(b"h%ch%c\x86q%c" % (level, level, level + 1) for level in range(1, 60))
    tuples = b"\x80\x02}q\x00)q\x01" + levels + b"K\x01s."
    for content, message in {
        tuples: "has a tuple of more than 1024 values",
        b"\x80\x02" + b"]" * 100: "exhausted",
    }.items():
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", content)
            archive.writestr("a/version", "3")
        assert message in refused(model)


def test_indices_that_list_too_much(model: Path) -> None:
    (model / "model.safetensors").rename(model / "part.safetensors")
    index = model / "model.safetensors.index.json"
    for files, message in {
        tuple(f"{number}.safetensors" for number in range(5000)): "lists 5000 files, expected at most 1000",
        (index.name,): "expected names that end with .safetensors",
        ("\x1b.safetensors",): r"\x1b.safetensors: is missing",
    }.items():
        index.write_text(json.dumps({"weight_map": dict(enumerate(files))}))
        assert message in refused(model)


def test_a_weight_in_two_files_is_refused(tmp_path: Path) -> None:
    """Of two tensors of one name, the later file's would be used, whatever the index says."""
    good_models(tmp_path)
    folder = tmp_path / "in parts"
    first, second = (torch.load(folder / f"pytorch_model-{part}-of-2.bin") for part in (1, 2))
    name = min(first)
    torch.save(second | {name: first[name] + 1}, folder / "pytorch_model-2-of-2.bin")
    assert f"pytorch_model-2-of-2.bin: {name} is in another file of pytorch_model.bin.index.json too" in refused(folder)


def test_checkpoints_of_fairseq_with_absurd_settings(tmp_path: Path) -> None:
    circle: list[Any] = []
    circle.append(circle)
    first = {"feature_extractor.conv_layers.0.0.weight": torch.zeros(32, 1, 10)}
    for settings, message in (
        ({"encoder_layers": 100_000}, "num_hidden_layers: must be at most 1024"),
        ({"encoder_embed_dim": 10**9}, "hidden_size: must be at most 65536"),
        ({"pos_conv_depth": 10**9}, "num_conv_pos_embeddings: must be at most 65536"),
        ({"conv_feature_layers": "[(512,10,5)]*99+" * 5000}, "is too long for a list of convolutions"),
        ({"activation_fn": torch.zeros(3)}, "activation_fn=tensor"),
        ({"extractor_mode": [1]}, "extractor_mode=[1] is not supported"),
        ({"conv_bias": "\x1b\n"}, r"conv_bias='\x1b\n' is not of type bool"),
        ({"x": nested(60)}, "its settings have more than 100000 values"),
        ({"x": circle}, "recursion"),
        ({}, "the config describes 7 layers, but there are only 1 weights"),
    ):
        torch.save({"model": first, "cfg": {"model": SETTINGS | settings}}, tmp_path / "model.pt")
        assert message in refused(tmp_path / "model.pt")


def test_names_that_no_file_has() -> None:
    for name in ("a" * 5000, "a\0b", "/dev/null/x"):
        assert outcome(Path(name)) != "loads"
