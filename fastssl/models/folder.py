"""Folders of models: config.json, preprocessor_config.json and weights, as Transformers has them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: The `model_type`s of Transformers that are served, and its class for each.
MODEL_CLASSES = {
    "wav2vec2": "Wav2Vec2Model",
    "hubert": "HubertModel",
    "wavlm": "WavLMModel",
    "data2vec-audio": "Data2VecAudioModel",
    "unispeech": "UniSpeechModel",
    "unispeech-sat": "UniSpeechSatModel",
}
#: The `model_type` of our Conformer encoder, which Transformers does not have.
CONFORMER = "best-rq"
SAMPLE_RATE_HZ = 16_000
#: Files of weights, in the order in which they are looked for; an index names the files that it is divided into.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: A compressor's weights, beside those that Transformers reads, and how their names begin in the encoder's state dict.
COMPRESSOR_FILE, COMPRESSOR_PREFIX = "compressor.safetensors", "compressor."
#: The submodule that `fastssl.accelerate` makes of a compressor, in a model of somebody else's.
ACCELERATED_COMPRESSOR = "fastssl_compressor"


def head_prefix(model_type: str) -> str:
    """What the names of an encoder's weights begin with in a model that has a head."""
    return model_type.replace("-", "_") + "."


def read_config(folder: Path, *, model_types: Iterable[str] = tuple(MODEL_CLASSES)) -> dict[str, Any]:
    """The config of a folder, with `do_normalize` of its preprocessor.

    Args:
        folder: Holds config.json.
        model_types: Those that the caller serves.

    Raises:
        ValueError: There is no config, or that of a model that is not served.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder}: no model there; looked for {path} and {folder / 'encoder' / 'config.json'}")
    values = _read_json(path)
    model_types = list(model_types)
    if values.get("model_type") not in model_types:  # compared, because JSON may hold what has no hash
        served = ", ".join(model_types)
        raise ValueError(f"{path}: model_type is {values.get('model_type')!r}, served are: {served}")
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.exists():
        of_audio = _read_json(preprocessor)
        rate_hz = of_audio.get("sampling_rate", SAMPLE_RATE_HZ)
        if rate_hz != SAMPLE_RATE_HZ:
            raise ValueError(f"{preprocessor}: sampling_rate is {rate_hz}, served is {SAMPLE_RATE_HZ}")
        values["do_normalize"] = of_audio.get("do_normalize", True)
    return values


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder, of the encoder, its compressor, and of whatever else is in the model.

    Raises:
        ValueError: There are none, or a file that the index names is missing or is damaged.
    """
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"{folder}: no weights there; looked for {', '.join(WEIGHT_FILES)}")
    if path.suffix != ".json":
        return _read_tensors(path) | _read_compressor(folder)
    files = _read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{path}: weight_map does not say which file has which weight")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise ValueError(f"{path}: names {name!r}, which is no file of its own folder")
        if not (folder / name).exists():
            raise ValueError(f"{folder / name}: is missing; {path.name} names it")
        weights |= _read_tensors(folder / name)
    return weights | _read_compressor(folder)


def _read_compressor(folder: Path) -> dict[str, Tensor]:
    path = folder / COMPRESSOR_FILE
    weights = _read_tensors(path) if path.exists() else {}
    return {f"{COMPRESSOR_PREFIX}{key}": tensor for key, tensor in weights.items()}


def write_encoder_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write an encoder's weights, and its compressor's beside them, where it has one; neither before both are written.

    Args:
        folder: Holds the encoder.
        state: Its state dict.
    """
    parts: dict[Path, dict[str, Tensor]] = {folder / "model.safetensors": {}}
    for key, tensor in state.items():
        of_compressor = key.startswith(COMPRESSOR_PREFIX)
        part = parts.setdefault(folder / (COMPRESSOR_FILE if of_compressor else "model.safetensors"), {})
        part[key.removeprefix(COMPRESSOR_PREFIX) if of_compressor else key] = tensor
    partials = {path: _write_partial(path, weights) for path, weights in parts.items()}
    for path, partial in partials.items():
        partial.replace(path)
    if folder / COMPRESSOR_FILE not in parts:
        (folder / COMPRESSOR_FILE).unlink(missing_ok=True)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of safetensors, zipfile or pickle, which share no class
        raise ValueError(f"{path}: cannot be read: {str(error).partition(chr(10))[0]}") from error
    if not is_state_dict(weights):
        raise ValueError(f"{path}: holds no state dict, tensors by name")
    return weights


def is_state_dict(weights: object) -> TypeGuard[dict[str, Tensor]]:
    """Whether it is a dictionary of tensors by name."""
    return isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    )


def load_matching(module: nn.Module, weights: Mapping[str, Tensor], *, name: str) -> None:
    """Load weights that are exactly those of a module.

    Args:
        module: Takes the weights.
        weights: By name.
        name: Of the file or model, for errors.

    Raises:
        ValueError: A weight is missing or of another shape, or the module has no place for one.
    """
    own = module.state_dict()
    for problem, keys in {
        "weights are missing": own.keys() - weights.keys(),
        "weights that the encoder has no place for": weights.keys() - own.keys(),
    }.items():
        if keys:
            some = ", ".join(sorted(keys)[:5])
            raise ValueError(f"{name}: {problem}: {some}{' ...' if len(keys) > 5 else ''}")
    for key, tensor in weights.items():
        if tensor.shape != own[key].shape:
            raise ValueError(f"{name}: {key} has shape {tuple(tensor.shape)}, expected {tuple(own[key].shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: {key} is of {tensor.dtype}, which is no floating point")
    module.load_state_dict(weights)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: is a {type(values).__name__}, not an object with names")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file that is there, whole, or is not."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], *, there: str = "there") -> str:
    """Which settings are not what they were, in words; empty where all are.

    Args:
        before: Settings of a folder that is to be gone on with.
        now: Those that must be the same.
        there: Where the former ones are.
    """
    changed = [name for name, value in now.items() if before.get(name) != value]
    return "; ".join(f"{name}: {before.get(name)} {there}, {now[name]} now" for name in changed)


def write_text(path: Path, text: str) -> None:
    """Write a text file that is there, whole, or is not."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that is there, whole, or is not."""
    _write_partial(path, weights).replace(path)


def _write_partial(path: Path, weights: Mapping[str, Tensor]) -> Path:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    return partial
