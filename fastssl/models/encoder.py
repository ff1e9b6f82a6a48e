"""The encoder of wav2vec 2.0 and related models, with the parameter names and folder layout of Transformers."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastssl.models.bounds import bounded
from fastssl.models.compression import make_compressor
from fastssl.models.config import COMPRESSOR_FIELDS, Parts, SpeechEncoderConfig
from fastssl.models.folder import MODEL_CLASSES, SAMPLE_RATE_HZ, head_prefix, load_matching, read_language
from fastssl.models.multiplications import convolve
from fastssl.models.speech_encoder import EncoderOutput, SpeechEncoder
from fastssl.nn.adapter import ConvolutionalAdapter
from fastssl.nn.compression import Compressed
from fastssl.nn.feature_extractor import FeatureExtractor, FeatureProjection, scale_gradient
from fastssl.nn.transformer import RelativePositions, Transformer
from fastssl.packing import Layout, Packed
from fastssl.reading import brief, printable

if TYPE_CHECKING:
    from typing_extensions import Self

#: Fields that only one `model_type` has, and that type.
_OWN_FIELDS = {
    "feat_proj_layer_norm": "hubert",
    "num_buckets": "wavlm",
    "max_bucket_distance": "wavlm",
    "conv_pos_kernel_size": "data2vec-audio",
}
#: Architectures whose layers can have adapters, if they are pre-norm, and those that can have one after the layers.
_WITH_ATTENTION_ADAPTERS = ("wav2vec2", "hubert", "unispeech", "unispeech-sat")
_WITH_CONVOLUTIONAL_ADAPTER = ("wav2vec2", "wavlm", "data2vec-audio")
#: Part of the names of the weights that a language has for itself.
_LANGUAGE_WEIGHTS = ".adapter_layer."
#: Values that all data2vec-audio models share; config.json does not list them.
_DATA2VEC: dict[str, Any] = {"feat_extract_norm": "layer", "do_stable_layer_norm": False}


@dataclass(frozen=True)
class EncoderConfig(SpeechEncoderConfig):
    """Shape of an encoder, with the names and defaults of Transformers' configs (base models).

    The compressor, if any, sits between the front end and the projection to the width of the layers.

    Args:
        feat_proj_dropout: Dropout after the projection of the front end's frames.
        feat_extract_norm: Norm of the front end: "group" after the first convolution only, or "layer" after each one.
        conv_kernel: Kernel size of each front-end convolution.
        conv_stride: Stride of each front-end convolution.
        conv_bias: Give the front-end convolutions a bias.
        num_conv_pos_embeddings: Kernel of the positional convolution, in frames; for data2vec-audio, the number of
            positional convolutions.
        num_conv_pos_embedding_groups: Groups of the positional convolution.
        do_stable_layer_norm: Apply layer norm before each block instead of after it.
        initializer_range: Standard deviation of the initial weights of linear layers and embeddings.
        feature_grad_mult: Factor applied to the gradient that reaches the front end; 0 freezes the front end.
        model_type: Architecture, by its name in Transformers: wav2vec2, hubert, wavlm, data2vec-audio, unispeech or
            unispeech-sat.
        feat_proj_layer_norm: Apply layer norm to the front end's frames before the projection (hubert).
        num_buckets: Number of buckets of the relative position bias (wavlm).
        max_bucket_distance: Distance, in frames, beyond which all positions share a bucket (wavlm).
        conv_pos_kernel_size: Kernel of each positional convolution, in frames (data2vec-audio).

    Raises:
        ValueError: A value is out of bounds, not allowed for this `model_type`, or does not fit the other values.
    """

    feat_proj_dropout: float = bounded(0.0, least=0, below=1)
    feat_extract_norm: Literal["group", "layer"] = "group"
    conv_kernel: tuple[int, ...] = bounded((10, 3, 3, 3, 3, 2, 2), least=1, ceiling=65_536)
    conv_stride: tuple[int, ...] = bounded((5, 2, 2, 2, 2, 2, 2), least=1, ceiling=65_536)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = bounded(128, least=1, ceiling=65_536)
    num_conv_pos_embedding_groups: int = bounded(16, least=1, ceiling=65_536)
    do_stable_layer_norm: bool = False
    initializer_range: float = bounded(0.02, least=0)
    feature_grad_mult: float = bounded(1.0, least=0)
    feat_proj_layer_norm: bool = True
    num_buckets: int = bounded(320, least=4, ceiling=65_536)
    max_bucket_distance: int = bounded(800, least=2, ceiling=1_048_576)
    conv_pos_kernel_size: int = bounded(19, least=1, ceiling=65_536)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_type not in MODEL_CLASSES:
            raise ValueError(f"model_type: must be one of {', '.join(MODEL_CLASSES)}, got {brief(self.model_type)}")
        foreign = [field for field in fields(self) if _OWN_FIELDS.get(field.name, self.model_type) != self.model_type]
        fixed = {field.name: field.default for field in foreign}
        if self.model_type == "data2vec-audio":
            fixed |= _DATA2VEC
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}: must be {value!r} for {self.model_type}, got {brief(getattr(self, name))}")
        if not 0 < len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise ValueError(
                "conv_dim, conv_kernel, conv_stride: must be lists of the same length, one entry per convolution, got "
                f"lengths {len(self.conv_dim)}, {len(self.conv_kernel)} and {len(self.conv_stride)}"
            )
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(f"{name}: must divide hidden_size={self.hidden_size}, got {getattr(self, name)}")
        if self.max_bucket_distance <= self.num_buckets // 4:
            raise ValueError(
                f"max_bucket_distance: must be above a quarter of num_buckets={self.num_buckets}, "
                f"got {self.max_bucket_distance}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        """Make a config from the values of a Transformers `config.json`; keys that are unknown here are ignored.

        Missing encoder settings take Transformers' defaults, even if `cls` is a system's config with other defaults. If
        the model has adapters, the result is an `AdaptedEncoderConfig`; the config of a system cannot have them.

        Args:
            values: Settings by name, as parsed from JSON.

        Raises:
            ValueError: The model has a part that is not supported here, or a value is out of bounds.
        """
        model_type = values.get("model_type", "wav2vec2")
        for key, served in {
            "hidden_act": "gelu",
            "feat_extract_activation": "gelu",
            "conv_pos_batch_norm": False,  # batch norm would make features depend on the rest of the batch
        }.items():
            if values.get(key, served) != served:
                raise ValueError(f"{key}={brief(values[key])} is not supported, expected {served!r}")
        known = {field.name: field.default for field in fields(EncoderConfig) if field.name != "model_type"}
        known |= {name: value for name, value in values.items() if _OWN_FIELDS.get(name, model_type) == model_type}
        if model_type == "data2vec-audio":
            known |= {"num_conv_pos_embeddings": values.get("num_conv_pos_embeddings", 5)} | _DATA2VEC
        adapters = _adapters_in(known | {"model_type": model_type})
        if adapters and cls is EncoderConfig:
            return cast("Self", AdaptedEncoderConfig.from_dict(values))
        if adapters and not issubclass(cls, AdaptedEncoderConfig):
            found = ", ".join(f"{name}={brief(value)}" for name, value in adapters.items())
            raise ValueError(f"{found} is not supported in pre-training; start from the model before it was fine-tuned")
        # Where the architecture has no such adapter, Transformers ignores the setting, too.
        return super().from_dict(known | {"add_adapter": False, "adapter_attn_dim": None} | adapters)

    @property
    def samples_per_frame(self) -> int:
        """Number of samples, at 16 kHz, from one frame to the next; by default 320 (20 ms)."""
        return math.prod(self.conv_stride)

    @property
    def receptive_field_samples(self) -> int:
        """Number of samples, at 16 kHz, that one front-end frame depends on; by default 400 (25 ms)."""
        samples = 1
        for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    def frame_layout(self, layout: Layout) -> Layout:
        """Compute the layout of the front end's frames from the layout of the samples."""
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            layout = layout.after_conv(kernel, stride)
        return layout

    @property
    def num_modules(self) -> int:
        """Number of layers or of convolutions, whichever is larger; a model has at least as many weights."""
        stacked = self.num_conv_pos_embeddings if self.model_type == "data2vec-audio" else 0
        return max(super().num_modules, stacked)

    def count_parts(self, samples: int) -> Parts:
        """Count the multiply-accumulates for one utterance, as if the encoder had no compressor.

        Args:
            samples: Length of the utterance, in samples at 16 kHz.
        """
        frames, front_end = convolve(samples, 1, self.conv_dim, self.conv_kernel, self.conv_stride)
        c_in, width, inner = self.conv_dim[-1], self.hidden_size, self.intermediate_size
        kernel = self.num_conv_pos_embeddings  # for data2vec-audio, the number of positional convolutions
        if self.model_type == "data2vec-audio":
            kernel *= self.conv_pos_kernel_size
        positions = width * width // self.num_conv_pos_embedding_groups * kernel
        layer = 4 * width * width + 2 * width * inner
        return Parts(frames, front_end, c_in, c_in * width + positions + self.num_hidden_layers * layer)


