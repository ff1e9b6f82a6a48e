"""Translate the settings of s3prl's distiller (DistilHuBERT, arXiv 2110.01900) to fairseq's names.

A checkpoint of s3prl is a dictionary: `Config` has the settings of a run, and `Distiller` the weights of the student,
which have fairseq's names. The student is HuBERT's encoder without the layer norm before the projection.
"""

from collections.abc import Mapping
from typing import Any

from fastssl.reading import brief

#: Settings under other names than fairseq's, and defaults that differ from fairseq's.
_RENAMED = {"extractor_conv_feature_layers": "conv_feature_layers"}
_DEFAULTS: dict[str, Any] = {"encoder_layers": 1, "activation_dropout": 0.1}
#: Values of `task_emb_type` that change what the heads read, but not what the layers read.
_TASK_EMBEDDINGS = ("expand-last", "concat-last", "self-hidden", "none")


def is_s3prl(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint has s3prl's layout: the settings of a run under `Config`.

    Args:
        checkpoint: What the file contains.
    """
    return "Config" in checkpoint and "model" not in checkpoint


def distiller(checkpoint: Mapping[str, Any], config: Any) -> tuple[dict[str, Any], Any]:
    """Return the settings of a distiller's student by fairseq's names, and its weights.

    Args:
        checkpoint: What the file contains.
        config: Its entry `Config`, as plain values.

    Returns:
        Settings in the form of fairseq's `cfg`, and the entry `Distiller`.

    Raises:
        ValueError: It is a checkpoint of another of s3prl's models, or the student has a part that is not supported.
    """
    settings = config.get("distiller") if isinstance(config, Mapping) else None
    if not isinstance(settings, Mapping) or "Distiller" not in checkpoint:
        parts = ", ".join(sorted(str(name) for name in checkpoint)[:8])
        raise ValueError(
            f"is a checkpoint of s3prl (it has {brief(parts)}); of these only DistilHuBERT's can be opened, which have "
            "`Distiller` and the settings `Config.distiller`"
        )
    attention = settings.get("attention_type", "original")
    if attention != "original":
        raise ValueError(f"attention_type={brief(attention)} is not supported, only 'original'")
    embedding = settings.get("task_emb_type", "expand-last")
    if embedding not in list(_TASK_EMBEDDINGS):  # compared with a list, because a pickled value may be unhashable
        raise ValueError(
            f"task_emb_type={brief(embedding)} is not supported, because it changes the input of the layers for each "
            f"task; only {', '.join(_TASK_EMBEDDINGS)}"
        )
    model = _DEFAULTS | {_RENAMED.get(str(name), str(name)): value for name, value in settings.items()}
    return {"model": model | {"_name": "hubert", "feat_proj_layer_norm": False}}, checkpoint["Distiller"]
