"""Read checkpoints of fairseq (wav2vec 2.0, HuBERT, data2vec audio), of Microsoft's WavLM and of s3prl's DistilHuBERT.

Such a file is a pickle that names classes of fairseq and omegaconf. This module neither imports nor runs them:
PyTorch's restricted unpickler reads the file, replaces objects of these classes with inert ones, and refuses any other
name.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl.interop import names, s3prl
from fastssl.models.encoder import EncoderConfig
from fastssl.models.folder import check_sample_rate
from fastssl.models.pickled import globals_in, load_pickled
from fastssl.reading import brief, one_line

#: Packages and built-in types whose objects are replaced by inert ones. Their code never runs, so this list says what
#: such a file normally contains, not what is trusted.
_EXPECTED = re.compile(
    r"(argparse|fairseq|hydra|numpy|omegaconf|optimizers|s3prl|torch\.optim|typing)\..+"
    r"|collections\.defaultdict|_?operator\.getitem|builtins\.(bool|bytes|dict|float|getattr|int|list|str|tuple|type)"
)
#: Names of Python 2 that pickle's protocol 2 uses, which PyTorch translates; omegaconf pickles the types of settings.
_PYTHON_2 = {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}
#: Possible prefixes of the encoder's weights in a checkpoint; fine-tuned models contain the encoder as a submodule.
_PREFIXES = ("w2v_encoder.w2v_model.", "encoder.w2v_model.", "w2v_encoder.", "w2v_model.", "")
_MOST_SETTINGS, _LONGEST_LAYERS = 100_000, 10_000
_FIRST_WEIGHT = "feature_extractor.conv_layers.0.0.weight"
_TRIPLE = r"\(([1-9]\d{0,4}),([1-9]\d{0,4}),([1-9]\d{0,4})\)"
_CONV_LAYERS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2"
#: Settings that change the encoder's output, each with its only supported value, which is also fairseq's default.
_SERVED: dict[str, Any] = {
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "quantize_input": False,
    "crop_seq_to_multiple": 1,
    "conv_pos_batch_norm": False,
    "attn_type": "",
    "pos_enc_type": "abs",
}


class _Inert:
    """Stands in for an object of another package's class: stores what the pickle contains and does nothing."""

    def __new__(cls, *args: Any) -> "_Inert":
        made = super().__new__(cls)
        made._given = args
        return made

    _given: tuple[Any, ...]

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                vars(self).update(part)


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Stand in for `collections.defaultdict`, which omegaconf's metadata has, without the function for missing keys."""
    return {}


def read_checkpoint(path: Path) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """Read the config and weights of the encoder in a fairseq, WavLM or s3prl checkpoint; no code in it is run.

    Args:
        path: File written by fairseq or by WavLM's authors, pre-trained or fine-tuned, or by s3prl's distiller.

    Returns:
        The config, and the weights on the CPU by Transformers' names; weights of heads may be among them.

    Raises:
        ValueError: The file is not such a checkpoint, names code outside the expected packages, or contains a model
            with an unsupported part.
    """
    try:
        checkpoint = _load(path)
        cfg = next((cfg for key in ("cfg", "args", "Config") if (cfg := _plain(checkpoint.get(key)))), None)
    except Exception as error:  # the file may contain anything, so reading it may fail in any way
        raise ValueError(f"{path}: cannot be read as a fairseq checkpoint: {one_line(error)}") from error
    weights = checkpoint.get("model")
    if s3prl.is_s3prl(checkpoint):
        try:
            cfg, weights = s3prl.distiller(checkpoint, cfg)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if not isinstance(weights, dict) or not isinstance(cfg, dict):
        raise ValueError(f"{path}: is not a fairseq checkpoint; expected the entry 'model', and 'cfg' or 'args'")
    prefix = next((prefix for prefix in _PREFIXES if prefix + _FIRST_WEIGHT in weights), None)
    if prefix is None:
        raise ValueError(f"{path}: contains no speech encoder; looked for a weight named ...{_FIRST_WEIGHT}")
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if isinstance(name, str) and name.startswith(prefix) and isinstance(tensor, Tensor)
    }
    try:
        config, found = _config(cfg, weights), names.renamed(weights, names.FAIRSEQ)
        return config, _with_projection(config, found)
    except Exception as error:  # a setting may be anything, such as a tensor that cannot be compared
        raise ValueError(f"{path}: {one_line(error)}") from error


