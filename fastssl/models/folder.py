"""Read and write model folders: config.json, preprocessor_config.json and weights, laid out as in Transformers."""

import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastssl.files import remove, replacing, write_json
from fastssl.models.pickled import load_pickled
from fastssl.names import plain_path
from fastssl.reading import MOST_BYTES, brief, check_file, one_line, printable, read_json

#: Each supported `model_type` of Transformers, and its model class there.
MODEL_CLASSES = {
    "wav2vec2": "Wav2Vec2Model",
    "hubert": "HubertModel",
    "wavlm": "WavLMModel",
    "data2vec-audio": "Data2VecAudioModel",
    "unispeech": "UniSpeechModel",
    "unispeech-sat": "UniSpeechSatModel",
}
#: The `model_type` of `ConformerEncoder`, which Transformers does not know.
CONFORMER = "best-rq"
SAMPLE_RATE_HZ = 16_000
#: Files with the settings of the audio preprocessor; the first is used if it has them.
PREPROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
#: Weight files, in order of preference. An index lists the files that the weights are split into.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: Most files that weights are split into, and the dtypes that they may have.
_MOST_PARTS = 1000
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: File of a compressor's weights (Transformers ignores it), and prefix of their names in the encoder's state dict.
COMPRESSOR_FILE, COMPRESSOR_PREFIX = "compressor.safetensors", "compressor."
#: Name of the checksum of the tensors in the metadata of our safetensors files; other libraries ignore it.
CHECKSUM = "crc32"
#: Name of the submodule that `fastssl.accelerate` adds to a model of another library for a compressor.
ACCELERATED_COMPRESSOR = "fastssl_compressor"


def head_prefix(model_type: str) -> str:
    """Return the prefix of the encoder's weights in a model with a head, such as "wav2vec2.".

    Args:
        model_type: Name of the architecture in config.json.
    """
    return model_type.replace("-", "_") + "."


