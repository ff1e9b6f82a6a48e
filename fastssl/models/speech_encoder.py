"""Any of the encoders here: what they have in common is what both have."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from fastssl.models.conformer import ConformerConfig, ConformerEncoder, load_conformer_weights
from fastssl.models.encoder import Encoder, EncoderConfig, load_encoder_weights
from fastssl.models.folder import CONFORMER, MODEL_CLASSES, read_config

#: Of waveforms; with `config`, `forward`, `extract_features` and `save_pretrained`.
SpeechEncoder: TypeAlias = Encoder | ConformerEncoder


def open_encoder(folder: str | Path) -> SpeechEncoder:
    """Open a folder of an encoder, of the class that its config names.

    Raises:
        ValueError: The folder holds no encoder that is served, or its weights do not fit its config.
    """
    folder = Path(folder)
    values = read_config(folder, model_types=[*MODEL_CLASSES, CONFORMER])
    opened = ConformerEncoder if values["model_type"] == CONFORMER else Encoder
    return opened.from_pretrained(folder)


def fresh_encoder(config: EncoderConfig | ConformerConfig) -> SpeechEncoder:
    """An encoder with new weights, from torch's generator."""
    return ConformerEncoder(config) if isinstance(config, ConformerConfig) else Encoder(config)


def load_speech_encoder(
    encoder: SpeechEncoder, weights: Mapping[str, Tensor], *, name: str, fresh_compressor: bool = False
) -> None:
    """Load an encoder's weights, of an encoder alone or of a model with a head.

    Args:
        encoder: Takes the weights.
        weights: By name.
        name: Of the file or model, for errors.
        fresh_compressor: Whether the compressor may stay as it is where the weights have none.

    Raises:
        ValueError: A weight is missing or of another shape, or the encoder has no place for one.
    """
    if isinstance(encoder, ConformerEncoder):
        load_conformer_weights(encoder, weights, name=name, fresh_compressor=fresh_compressor)
    else:
        load_encoder_weights(encoder, weights, name=name, fresh_compressor=fresh_compressor)
