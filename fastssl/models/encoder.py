"""The encoder of wav2vec 2.0 and its relatives: parameter names and folder layout of Transformers' encoders."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastssl.models.bounds import bounded
from fastssl.models.compression import make_compressor
from fastssl.models.config import COMPRESSOR_FIELDS, Parts, SpeechEncoderConfig
from fastssl.models.folder import MODEL_CLASSES, SAMPLE_RATE_HZ, head_prefix
from fastssl.models.multiplications import convolve
from fastssl.models.speech_encoder import EncoderOutput, SpeechEncoder
from fastssl.nn.compression import Compressed
from fastssl.nn.feature_extractor import FeatureExtractor, FeatureProjection, scale_gradient
from fastssl.nn.transformer import RelativePositions, Transformer
from fastssl.packing import Layout, Packed

if TYPE_CHECKING:
    from typing_extensions import Self

#: Fields that one `model_type` alone has.
_OWN_FIELDS = {
    "feat_proj_layer_norm": "hubert",
    "num_buckets": "wavlm",
    "max_bucket_distance": "wavlm",
    "conv_pos_kernel_size": "data2vec-audio",
}
#: What data2vec-audio always has, so that its config does not say so.
_DATA2VEC: dict[str, Any] = {"feat_extract_norm": "layer", "do_stable_layer_norm": False}


@dataclass(frozen=True)
class EncoderConfig(SpeechEncoderConfig):
    """Shape of an encoder; names and defaults of Transformers' configs (the base models).

    A compressor comes before the projection.

    Args:
        feat_proj_dropout: Dropout after the projection of the front end's frames.
        feat_extract_norm: "group" (first convolution only) or "layer" (every convolution).
        conv_kernel: Kernel of each convolution.
        conv_stride: Stride of each convolution.
        conv_bias: Whether convolutions have a bias.
        num_conv_pos_embeddings: Kernel of the positional convolution, in frames; for data2vec-audio, the number of
            positional convolutions.
        num_conv_pos_embedding_groups: Groups of the positional convolution.
        do_stable_layer_norm: Norm before each block instead of after it.
        initializer_range: Standard deviation of initial linear weights.
        feature_grad_mult: Factor on the gradient that reaches the front end.
        model_type: The architecture, by Transformers' name: wav2vec2, hubert, wavlm, data2vec-audio, unispeech or
            unispeech-sat.
        feat_proj_layer_norm: Whether the front end's frames are normalised before the projection (hubert).
        num_buckets: Buckets of the relative position bias (wavlm).
        max_bucket_distance: Distance, in frames, beyond which all positions share a bucket (wavlm).
        conv_pos_kernel_size: Kernel of each positional convolution, in frames (data2vec-audio).
    """

    feat_proj_dropout: float = bounded(0.0, least=0, below=1)
    feat_extract_norm: Literal["group", "layer"] = "group"
    conv_kernel: tuple[int, ...] = bounded((10, 3, 3, 3, 3, 2, 2), least=1)
    conv_stride: tuple[int, ...] = bounded((5, 2, 2, 2, 2, 2, 2), least=1)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = bounded(128, least=1)
    num_conv_pos_embedding_groups: int = bounded(16, least=1)
    do_stable_layer_norm: bool = False
    initializer_range: float = bounded(0.02, least=0)
    feature_grad_mult: float = bounded(1.0, least=0)
    feat_proj_layer_norm: bool = True
    num_buckets: int = bounded(320, least=4)
    max_bucket_distance: int = bounded(800, least=2)
    conv_pos_kernel_size: int = bounded(19, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_type not in MODEL_CLASSES:
            raise ValueError(f"model_type: {self.model_type!r} is none of {', '.join(MODEL_CLASSES)}")
        foreign = [field for field in fields(self) if _OWN_FIELDS.get(field.name, self.model_type) != self.model_type]
        fixed = {field.name: field.default for field in foreign}
        if self.model_type == "data2vec-audio":
            fixed |= _DATA2VEC
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}: must be {value!r} for {self.model_type}, got {getattr(self, name)!r}")
        if not 0 < len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise ValueError(
                f"conv_dim, conv_kernel, conv_stride: {len(self.conv_dim)}, {len(self.conv_kernel)} and "
                f"{len(self.conv_stride)} layers; they must agree"
            )
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(f"{name}: {getattr(self, name)} do not divide a hidden_size of {self.hidden_size}")
        if self.max_bucket_distance <= self.num_buckets // 4:
            raise ValueError(
                f"max_bucket_distance: must be above a quarter of num_buckets={self.num_buckets}, "
                f"got {self.max_bucket_distance}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        """Read a Transformers `config.json`, whose other keys are ignored.

        What it leaves out of an encoder has Transformers' default, which need not be that of a system's recipe.

        Raises:
            ValueError: The model has a part that is not built here.
        """
        model_type = values.get("model_type", "wav2vec2")
        for key, served in {
            "hidden_act": "gelu",
            "feat_extract_activation": "gelu",
            "add_adapter": False,
            "adapter_attn_dim": None,
            "conv_pos_batch_norm": False,  # would take batch mates in
        }.items():
            if values.get(key, served) != served:
                raise ValueError(f"{key}={values[key]!r} is not supported, only {served!r}")
        known = {field.name: field.default for field in fields(EncoderConfig) if field.name != "model_type"}
        known |= {name: value for name, value in values.items() if _OWN_FIELDS.get(name, model_type) == model_type}
        if model_type == "data2vec-audio":
            known |= {"num_conv_pos_embeddings": values.get("num_conv_pos_embeddings", 5)} | _DATA2VEC
        return super().from_dict(known)

    @property
    def samples_per_frame(self) -> int:
        """Samples from one frame to the next (320: 20 ms)."""
        return math.prod(self.conv_stride)

    @property
    def receptive_field_samples(self) -> int:
        """Samples that one frame of the front end sees (400: 25 ms)."""
        samples = 1
        for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    def count_parts(self, samples: int) -> Parts:
        """Count the multiplications for an utterance of so many samples, had the encoder no compressor."""
        frames, front_end = convolve(samples, 1, self.conv_dim, self.conv_kernel, self.conv_stride)
        c_in, width, inner = self.conv_dim[-1], self.hidden_size, self.intermediate_size
        kernel = self.num_conv_pos_embeddings  # of data2vec-audio, how many there are
        if self.model_type == "data2vec-audio":
            kernel *= self.conv_pos_kernel_size
        positions = width * width // self.num_conv_pos_embedding_groups * kernel
        layer = 4 * width * width + 2 * width * inner
        return Parts(frames, front_end, c_in, c_in * width + positions + self.num_hidden_layers * layer)


class Projected(NamedTuple):
    """The frames of the front end, made ready for the transformer."""

    frames: Packed  # (N, D)
    normalised: Tensor  # (N, C), before the projection: what the quantiser takes
    compressed: Compressed | None


class Encoder(SpeechEncoder):
    """A speech encoder over packed waveforms; its state dict is that of Transformers' base model of its type.

    Args:
        config: Its shape.
    """

    config_class = EncoderConfig
    model_types = tuple(MODEL_CLASSES)
    config: EncoderConfig
    encoder: Transformer

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
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
        )
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
        """Encode what `extract_features` returns; other arguments and errors as of `forward`."""
        projected = self.project(frames, rate=rate, frame_period_ms=frame_period_ms)
        hidden_states = self.encoder(projected.frames)
        return EncoderOutput(hidden_states[-1], hidden_states, projected.compressed)

    def project(
        self,
        frames: Packed,
        *,
        rate: float | Tensor | None = None,
        frame_period_ms: float | Tensor | None = None,
    ) -> Projected:
        """Normalise the front end's frames (N, C), compress them where there is a compressor, and project them.

        Other arguments and errors as of `forward`.
        """
        normalised = Packed(self.feature_projection.normalise(frames.values), frames.layout)
        normalised, compressed = self.compress(normalised, rate=rate, frame_period_ms=frame_period_ms)
        projected = self.feature_projection.project(normalised.values)
        return Projected(Packed(projected, normalised.layout), normalised.values, compressed)

    def extract_features(self, waveforms: Packed) -> Packed:
        """Frames of the front end, (N, conv_dim[-1]), their gradient scaled by `feature_grad_mult`."""
        if waveforms.values.dim() != 2 or waveforms.values.shape[1] != 1:
            raise ValueError(f"waveforms: expected (N, 1) samples, got {tuple(waveforms.values.shape)}")
        values, layout = self.feature_extractor(waveforms)
        return Packed(scale_gradient(values, self.config.feature_grad_mult), layout)

    def frame_layout(self, layout: Layout) -> Layout:
        """Of the front end's frames, from that of the samples."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            layout = layout.after_conv(kernel, stride)
        return layout

    def json_files(self) -> dict[str, dict[str, Any]]:
        """The two configs that Transformers reads."""
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

    def own_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's weights under any of the names that Transformers has given them."""
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


def _as_transformers(config: EncoderConfig) -> dict[str, Any]:
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
        if _OWN_FIELDS.get(name, config.model_type) == config.model_type
        and not (config.model_type == "data2vec-audio" and name in _DATA2VEC)
        and not (config.compressor == "none" and name in COMPRESSOR_FIELDS)
        and not isinstance(value, dict)  # a group of settings of the training
    }
    values |= {"num_feat_extract_layers": len(config.conv_dim), "hidden_act": "gelu", "feat_extract_activation": "gelu"}
    return values