def _adapters_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `add_adapter` and `adapter_attn_dim` of Transformers' settings if the model has such adapters."""
    model_type, found = values["model_type"], {}
    if values.get("add_adapter", False) is not False and model_type in _WITH_CONVOLUTIONAL_ADAPTER:
        found["add_adapter"] = values["add_adapter"]
    inside = values.get("adapter_attn_dim")
    if inside is not None and model_type in _WITH_ATTENTION_ADAPTERS and values.get("do_stable_layer_norm") is True:
        found["adapter_attn_dim"] = inside
    return found


@dataclass(frozen=True)
class AdaptedEncoderConfig(EncoderConfig):
    """Shape of an encoder with the adapters that a model of Transformers got when it was fine-tuned.

    Args:
        adapter_attn_dim: Inner width of the adapter after each layer, as in MMS (arXiv 2305.13516); None has none.
        add_adapter: Apply strided convolutions to the output of the last layer; the encoder's features are theirs.
        num_adapter_layers: Number of these convolutions.
        adapter_kernel_size: Kernel size of each, in frames.
        adapter_stride: Stride of each, in frames.
        output_hidden_size: Width of their output; None is the width of the layers.

    Raises:
        ValueError: A value is out of bounds, or this `model_type` has no such adapter.
    """

    adapter_attn_dim: int | None = bounded(None, least=1, ceiling=65_536)
    add_adapter: bool = False
    num_adapter_layers: int = bounded(3, least=0, ceiling=1024)
    adapter_kernel_size: int = bounded(3, least=1, ceiling=65_536)
    adapter_stride: int = bounded(2, least=1, ceiling=65_536)
    output_hidden_size: int | None = bounded(None, least=1, ceiling=65_536)

    def __post_init__(self) -> None:
        super().__post_init__()
        found = _adapters_in(asdict(self))
        for name, none in {"adapter_attn_dim": None, "add_adapter": False}.items():
            if getattr(self, name) != none and name not in found:
                raise ValueError(
                    f"{name}: must be {none} for {self.model_type} with do_stable_layer_norm="
                    f"{self.do_stable_layer_norm}, got {getattr(self, name)}"
                )
        if self.add_adapter and self.compressor != "none":
            raise ValueError(f"compressor: must be 'none' in an encoder with add_adapter, got {self.compressor!r}")

    @property
    def feature_width(self) -> int:
        """Number of channels of the encoder's features."""
        return self.output_hidden_size or self.hidden_size if self.add_adapter else self.hidden_size

    @property
    def feature_period_ms(self) -> float:
        """Time from one frame of the encoder's features to the next, in milliseconds."""
        return self.frame_period_ms * (self.adapter_stride**self.num_adapter_layers if self.add_adapter else 1)

    @property
    def num_modules(self) -> int:
        """Number of layers or of convolutions, whichever is larger; a model has at least as many weights."""
        return max(super().num_modules, self.num_adapter_layers if self.add_adapter else 0)

    def count_parts(self, samples: int) -> Parts:
        """Count the multiply-accumulates for one utterance; the convolutions after the layers count as front end.

        Args:
            samples: Length of the utterance, in samples at 16 kHz.
        """
        parts = super().count_parts(samples)
        inside = 2 * self.hidden_size * (self.adapter_attn_dim or 0)
        after, frames, width = 0, parts.frames, self.feature_width
        if self.add_adapter and width != self.hidden_size:
            after += frames * self.hidden_size * width
        for _ in range(self.num_adapter_layers if self.add_adapter else 0):
            padded = frames + 2 if frames else 0
            frames, convolved = convolve(
                padded, width, (2 * width,), (self.adapter_kernel_size,), (self.adapter_stride,)
            )
            after += convolved
        per_frame = parts.per_frame + self.num_hidden_layers * inside
        return parts._replace(front_end=parts.front_end + after, per_frame=per_frame)