def read_config(
    folder: Path,
    *,
    model_types: Iterable[str] = tuple(MODEL_CLASSES),
    preprocessors: Sequence[str] = PREPROCESSOR_FILES,
) -> dict[str, Any]:
    """Read config.json, and add `do_normalize` from the settings of the model's preprocessor if there are any.

    Args:
        folder: Folder with config.json.
        model_types: Values of `model_type` that the caller can open.
        preprocessors: Files that may have the preprocessor's settings.

    Returns:
        Settings by name.

    Raises:
        ValueError: config.json is missing or damaged, the caller cannot open its `model_type`, or the model expects a
            sample rate other than 16 kHz.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder}: contains no model (looked for {path} and {folder / 'encoder' / 'config.json'})")
    values = read_json(path)
    model_types = list(model_types)
    if values.get("model_type") not in model_types:  # compared with a list, because JSON values may be unhashable
        served = ", ".join(model_types)
        raise ValueError(f"{path}: model_type is {brief(values.get('model_type'))}, expected one of {served}")
    preprocessor, of_audio = _read_preprocessor(folder, preprocessors)
    if of_audio is not None:
        check_sample_rate(of_audio.get("sampling_rate", SAMPLE_RATE_HZ), f"{preprocessor}: sampling_rate")
        values["do_normalize"] = normalizes = of_audio.get("do_normalize", True)
        if not isinstance(normalizes, bool):
            raise ValueError(f"{preprocessor}: do_normalize is {brief(normalizes)}, expected true or false")
    return values


def _read_preprocessor(folder: Path, names: Sequence[str]) -> tuple[Path, dict[str, Any] | None]:
    """Return the file with the settings of the audio preprocessor, and the settings, or None if it has none.

    Since version 5, Transformers' processors (of models with a tokenizer) write processor_config.json instead of
    preprocessor_config.json. If a folder has both, Transformers believes the former.
    """
    processor, preprocessor = (folder / name for name in PREPROCESSOR_FILES)
    if processor.name in names and (of_audio := read_processor(folder)) is not None:
        return processor, of_audio
    return preprocessor, read_json(preprocessor) if preprocessor.exists() else None


def read_processor(folder: Path) -> dict[str, Any] | None:
    """Return the settings of audio in processor_config.json, or None if there is no such file or it has none.

    Raises:
        ValueError: The file is damaged.
    """
    processor = folder / PREPROCESSOR_FILES[0]
    settings = read_json(processor) if processor.exists() else {}
    for name in ("feature_extractor", "audio_processor"):
        of_audio = settings.get(name)
        if isinstance(of_audio, dict):
            return of_audio
        if of_audio is not None:
            raise ValueError(f"{processor}: {name} is {brief(of_audio)}, expected an object; restore the file")
    return None


def follow_preprocessor(folder: Path) -> None:
    """Give an existing processor_config.json the values of preprocessor_config.json, which it would hide from readers.

    Args:
        folder: Folder with a preprocessor_config.json that was just written.

    Raises:
        ValueError: processor_config.json is damaged.
        WriteError: The system refused to write.
    """
    processor, preprocessor = (folder / name for name in PREPROCESSOR_FILES)
    of_audio = read_processor(folder)
    if of_audio is None:
        return
    settings, now = read_json(processor), read_json(preprocessor)
    name = "feature_extractor" if settings.get("feature_extractor") == of_audio else "audio_processor"
    if any(of_audio.get(key) != value for key, value in now.items()):
        write_json(processor, settings | {name: of_audio | now})


def check_sample_rate(rate_hz: object, name: str) -> None:
    """Check that a model was trained on audio at 16 kHz.

    Args:
        rate_hz: What the model's settings say.
        name: The file and the setting, for the error message.

    Raises:
        ValueError: The rate is another one.
    """
    if rate_hz != SAMPLE_RATE_HZ:
        raise ValueError(
            f"{name} is {brief(rate_hz)}, expected {SAMPLE_RATE_HZ}: fastssl resamples all audio to {SAMPLE_RATE_HZ} "
            "Hz, which a model for another rate does not understand; choose one that was trained at this rate"
        )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all weights in a folder: those of the encoder, of its compressor, and of a head.

    Most formats are mapped into memory, so a tensor takes memory only once its numbers are used.

    Args:
        folder: Folder with one of `WEIGHT_FILES`, and optionally `COMPRESSOR_FILE`.

    Returns:
        Tensors by name.

    Raises:
        ValueError: The folder contains no weights, a file is damaged, a file that the index lists is missing, or two of
            them have the same weight.
    """
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"{folder}: contains no weights (looked for {', '.join(WEIGHT_FILES)})")
    if path.suffix != ".json":
        return _read_tensors(path) | _read_compressor(folder)
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{path}: weight_map must give a file name for each weight; restore the file")
    parts, suffix = sorted(set(files.values())), Path(path.name.removesuffix(".index.json")).suffix
    if len(parts) > _MOST_PARTS:
        raise ValueError(f"{path}: lists {len(parts)} files, expected at most {_MOST_PARTS}; restore the file")
    weights: dict[str, Tensor] = {}
    for name in parts:
        if Path(name).name != name:
            raise ValueError(f"{path}: lists {brief(name)}, expected the name of a file in the same folder")
        if not name.endswith(suffix):
            raise ValueError(f"{path}: lists {brief(name)}, expected names that end with {suffix}")
        if not (folder / name).exists():
            raise ValueError(f"{folder / printable(name)}: is missing, but {path.name} lists it; restore the file")
        part = _read_tensors(folder / name)
        if twice := weights.keys() & part.keys():
            raise ValueError(
                f"{folder / name}: {printable(min(twice))} is in another file of {path.name} too; restore it"
            )
        weights |= part
    return weights | _read_compressor(folder)


def read_language(folder: Path, language: str) -> tuple[Path, dict[str, Tensor]]:
    """Read the weights of a language from a folder whose model has adapters for several languages, as MMS.

    Args:
        folder: Folder with adapter.LANGUAGE.safetensors or adapter.LANGUAGE.bin.
        language: The language, as the files name it.

    Returns:
        The file, and its tensors by name.

    Raises:
        ValueError: There is no such file, or it is damaged.
    """
    names = language_files(language)
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        there = sorted({file.name.split(".")[1] for file in folder.glob("adapter.*.*")})
        known = (
            f"it has {', '.join(map(printable, there[:8]))}{' ...' if len(there) > 8 else ''}"
            if there
            else "it has none"
        )
        raise ValueError(
            f"language: {folder} has no adapters for {language!r} (looked for {' and '.join(names)}); {known}"
        )
    return path, _read_tensors(path)


