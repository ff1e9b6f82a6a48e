"""`load_encoder`: load an encoder from a run, a folder, a checkpoint, the Hugging Face Hub or a model in memory."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl.interop import hub, names
from fastssl.interop.fairseq import read_checkpoint
from fastssl.kernels.prepacked_conv.weights import Format
from fastssl.models.conformer import ConformerEncoder
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.folder import ACCELERATED_COMPRESSOR, CONFORMER, MODEL_CLASSES, read_config
from fastssl.models.inference import check_format
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.reading import printable

_CAN_BE_OPENED = (
    "a run of `fastssl pretrain`; a folder with its encoder or in Transformers' layout; the name of a model on the "
    "Hub; a checkpoint (.pt) of fairseq's wav2vec 2.0, HuBERT or data2vec audio, or of WavLM; a checkpoint (.ckpt) of "
    "s3prl's DistilHuBERT; a Transformers model, with or without a head; or a torchaudio Wav2Vec2Model or "
    "HuBERTPretrainModel"
)


def load_encoder(
    path_or_model: str | Path | nn.Module,
    *,
    normalize: bool | None = None,
    language: str | None = None,
    inference: Format | None = None,
    download: bool = True,
) -> SpeechEncoder:
    """Load a speech encoder and put it in evaluation mode.

    Supports wav2vec 2.0, HuBERT, WavLM, data2vec audio, UniSpeech and UniSpeech-SAT, and BEST-RQ from a run or a folder
    of fastssl. Heads are ignored. Weights from a file are converted to fp32 on the CPU. Weights copied from a model get
    the dtype and device of its first parameter. The encoder takes raw audio at 16 kHz: where the model was trained on
    waveforms of zero mean and unit variance (`config.do_normalize`), a call scales them, utterance by utterance.

    Args:
        path_or_model: One of:

            - a run of `fastssl pretrain`;
            - a folder that `save_pretrained` wrote, or any folder in Transformers' layout, with weights in safetensors
              or pickled, in one file or in shards;
            - the name of a model on the Hub ("facebook/hubert-base-ls960"), if no such path exists; requires
              huggingface_hub;
            - a fairseq or WavLM checkpoint (.pt), pre-trained or fine-tuned, or one of s3prl's DistilHuBERT (.ckpt); no
              code in it is run;
            - a Transformers model, accelerated or not; its weights are copied. Usually only its preprocessor knows
              whether waveforms should be normalised, so `config.do_normalize` is True unless the model's config has it;
            - a torchaudio model; its weights are copied. `config.do_normalize` says whether the model itself normalises
              waveforms, as the models of some bundles do.

        normalize: Whether calls of the encoder scale waveforms to zero mean and unit variance: False if yours are
            scaled already. None does what the model's config says.
        language: Language whose adapters the layers get, of a model on the Hub or in a folder that has those of
            several, as MMS: "fra" for adapter.fra.safetensors. None leaves those of the model's own weights.
        inference: Lay out the weights for inference on the CPU, in place of the parameters: "fp32", "bf16" or "int8".
            Features are the same up to rounding, and an utterance has the same bits in any batch. The encoder then has
            no gradients, and cannot be moved or cast. "bf16" takes half the time and memory; "int8" a third of the time
            and a quarter of the memory, needs a processor with AVX512-VNNI, and changes features by about 3 %. None
            keeps parameters, for any use.
        download: Download a model on the Hub that is not in the local cache. Set this to False if the name comes from a
            file that others may have written.

    Returns:
        A `ConformerEncoder` for BEST-RQ, else an `Encoder`. If the argument is one of these, it is returned itself,
        with `normalize` set if it was given.

    Raises:
        ValueError: The argument is not one of these, has an unsupported part, or its weights do not fit its config. The
            message says what was looked for.
    """
    if not isinstance(normalize, bool | None):
        raise ValueError(f"normalize: must be True, False or None, got {normalize!r}")
    if inference is not None:
        check_format(inference)
    encoder = _opened(path_or_model, language=language, inference=inference, download=download).eval()
    if inference is not None and encoder.inference != inference:
        encoder.prepack(inference)
    if normalize is not None:
        encoder.normalize = normalize
    return encoder


def _opened(
    path_or_model: str | Path | nn.Module, *, language: str | None, inference: Format | None, download: bool
) -> SpeechEncoder:
    if isinstance(path_or_model, nn.Module) and language is not None:
        raise ValueError(
            "language: a model in memory has no files of languages; load its folder or its name on the Hub"
        )
    if isinstance(path_or_model, SpeechEncoder):
        return path_or_model
    if isinstance(path_or_model, nn.Module):
        return _from_model(path_or_model)
    if not isinstance(path_or_model, (str, Path)):
        raise ValueError(f"path_or_model: {type(path_or_model).__name__} cannot be loaded; expected {_CAN_BE_OPENED}")
    try:
        return _from_path(path_or_model, language=language, inference=inference, download=download)
    except OSError as error:  # such as a folder without permission, or a name that no file can have
        raise ValueError(f"{printable(path_or_model)}: cannot be read: {error.strerror}; check the path") from error


def _from_path(name: str | Path, *, language: str | None, inference: Format | None, download: bool) -> SpeechEncoder:
    path = Path(name)
    if path.is_file():
        if language is not None:
            raise ValueError("language: a checkpoint has no files of languages; give a folder or a name on the Hub")
        config, weights = read_checkpoint(path)
        return Encoder.from_weights(config, weights, name=str(path), inference=inference)
    if not path.exists():
        if not hub.may_be_id(str(name)):
            raise ValueError(f"{printable(name)}: no such file or folder; expected {_CAN_BE_OPENED}")
        path = hub.download(str(name), cached=not download, language=language)
    elif (path / "encoder" / "config.json").exists():
        path = path / "encoder"
    is_conformer = read_config(path, model_types=[*MODEL_CLASSES, CONFORMER])["model_type"] == CONFORMER
    early = inference if language is None else None  # the weights of a language replace others
    encoder: SpeechEncoder = (ConformerEncoder if is_conformer else Encoder).from_pretrained(path, inference=early)
    if language is not None:
        if not isinstance(encoder, Encoder):
            raise ValueError("language: a BEST-RQ encoder has no adapters for languages; leave the argument out")
        encoder.load_language(path, language)
    return encoder


def _from_model(model: nn.Module) -> Encoder:
    if any(hasattr(module, ACCELERATED_COMPRESSOR) for module in model.modules()):
        raise ValueError(
            f"path_or_model: {type(model).__name__} has a compressor that `fastssl.accelerate` added, which cannot be "
            "copied; remove it from the model with `fastssl.restore` first"
        )
    classes = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__}  # without importing torchaudio
    source: Any = model
    if "torchaudio.pipelines._wav2vec2.utils._Wav2Vec2Model" in classes:
        return _from_torchaudio(source.model, normalizes=bool(source.normalize_waveform))
    if "torchaudio.models.wav2vec2.model.HuBERTPretrainModel" in classes:
        return _from_torchaudio(source.wav2vec2, model_type="hubert")
    if "torchaudio.models.wav2vec2.model.Wav2Vec2Model" in classes:
        return _from_torchaudio(source)
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in MODEL_CLASSES:
        what = type(model).__name__ + ("" if model_type is None else f" (model_type {model_type!r})")
        raise ValueError(f"path_or_model: {what} cannot be loaded; expected {_CAN_BE_OPENED}")
    try:
        # The config may come from a folder of fastssl and name a compressor, but Transformers did not build one.
        values = config.to_dict() | {"compressor": "none", "compressor_factor": 1}
        own_config = EncoderConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"path_or_model: {type(model).__name__}: {error}") from None
    return _copied(model, own_config, model.state_dict())


def _copied(model: nn.Module, config: EncoderConfig, weights: dict[str, Any]) -> Encoder:
    with torch.device("cpu"):
        encoder = Encoder(config)
    encoder.load_weights(weights, name=type(model).__name__)
    first = next(model.parameters())
    return encoder.to(device=first.device, dtype=first.dtype)


def _from_torchaudio(model: Any, *, normalizes: bool = False, model_type: str = "wav2vec2") -> Encoder:
    config = torchaudio_config(model, normalizes=normalizes, model_type=model_type)
    return _copied(model, config, names.renamed(model.state_dict(), names.TORCHAUDIO))


def torchaudio_config(model: Any, *, normalizes: bool = False, model_type: str = "wav2vec2") -> EncoderConfig:
    """Derive an encoder config from the modules of a torchaudio `Wav2Vec2Model`, which has no config of its own.

    Its modules show whether a model is WavLM, but cannot tell wav2vec 2.0 from HuBERT.

    Args:
        model: A torchaudio `Wav2Vec2Model`.
        normalizes: Whether the wrapper around the model normalises waveforms.
        model_type: Architecture of the model if it is not WavLM, "wav2vec2" or "hubert".

    Raises:
        ValueError: The model has no transformer layers, or the config is invalid.
    """
    transformer = model.encoder.transformer
    convolutions = [layer.conv for layer in model.feature_extractor.conv_layers]
    position = transformer.pos_conv_embed.conv
    if len(transformer.layers) == 0:
        raise ValueError(
            "path_or_model: the torchaudio model has no transformer layers, so its number of heads is unknown; "
            "expected at least one layer"
        )
    layer = transformer.layers[0]
    last_norm = model.feature_extractor.conv_layers[-1].layer_norm
    values = {
        "model_type": model_type,
        "hidden_size": position.in_channels,
        "num_hidden_layers": len(transformer.layers),
        "num_attention_heads": layer.attention.num_heads,
        "intermediate_size": layer.feed_forward.intermediate_dense.out_features,
        "hidden_dropout": layer.dropout.p,
        "attention_dropout": layer.attention.dropout,
        "activation_dropout": layer.feed_forward.intermediate_dropout.p,
        "feat_proj_dropout": model.encoder.feature_projection.dropout.p,
        "layerdrop": transformer.layer_drop,
        "feat_extract_norm": "layer" if isinstance(last_norm, nn.LayerNorm) else "group",
        "conv_dim": tuple(conv.out_channels for conv in convolutions),
        "conv_kernel": tuple(conv.kernel_size[0] for conv in convolutions),
        "conv_stride": tuple(conv.stride[0] for conv in convolutions),
        "conv_bias": convolutions[0].bias is not None,
        "num_conv_pos_embeddings": position.kernel_size[0],
        "num_conv_pos_embedding_groups": position.groups,
        "do_stable_layer_norm": layer.layer_norm_first,
        "do_normalize": normalizes,
    }
    embedding = getattr(layer.attention, "rel_attn_embed", None)
    if embedding is not None:
        distance = layer.attention.max_distance
        values |= {"model_type": "wavlm", "num_buckets": embedding.num_embeddings, "max_bucket_distance": distance}
    return EncoderConfig(**values)