def _with_projection(config: EncoderConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the identity as projection if the model has none: where frames are as wide as the layers, fairseq has none.

    A product with the identity is exact, and Transformers, which always has a projection, can then open the encoder.
    """
    width, name = config.hidden_size, "feature_projection.projection"
    storages = [tensor.untyped_storage() for tensor in weights.values()]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if f"{name}.weight" in weights or config.conv_dim[-1] != width or 4 * width * width > stored:
        return weights  # a small file may claim any width
    return weights | {
        f"{name}.weight": torch.eye(width, device="cpu"),
        f"{name}.bias": torch.zeros(width, device="cpu"),
    }


def _load(path: Path) -> dict[str, Any]:
    found = {_PYTHON_2.get(name, name) for name in globals_in(path)}
    inert = {"collections.defaultdict": _plain_dict}
    expected = [(inert.get(name, _Inert), name) for name in found if _EXPECTED.fullmatch(name)]
    with torch.serialization.safe_globals(expected):  # type: ignore[arg-type]
        loaded = load_pickled(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"it contains a {type(loaded).__name__}, expected a dictionary")
    return loaded


def _plain(value: Any, visits: Iterator[int] | None = None) -> Any:
    """Convert namespaces, omegaconf's nodes and enumerations to dictionaries, lists and plain values, recursively.

    Raises:
        ValueError: The settings have too many values; a file may contain one object in another twice, and so on.
    """
    visits = count() if visits is None else visits
    if next(visits) > _MOST_SETTINGS:
        raise ValueError(f"its settings have more than {_MOST_SETTINGS} values")
    if isinstance(value, (_Inert, argparse.Namespace)):
        state = dict(vars(value))
        given = state.pop("_given", ())
        for key in ("_content", "_val"):  # attributes of omegaconf's containers and values
            if key in state:
                return _plain(state[key], visits)
        return _plain(state, visits) if state or not given else _plain(given[-1], visits)
    if isinstance(value, Mapping):
        return {key: _plain(item, visits) for key, item in value.items()}
    return [_plain(item, visits) for item in value] if isinstance(value, (list, tuple)) else value


def _config(cfg: dict[str, Any], weights: Mapping[str, Tensor]) -> EncoderConfig:
    """Build the encoder's config from a checkpoint's settings; missing settings get fairseq's defaults."""
    levels = [cfg]  # the settings of a fine-tuned model, then those of the model it was fine-tuned from
    while isinstance(nested := _model_of(levels[-1]).get("w2v_args"), dict):
        levels.append(nested)
    model = {name: value for name, value in _model_of(levels[-1]).items() if value is not None}
    for name, served in _SERVED.items():
        if model.get(name, served) != served:
            raise ValueError(f"{name}={brief(model[name])} is not supported, only {served!r}")
    _check_rate(levels)
    modes = {"default": "group", "layer_norm": "layer"}
    mode = model.get("extractor_mode", "default")
    if mode not in list(modes):  # compared with a list, because a pickled value may be unhashable
        raise ValueError(f"extractor_mode={brief(mode)} is not supported, only {' and '.join(modes)}")
    layers = _parse_layers(model.get("conv_feature_layers", _CONV_LAYERS))
    values = {
        "model_type": "wav2vec2",
        "hidden_size": _setting(model, "encoder_embed_dim", 768),
        "num_hidden_layers": _setting(model, "encoder_layers", 12),
        "num_attention_heads": _setting(model, "encoder_attention_heads", 12),
        "intermediate_size": _setting(model, "encoder_ffn_embed_dim", 3072),
        "hidden_dropout": _setting(model, "dropout", 0.1),
        "attention_dropout": _setting(model, "attention_dropout", 0.1),
        "activation_dropout": _setting(model, "activation_dropout", 0.0),
        "feat_proj_dropout": _setting(model, "dropout_input", 0.0),
        "layerdrop": _setting(model, "encoder_layerdrop", 0.0),
        "feat_extract_norm": modes[mode],
        "conv_dim": tuple(layer[0] for layer in layers),
        "conv_kernel": tuple(layer[1] for layer in layers),
        "conv_stride": tuple(layer[2] for layer in layers),
        "conv_bias": _setting(model, "conv_bias", False),
        "num_conv_pos_embeddings": _setting(model, "conv_pos", 128),
        "num_conv_pos_embedding_groups": _setting(model, "conv_pos_groups", 16),
        "do_stable_layer_norm": _setting(model, "layer_norm_first", False),
        "do_normalize": _normalises(levels),
        "feature_grad_mult": _setting(model, "feature_grad_mult", 1.0),
        "feat_proj_layer_norm": _setting(model, "feat_proj_layer_norm", True),  # only of s3prl's students
    }
    return EncoderConfig(**values | _own_settings(model, weights))


def _own_settings(model: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config values that only this model's architecture has; an empty dictionary means wav2vec 2.0."""
    if "relative_position_embedding" in model:
        if not (model["relative_position_embedding"] and model.get("gru_rel_pos")):
            raise ValueError("WavLM is supported only with relative_position_embedding and gru_rel_pos set to True")
        return {
            "model_type": "wavlm",
            "num_buckets": _setting(model, "num_buckets", 320),
            "max_bucket_distance": _setting(model, "max_distance", 1280),
        }
    depth = _setting(model, "pos_conv_depth", 1)
    if depth > 1:
        kernel = max(3, _setting(model, "conv_pos", 128) // depth)
        return {"model_type": "data2vec-audio", "num_conv_pos_embeddings": depth, "conv_pos_kernel_size": kernel}
    kind = f"{model.get('_name')} {model.get('arch')}"
    return {"model_type": "hubert"} if "hubert" in kind or "label_embs_concat" in weights else {}


def _setting(model: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return a setting or its default.

    Raises:
        ValueError: The setting does not have the type of its default; an int is accepted in place of a float.
    """
    value = model.get(name, default)
    number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
    if type(value) is not type(default) and not number:
        raise ValueError(f"{name}={brief(value)} is not of type {type(default).__name__}")
    return value


def _model_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's part of the settings; WavLM, and fairseq before hydra, keep all settings on one level."""
    model = cfg.get("model")
    return dict(model if isinstance(model, Mapping) else cfg)


def _normalises(levels: list[dict[str, Any]]) -> bool:
    """Return whether the model expects normalised waveforms, which the task or (before hydra) the arguments set."""
    for cfg in levels:
        for part in (cfg.get("task"), cfg, _model_of(cfg)):
            # The model's part may hold a text reference to the task's setting instead of a bool.
            if isinstance(part, Mapping) and isinstance(part.get("normalize"), bool):
                return bool(part["normalize"])
    return False


def _check_rate(levels: list[dict[str, Any]]) -> None:
    """Raise ValueError if a model was trained at a rate other than 16 kHz, which the task or the arguments set."""
    for cfg in levels:
        for part in (cfg.get("task"), cfg):
            rate_hz = part.get("sample_rate") if isinstance(part, Mapping) else None
            if isinstance(rate_hz, (int, float)):  # not a reference in text to another setting
                check_sample_rate(rate_hz, "sample_rate")


def _parse_layers(text: Any) -> list[tuple[int, int, int]]:
    """Parse the (channels, kernel, stride) of each convolution from text like "[(512, 10, 5)] + [(512, 3, 2)] * 4"."""
    layers: list[tuple[int, int, int]] = []
    if len(str(text)) > _LONGEST_LAYERS:
        raise ValueError(f"conv_feature_layers: is too long for a list of convolutions: {str(text)!r:.200}")
    for term in re.sub(r"\s", "", str(text)).split("+"):
        match = re.fullmatch(r"\[([\d,()]*)\](?:\*([1-9]\d?))?", term)
        if match is None:
            raise ValueError(f"conv_feature_layers: {text!r:.200} is not a sum of lists of (channels, kernel, stride)")
        if not re.fullmatch(rf"({_TRIPLE}(,|$))*", match[1]):
            raise ValueError(f"conv_feature_layers: {text!r:.200} is not a list of (channels, kernel, stride)")
        for _ in range(int(match[2] or 1)):
            layers += [(int(c), int(kernel), int(stride)) for c, kernel, stride in re.findall(_TRIPLE, match[1])]
    return layers