class Projected(NamedTuple):
    """Result of `Encoder.project`: front-end frames that are ready for the transformer.

    Attributes:
        frames: (N, D) projected frames, the input of the transformer.
        normalised: (N, C) the same frames before the projection, the input of wav2vec 2.0's quantiser.
        compressed: Result of the compressor; None if the encoder has no compressor.
    """

    frames: Packed  # (N, D)
    normalised: Tensor  # (N, C)
    compressed: Compressed | None


class Encoder(SpeechEncoder):
    """A speech encoder for packed waveforms, with the state dict of Transformers' base model for the same `model_type`.

    Args:
        config: Shape of the encoder.
    """

    config_class = EncoderConfig
    model_types = tuple(MODEL_CLASSES)
    config: EncoderConfig
    encoder: Transformer

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        adapted = config if isinstance(config, AdaptedEncoderConfig) else None
        self.feature_extractor = FeatureExtractor(
            config.conv_dim,
            config.conv_kernel,
            config.conv_stride,
            bias=config.conv_bias,
            norm=config.feat_extract_norm,
        )
        self.feature_projection = FeatureProjection(
            config.conv_dim[-1],
            config.hidden_size,
            eps=config.layer_norm_eps,
            dropout=config.feat_proj_dropout,
            norm=config.feat_proj_layer_norm,
        )
        self.masked_spec_embed = nn.Parameter(torch.rand(config.hidden_size))
        stacked = config.model_type == "data2vec-audio"
        gated = config.model_type == "wavlm"
        self.encoder = Transformer(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            positional_kernel=config.conv_pos_kernel_size if stacked else config.num_conv_pos_embeddings,
            positional_groups=config.num_conv_pos_embedding_groups,
            pre_norm=config.do_stable_layer_norm,
            dropout=config.hidden_dropout,
            attention_dropout=config.attention_dropout,
            activation_dropout=config.activation_dropout,
            layer_drop=config.layerdrop,
            eps=config.layer_norm_eps,
            positional_depth=config.num_conv_pos_embeddings if stacked else None,
            relative_positions=RelativePositions(config.num_buckets, config.max_bucket_distance) if gated else None,
            adapter_width=None if adapted is None else adapted.adapter_attn_dim,
        )
        self.adapter = None if adapted is None or not adapted.add_adapter else _convolutional_adapter(adapted)
        self.compressor = None if config.compressor == "none" else make_compressor(config, config.conv_dim[-1])
        for module in self.encoder.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def encode(
        self,
        frames: Packed,
        *,
        rate: float | Tensor | None = None,
        frame_period_ms: float | Tensor | None = None,
    ) -> EncoderOutput:
        """Encode the result of `extract_features`; the errors are those of `forward`.

        Args:
            frames: (N, C) front-end frames.
            rate: As in `forward`.
            frame_period_ms: As in `forward`.
        """
        projected = self.project(frames, rate=rate, frame_period_ms=frame_period_ms)
        hidden_states = self.encoder(projected.frames)
        features = hidden_states[-1] if self.adapter is None else self.adapter(hidden_states[-1])
        return EncoderOutput(features, hidden_states, projected.compressed)

    def project(
        self,
        frames: Packed,
        *,
        rate: float | Tensor | None = None,
        frame_period_ms: float | Tensor | None = None,
    ) -> Projected:
        """Normalise front-end frames, compress them if there is a compressor, and project them to the layers' width D.

        The errors are those of `forward`.

        Args:
            frames: (N, C) front-end frames.
            rate: As in `forward`.
            frame_period_ms: As in `forward`.
        """
        normalised = Packed(self.feature_projection.normalise(frames.values), frames.layout)
        compressed = None
        if self.compressor is not None or rate is not None or frame_period_ms is not None:
            normalised, compressed = self.compress(normalised, rate=rate, frame_period_ms=frame_period_ms)
            normalised.layout.plan(self.encoder.ask)
        projected = self.feature_projection.project(normalised.values)
        return Projected(Packed(projected, normalised.layout), normalised.values, compressed)

    def _front_end(self, samples: Packed) -> Packed:
        # `config.feature_grad_mult` scales the gradient that the frames (N_out, conv_dim[-1]) pass back.
        samples.layout.plan(self._ask)
        values, layout = self.feature_extractor(samples)
        return Packed(scale_gradient(values, self.config.feature_grad_mult), layout)

    def frame_layout(self, layout: Layout) -> Layout:
        """Compute the layout of the front end's frames from the layout of the samples."""
        return self.config.frame_layout(layout)

    def _ask(self, layout: Layout) -> Layout:
        frames = self.frame_layout(layout)
        (self.encoder if self.compressor is None else self.compressor).ask(frames)
        if self.adapter is not None:
            self.adapter.ask(frames)
        return frames

    def json_files(self) -> dict[str, dict[str, Any]]:
        """Return the contents of the two files that Transformers reads: config.json and preprocessor_config.json."""
        config = self.config
        values = {
            "model_type": config.model_type,
            "architectures": [MODEL_CLASSES[config.model_type]],
            "torch_dtype": str(self.masked_spec_embed.dtype).removeprefix("torch."),
        }
        preprocessor = {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "sampling_rate": SAMPLE_RATE_HZ,
            "padding_value": 0.0,
            "do_normalize": config.do_normalize,
            "return_attention_mask": config.feat_extract_norm == "layer",
        }
        return {"config.json": values | _as_transformers(config), "preprocessor_config.json": preprocessor}

    def load_language(self, folder: str | Path, language: str) -> None:
        """Replace the adapters of the layers by those of another language.

        Args:
            folder: Folder with a file for each language, adapter.LANGUAGE.safetensors or .bin, as those of MMS.
            language: The language, as the files name it, such as "fra".

        Raises:
            ValueError: The encoder has no such adapters, there is no file of this language, or it does not fit.
        """
        own = self.state_dict()
        adapters = {key for key in own if _LANGUAGE_WEIGHTS in key}
        if not adapters:
            raise ValueError("language: this model has no adapters for languages; leave the argument out")
        path, weights = read_language(Path(folder), language)
        found = {key: tensor for key, tensor in self.own_weights(weights).items() if _LANGUAGE_WEIGHTS in key}
        if adapters != found.keys():
            wrong = printable(min(adapters ^ found.keys()))
            raise ValueError(f"{path}: its weights are not those of the model's adapters, such as {wrong}; restore it")
        load_matching(self, own | found, name=str(path))

    def own_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pick the encoder's weights, under any of the names that versions of Transformers have given them.

        Args:
            weights: Tensors of an encoder, or of a model with a head, by name.

        Returns:
            The encoder's tensors by the names of this module's state dict.
        """
        prefix = head_prefix(self.config.model_type)
        if not any(key.startswith(prefix) for key in weights):
            prefix = ""
        roots = {key.partition(".")[0] for key in self.state_dict()}
        # Models fine-tuned without masking do not store the mask vector.
        found = {"masked_spec_embed": self.masked_spec_embed.detach()}
        for key, tensor in weights.items():
            current = key.removeprefix(prefix)
            if key.startswith(prefix) and current.partition(".")[0] in roots:
                current = current.replace("conv.weight_g", "conv.parametrizations.weight.original0")
                current = current.replace("conv.weight_v", "conv.parametrizations.weight.original1")
                found[current] = tensor
        return found


def _convolutional_adapter(config: AdaptedEncoderConfig) -> ConvolutionalAdapter:
    return ConvolutionalAdapter(
        config.hidden_size,
        config.feature_width,
        depth=config.num_adapter_layers,
        kernel=config.adapter_kernel_size,
        stride=config.adapter_stride,
        layer_drop=config.layerdrop,
    )


def _as_transformers(config: EncoderConfig) -> dict[str, Any]:
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
        if _OWN_FIELDS.get(name, config.model_type) == config.model_type
        and not (config.model_type == "data2vec-audio" and name in _DATA2VEC)
        and not (config.compressor == "none" and name in COMPRESSOR_FIELDS)
        and not isinstance(value, dict)  # a group of training settings, such as gumbel_temperature
    }
    values |= {"num_feat_extract_layers": len(config.conv_dim), "hidden_act": "gelu", "feat_extract_activation": "gelu"}
    return values