def language_files(language: str) -> tuple[str, str]:
    """Return the names that the file with the adapters of a language may have, the preferred one first.

    Raises:
        ValueError: `language` cannot be a part of a file's name.
    """
    given: object = language
    if not isinstance(given, str) or not re.fullmatch(r"[\w-]+", given):
        raise ValueError(f"language: expected letters, digits, - and _, such as 'fra', got {brief(language)}")
    return f"adapter.{language}.safetensors", f"adapter.{language}.bin"


def _read_compressor(folder: Path) -> dict[str, Tensor]:
    path = folder / COMPRESSOR_FILE
    weights = _read_tensors(path) if path.exists() else {}
    return {f"{COMPRESSOR_PREFIX}{key}": tensor for key, tensor in weights.items()}


def write_encoder_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write an encoder's weights, with those of a compressor in a separate file.

    Both files are written completely under temporary names before the first one gets its own. If the encoder has no
    compressor, an old compressor file is deleted.

    Args:
        folder: Existing folder to write to.
        state: State dict of the encoder.

    Raises:
        WriteError: The system refused to write.
    """
    parts: dict[Path, dict[str, Tensor]] = {folder / "model.safetensors": {}}
    for key, tensor in state.items():
        of_compressor = key.startswith(COMPRESSOR_PREFIX)
        part = parts.setdefault(folder / (COMPRESSOR_FILE if of_compressor else "model.safetensors"), {})
        part[key.removeprefix(COMPRESSOR_PREFIX) if of_compressor else key] = tensor
    with ExitStack() as files:
        for path, weights in parts.items():
            _save(files.enter_context(replacing(path)), weights)
    if folder / COMPRESSOR_FILE not in parts:
        remove(folder / COMPRESSOR_FILE)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    size = check_file(path)
    try:
        if path.suffix == ".safetensors":
            _check_header(path, size)
            return read_safetensors(path)
        weights = load_pickled(path)
    except Exception as error:  # errors of safetensors, zipfile and pickle have no common class
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error
    if not is_state_dict(weights):
        raise ValueError(f"{path}: must contain a state dict, that is, a dictionary of tensors by name")
    return weights


def _check_header(path: Path, size: int) -> None:
    """Check the length of a safetensors file's header; safetensors itself checks what the header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MOST_BYTES):
        raise ValueError(f"its header would have {length} bytes, expected at most {MOST_BYTES}; restore the file")


def is_state_dict(weights: object) -> TypeGuard[dict[str, Tensor]]:
    """Return whether an object, such as one read with `torch.load`, is a dictionary of tensors by name."""
    return isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    )


def check_stored(weights: Mapping[str, Tensor], *, name: str) -> None:
    """Check that weights from a file do not share their numbers: a small file could otherwise hold a giant model.

    Args:
        weights: Tensors by name, those of one encoder.
        name: Name of the file or model, for error messages.

    Raises:
        ValueError: The weights have more numbers than are stored.
    """
    storages = [tensor.untyped_storage() for tensor in weights.values()]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if sum(tensor.nbytes for tensor in weights.values()) > stored:
        raise ValueError(f"{name}: has fewer numbers than its weights need, because they share them; restore the model")


def load_matching(module: nn.Module, weights: Mapping[str, Tensor], *, name: str) -> None:
    """Load weights into a module after checking that they match and that all numbers are finite.

    Args:
        module: Module to load into.
        weights: Tensors by name.
        name: Name of the file or model, for error messages.

    Raises:
        ValueError: As in `check_matching`, or a weight is NaN or infinite in the module's dtype.
    """
    check_matching(module, weights, name=name)
    own = module.state_dict()
    check_finite(((key, tensor.to(own[key].dtype)) for key, tensor in weights.items()), name=name)
    module.load_state_dict(weights)


