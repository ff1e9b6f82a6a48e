"""Test the bounds of every setting: values on both sides of each bound, and the option names in the errors."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import pytest

from fastssl import cli
from fastssl.models.bounds import bounded, check_bounds, declared
from fastssl.models.conformer import ConformerConfig
from fastssl.models.encoder import AdaptedEncoderConfig, EncoderConfig
from fastssl.models.wav2vec2 import GumbelTemperature
from fastssl.train.config import (
    DataConfig,
    OptimizerConfig,
    PretrainConfig,
    QualityConfig,
    TrainerConfig,
)
from fastssl.train.systems import SYSTEMS

#: Config -> prefix of its fields' names in errors.
CONFIGS: dict[type[Any], str] = {
    **dict.fromkeys((EncoderConfig, AdaptedEncoderConfig, ConformerConfig), ""),
    **dict.fromkeys((*(model.config_class for model in SYSTEMS.values()), PretrainConfig), ""),
    DataConfig: "data.",
    OptimizerConfig: "optimizer.",
    GumbelTemperature: "gumbel_temperature.",
    TrainerConfig: "trainer.",
    QualityConfig: "quality.",
}
#: Bounds, as written in errors -> names of the fields with these bounds.
BOUNDS = {
    "at least 0 and below 1": (
        *("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "feat_quantizer_dropout"),
        *("layerdrop", "valid", "betas"),
    ),
    "at least 0 and at most 1": ("mask_time_prob", "max_bad_fraction", "mixing_prob", "mixing_noise_prob"),
    "above 0 and at most 1": ("quantity_share", "decay"),
    "above 0 and at most 525600": ("timeout_minutes",),
    "at least 1 and at most 2": ("rules", "randomness"),
    "at least 0 and below 4294967296": ("seed",),
    "above 0": (
        *("layer_norm_eps", "contrastive_logits_temperature", "logit_temperature", "start", "end", "lr", "eps"),
        *("clip_norm", "max_duration_s", "crop_s", "window_s", "minutes", "checkpoint_minutes"),
    ),
    "at least 0": (
        *("num_hidden_layers", "mask_time_min_masks", "initializer_range", "feature_grad_mult", "compression_range"),
        *("segment_loss_weight", "frame_loss_weight", "quantity_loss_weight", "diversity_loss_weight"),
        *("features_penalty_weight", "cosine_loss_weight", "teacher_layers", "mask_noise_std", "min_duration_s"),
        *("channel", "num_workers", "weight_decay", "warmup_updates", "layers", "num_adapter_layers"),
    ),
    "at least 1": (
        *("hidden_size", "num_attention_heads", "intermediate_size", "conv_dim", "conv_kernel", "conv_stride"),
        *("num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "conv_pos_kernel_size"),
        *("compressor_factor", "mask_time_length", "num_negatives", "num_codevector_groups"),
        *("num_codevectors_per_group", "codevector_dim", "proj_codevector_dim", "final_dim", "codebook_size"),
        *("codebook_dim", "num_mel_bins", "conv_depthwise_kernel_size", "teacher_hidden_size"),
        *("teacher_num_hidden_layers", "max_utterances", "max_steps", "accumulation", "devices", "num_nodes"),
        *("log_every", "val_check_interval", "checkpoint_every", "keep_every", "every", "max_frames"),
        *("adapter_attn_dim", "adapter_kernel_size", "adapter_stride", "output_hidden_size"),
    ),
    "at least 2": ("num_clusters", "max_bucket_distance"),
    "at least 4": ("num_buckets",),
}
#: Field -> other settings that must change so that values next to its bound are valid.
_BESIDE: dict[str, dict[str, Any]] = {
    "hidden_size": {"num_attention_heads": 1},
    "num_buckets": {"model_type": "wavlm"},
    "max_bucket_distance": {"model_type": "wavlm", "num_buckets": 4},
    "conv_pos_kernel_size": {
        **{"model_type": "data2vec-audio", "feat_extract_norm": "layer"},
        **{"do_stable_layer_norm": False, "num_conv_pos_embeddings": 5},
    },
    "compressor_factor": {"compressor": "average"},
    "codevector_dim": {"num_codevector_groups": 1},
    "max_duration_s": {"crop_s": None},
    "keep_every": {"checkpoint_every": 1},
    "adapter_attn_dim": {"do_stable_layer_norm": True},
}
#: Integer fields whose legal values are more than 1 apart.
_STEPS = {"conv_depthwise_kernel_size": 2, "hidden_size": 2}
_REQUIRED = {PretrainConfig: {"audio": "", "output": ""}}


def _numbers(hint: Any) -> set[type]:
    return {hint} & {int, float} | {number for argument in get_args(hint) for number in _numbers(argument)}


def _fields(config: type[Any]) -> list[tuple[str, type]]:
    """Return the numeric fields of a config, each with its type, int or float."""
    found = [
        (field.name, _numbers(field.hint)) for field in declared(config) if not dataclasses.is_dataclass(field.hint)
    ]
    return [(name, float if float in numbers else int) for name, numbers in found if numbers]


def _bounds_of(config: type[Any], name: str) -> str:
    if name == "hidden_size" and issubclass(config, ConformerConfig):
        return "at least 2"  # its heads need an even width
    return next(text for text, names in BOUNDS.items() if name in names)


def _cases() -> Iterator[Any]:
    for config in CONFIGS:
        for name, kind in _fields(config):
            text = _bounds_of(config, name)
            for bound in text.split(" and "):
                words, _, number = bound.rpartition(" ")
                limit = kind(number)
                step = 0.001 if kind is float else 1
                refused = {"at least": (-1,), "above": (-1, 0), "at most": (1,), "below": (0, 1)}[words]
                foreign = "model_type" in _BESIDE.get(name, {}) and config is not EncoderConfig
                for side, where in ((-1, "below"), (0, "at"), (1, "above")):
                    value = limit + side * (step if side in refused else step * _STEPS.get(name, 1))
                    label = f"{config.__name__}.{name} {where} {bound.rpartition(' ')[2]}"
                    if side in refused or not foreign:  # a pre-training config cannot change its architecture
                        yield pytest.param(config, name, value, text if side in refused else None, id=label)


def _hint(config: type[Any], name: str) -> Any:
    return next(field.hint for field in declared(config) if field.name == name)


def _make(config: type[Any], name: str, value: Any) -> None:
    default: Any = next(field.default for field in dataclasses.fields(config) if field.name == name)
    if tuple in {get_origin(hint) for hint in (_hint(config, name), *get_args(_hint(config, name)))}:
        value = (value,) * len(default or (0,))
    beside = dict(_BESIDE.get(name, {}))
    if name == "hidden_size":
        beside |= {"num_conv_pos_embedding_groups": 1} if issubclass(config, EncoderConfig) else {}
    config(**_REQUIRED.get(config, {}) | beside | {name: value})


@pytest.mark.parametrize(("config", "name", "value", "refused"), list(_cases()))
def test_either_side_of_every_bound(config: type[Any], name: str, value: Any, refused: str | None) -> None:
    if refused is None:
        _make(config, name, value)
        return
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - compared below
        _make(config, name, value)
    null = ", or null" if NoneType in get_args(_hint(config, name)) else ""
    assert str(raised.value) == f"{CONFIGS[config]}{name}: must be {refused}{null}, got {value}"


def test_every_number_has_bounds() -> None:
    names = list(itertools.chain(*BOUNDS.values()))
    assert len(names) == len(set(names))
    assert {name for config in CONFIGS for name, _ in _fields(config)} == set(names)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("config", CONFIGS)
def test_numbers_are_finite(config: type[Any], value: float) -> None:
    for name, kind in _fields(config):
        if kind is float:
            with pytest.raises(ValueError, match=rf"^{CONFIGS[config]}{name}: must be finite, got {value}"):
                config(**_REQUIRED.get(config, {}) | {name: _as_many(config, name, value)})


def _as_many(config: type[Any], name: str, value: float) -> Any:
    default = next(field.default for field in dataclasses.fields(config) if field.name == name)
    return (value,) * len(default) if isinstance(default, tuple) else value


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_has_its_type(config: type[Any]) -> None:
    for field in declared(config):
        wrong: tuple[Any, ...] = ({}, 1 if field.hint is bool else True)
        for value in wrong:
            with pytest.raises(ValueError, match=rf"^{CONFIGS[config]}{field.name}: must be .*, got"):
                config(**_REQUIRED.get(config, {}) | {field.name: value})


def test_a_field_declared_again_keeps_its_bounds() -> None:
    @dataclasses.dataclass
    class Base:
        share: float = bounded(0.5, least=0, most=1)
        kind: str = bounded("one", choices=("one", "two"))

    @dataclasses.dataclass
    class Derived(Base):
        share: float = 0.25

    check_bounds(Derived())
    for wrong, message in (
        (Derived(share=2.0), "group.share: must be at least 0 and at most 1, got 2.0"),
        (Derived(kind="three"), "group.kind: must be one of one, two, got 'three'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_bounds(wrong, "group.")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model.layerdrop", "-3", "must be at least 0 and below 1, got -3.0"),
        ("model.hidden_dropout", "1.5", "must be at least 0 and below 1, got 1.5"),
        ("model.codevector_dim", "65", "must be divisible by num_codevector_groups=2, got 65"),
        ("model.contrastive_logits_temperature", "0", "must be above 0, got 0.0"),
        ("model.num_attention_heads", "5", "must divide hidden_size=768, got 5"),
        ("model.num_conv_pos_embedding_groups", "7", "must divide hidden_size=768, got 7"),
        ("model.compressor", "median", "must be one of none, average, strided, integrate-and-fire, got 'median'"),
        ("model.model_type", "hubert", "this system trains a wav2vec2 encoder, got 'hubert'"),
        ("data.max_utterances", "0", "must be at least 1, or null, got 0"),
        ("optimizer.betas", "[0.9,1.0]", "must be at least 0 and below 1, got 1.0"),
        ("quality.layers", "[-1]", "must be at least 0, or null, got -1"),
        ("seed", "-1", "must be at least 0 and below 4294967296, got -1"),
    ],
)
def test_the_command_line_names_the_option_and_writes_nothing(
    option: str, value: str, message: str, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(["pretrain", str(recordings), "--output", str(run), f"--{option}", value]) == 1
    assert capsys.readouterr().err == f"fastssl pretrain: {option}: {message}\n"
    assert not run.exists()


def test_files_say_the_same_names(recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("model: {features_penalty_weight: .inf}\n")
    arguments = [
        "pretrain",
        str(recordings),
        "--output",
        str(tmp_path / "run"),
        "--config",
        str(tmp_path / "mine.yaml"),
    ]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == "fastssl pretrain: model.features_penalty_weight: must be finite, got inf\n"
    assert not (tmp_path / "run").exists()