def check_finite(weights: Iterable[tuple[str, Tensor]], *, name: str) -> None:
    """Check that all numbers of weights are finite.

    Args:
        weights: Names and tensors.
        name: Name of the file or model, for error messages.

    Raises:
        ValueError: A weight is NaN or infinite.
    """
    for key, tensor in weights:
        # If all numbers are finite, so is their sum, unless they are larger than those of any model.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise ValueError(f"{name}: {printable(key)} has NaN or infinite weights; restore the model")


def check_matching(module: nn.Module, weights: Mapping[str, Tensor], *, name: str) -> None:
    """Check that names and shapes of weights are those of a module, without reading their numbers.

    Args:
        module: Module that the weights are for; it may be on the meta device.
        weights: Tensors by name.
        name: Name of the file or model, for error messages.

    Raises:
        ValueError: A weight is missing, is unknown to the module, has the wrong shape, or is not floating point.
    """
    own = module.state_dict()
    for problem, keys in {
        "weights are missing": own.keys() - weights.keys(),
        "weights are unknown to the encoder": weights.keys() - own.keys(),
    }.items():
        if keys:
            some = ", ".join(map(printable, sorted(keys)[:5]))
            raise ValueError(f"{name}: {problem}: {some}{' ...' if len(keys) > 5 else ''}")
    for key, tensor in weights.items():
        if tensor.shape != own[key].shape:
            raise ValueError(f"{name}: {key} has shape {tuple(tensor.shape)}, expected {tuple(own[key].shape)}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{name}: {key} has dtype {tensor.dtype}, expected a floating-point dtype of 16 to 64 bits"
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{name}: {key} is not a plain tensor; save it as one")


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], *, there: str = "there") -> str:
    """Describe the settings that differ from those of an existing folder, for an error message.

    Args:
        before: Settings recorded when the folder was made.
        now: Current settings, which must be the same.
        there: Words to put after an old value, to say where it was found, such as "in the run".

    Returns:
        The differences, such as "seed: 3 in the run, 4 now"; an empty text if there are none.
    """
    changed = [name for name, value in now.items() if before.get(name) != value]
    return "; ".join(f"{name}: {printable(before.get(name))} {there}, {now[name]} now" for name in changed)


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a safetensors file as `files.replacing` does, with a checksum that `read_safetensors` checks.

    Args:
        path: File to write; its folder must exist.
        weights: Tensors by name, on any device.

    Raises:
        WriteError: The system refused to write.
    """
    with replacing(path) as partial:
        _save(partial, weights)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, and compare it with its checksum if `write_weights` wrote it.

    Args:
        path: The file.

    Returns:
        Tensors by name.

    Raises:
        ValueError: The file was damaged after it was written.
        SafetensorError: It is not a safetensors file.
    """
    with plain_path(path) as plain:
        weights = load_file(plain)
        with safe_open(plain, framework="pt") as file:
            recorded = (file.metadata() or {}).get(CHECKSUM)
    if recorded not in (None, _checksum(weights)):
        raise ValueError("its checksum differs, so it was damaged after it was written; restore it")
    return weights


def _save(path: Path, weights: Mapping[str, Tensor]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    metadata = {CHECKSUM: _checksum(tensors), "format": "pt"}
    save_file(tensors, path, metadata=metadata)
    # safetensors writes the metadata in a random order, but the same weights should give the same file.
    begin = '{"__metadata__":'
    wanted = begin + json.dumps(metadata, separators=(",", ":"))
    with path.open("r+b") as file:
        file.seek(8)  # after the length of the header
        found = file.read(len(wanted)).decode()
        assert json.loads(found.removeprefix(begin)) == metadata
        file.seek(8)
        file.write(wanted.encode())


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32, in hexadecimal, of the names and bytes of contiguous CPU tensors in alphabetical order."""
    found = 0
    for name in sorted(tensors):
        values = tensors[name].reshape(-1).view(torch.uint8).numpy()
        found = zlib.crc32(values.data, zlib.crc32(name.encode(), found))
    return f"{found:08x}"
