"""The encoder of wav2vec 2.0 and its relatives: parameter names and folder layout of Transformers' encoders."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastssl.models.compressor import COMPRESSOR_FIELDS, CompressorConfig, compress, make_compressor
from fastssl.models.folder import (
    ACCELERATED_COMPRESSOR,
    COMPRESSOR_FILE,
    COMPRESSOR_PREFIX,
    MODEL_CLASSES,
    SAMPLE_RATE_HZ,
    head_prefix,
    load_matching,
    read_config,
    read_weights,
    write_encoder_weights,
    write_json,
    write_text,
)
from fastssl.models.model_card import ModelCard
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
class EncoderConfig(CompressorConfig):
    """Shape of an encoder; names and defaults of Transformers' configs (the base models).

    A compressor comes before the projection.

    Args:
        hidden_size: Width of the transformer.
        num_hidden_layers: Transformer layers.
        num_attention_heads: Heads of each layer.
        intermediate_size: Width of the feed-forward layers.
        hidden_dropout: After attention, feed-forward and positional embedding.
        attention_dropout: On attention probabilities.
        activation_dropout: Inside the feed-forward layers.
        feat_proj_dropout: After the projection of the front end's frames.
        layerdrop: Probability of skipping a layer in training.
        feat_extract_norm: "group" (first convolution only) or "layer" (every convolution).
        conv_dim: Channels of each convolution.
        conv_kernel: Kernel of each convolution.
        conv_stride: Stride of each convolution.
        conv_bias: Whether convolutions have a bias.
        num_conv_pos_embeddings: Kernel of the positional convolution, in frames; of data2vec-audio, how many there are.
        num_conv_pos_embedding_groups: Its groups.
        do_stable_layer_norm: Norm before each block instead of after it.
        layer_norm_eps: Of the layer norms.
        initializer_range: Standard deviation of initial linear weights.
        do_normalize: Whether waveforms are brought to zero mean and unit variance before the encoder.
        feature_grad_mult: Factor on the gradient that reaches the front end.
        model_type: The architecture, by Transformers' name: wav2vec2, hubert, wavlm, data2vec-audio, unispeech or
            unispeech-sat.
        feat_proj_layer_norm: Whether the front end's frames are normalised before the projection (hubert).
        num_buckets: Buckets of the relative position bias (wavlm).
        max_bucket_distance: The distance in frames from which on all share a bucket (wavlm).
        conv_pos_kernel_size: Kernel of each positional convolution, in frames (data2vec-audio).

    Raises:
        ValueError: Values that do not fit together, or that the architecture does not have.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    feat_proj_dropout: float = 0.0
    layerdrop: float = 0.1
    feat_extract_norm: Literal["group", "layer"] = "group"
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    do_normalize: bool = True
    feature_grad_mult: float = 1.0
    model_type: str = "wav2vec2"
    feat_proj_layer_norm: bool = True
    num_buckets: int = 320
    max_bucket_distance: int = 800
    conv_pos_kernel_size: int = 19

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_CLASSES:
            raise ValueError(f"model_type: {self.model_type!r} is none of {', '.join(MODEL_CLASSES)}")
        for field in fields(EncoderConfig):
            check_value(field.name, getattr(self, field.name), field.default)
        foreign = [field for field in fields(self) if _OWN_FIELDS.get(field.name, self.model_type) != self.model_type]
        fixed = {field.name: field.default for field in foreign}
        if self.model_type == "data2vec-audio":
            fixed |= _DATA2VEC
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}: must be {value!r} for {self.model_type}, got {getattr(self, name)!r}")
        super().__post_init__()
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise ValueError(
                f"conv_dim, conv_kernel, conv_stride: {len(self.conv_dim)}, {len(self.conv_kernel)} and "
                f"{len(self.conv_stride)} layers; they must agree"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        """From a Transformers `config.json`: its other keys are ignored, and what it leaves out has the type's default.

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
        names = {field.name for field in fields(cls) if _OWN_FIELDS.get(field.name, model_type) == model_type}
        known = {name: value for name, value in values.items() if name in names}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        if model_type == "data2vec-audio":
            known = {"num_conv_pos_embeddings": 5} | known | _DATA2VEC
        return cls(**known)

    @property
    def samples_per_frame(self) -> int:
        """Samples from one frame to the next (320: 20 ms)."""
        product = 1
        for stride in self.conv_stride:
            product *= stride
        return product

    @property
    def receptive_field_samples(self) -> int:
        """Samples that one frame of the front end sees (400: 25 ms)."""
        samples = 1
        for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples


def check_value(name: str, value: Any, default: Any) -> None:
    """A config comes from a file, perhaps: a value must be of its default's type, and a size at least 1.

    Raises:
        ValueError: It is not; names the field.
    """
    if isinstance(default, tuple):
        if not isinstance(value, tuple) or not value:
            raise ValueError(f"{name}: must be a list with an entry for each convolution, got {value!r}")
        for entry in value:
            check_value(name, entry, default[0])
        return
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if type(value) not in kinds:
        raise ValueError(f"{name}: must be of type {type(default).__name__}, got {value!r}")
    least = 0 if name in ("num_hidden_layers", "mask_time_min_masks") else 1
    if type(default) is int and value < least:
        raise ValueError(f"{name}: must be at least {least}, got {value}")


class EncoderOutput(NamedTuple):
    """What an encoder returns."""

    features: Packed  # (N, D), the last hidden state
    hidden_states: list[Packed]  # the input of each layer, then the features (after the final norm, where there is one)
    compressed: Compressed | None = None  # what the compressor made of the front end's frames; None where there is none


class Projected(NamedTuple):
    """The frames of the front end, made ready for the transformer."""

    frames: Packed  # (N, D)
    normalised: Tensor  # (N, C), before the projection: what the quantiser takes
    compressed: Compressed | None


class Encoder(nn.Module):
    """A speech encoder over packed waveforms; its state dict is that of Transformers' base model of its type.

    With a compressor the transformer sees fewer frames; how many, a rate or a frame period decides in each call, else
    `compressor.rate` or `compressor.frame_period_ms` (see `nn.SequenceCompressor`).

    Args:
        config: Its shape.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
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
        self.compressor = make_compressor(config, config.conv_dim[-1])
        for module in self.encoder.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self,
        waveforms: Packed,
        *,
        rate: float | Tensor | None = None,
        frame_period_ms: float | Tensor | None = None,
    ) -> EncoderOutput:
        """Encode waveforms.

        Args:
            waveforms: (N, 1) samples at 16 kHz, normalised if the config says `do_normalize`. An utterance shorter
                than the receptive field (400 samples) has no frame.
            rate: Of the compressor, 0 for all frames: a number, or (B,).
            frame_period_ms: The mean period that frames should have instead: a number, or (B,).

        Raises:
            ValueError: The waveforms have another shape; a rate or a period is out of range, or there is no compressor
                that takes one.
        """
        return self.encode(self.extract_features(waveforms), rate=rate, frame_period_ms=frame_period_ms)

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
        normalised, compressed = compress(self.compressor, normalised, rate=rate, frame_period_ms=frame_period_ms)
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

    def save_pretrained(self, folder: str | Path, *, card: ModelCard | None = None) -> None:
        """Write what Transformers and the Hub read: two configs, model.safetensors and README.md.

        Args:
            folder: Made where it is not there.
            card: What README.md says of how the encoder came about; without one, a README.md that is there is kept.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        model_type = self.config.model_type
        dtype = str(self.masked_spec_embed.dtype).removeprefix("torch.")
        config = {"model_type": model_type, "architectures": [MODEL_CLASSES[model_type]], "torch_dtype": dtype}
        write_json(folder / "config.json", config | _as_transformers(self.config))
        preprocessor = {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "sampling_rate": SAMPLE_RATE_HZ,
            "padding_value": 0.0,
            "do_normalize": self.config.do_normalize,
            "return_attention_mask": self.config.feat_extract_norm == "layer",
        }
        write_json(folder / "preprocessor_config.json", preprocessor)
        if card is not None or not (folder / "README.md").exists():
            parameters = sum(parameter.numel() for parameter in self.parameters())
            text = (card or ModelCard()).as_markdown(self.config, parameters=parameters)
            write_text(folder / "README.md", text)
        write_encoder_weights(folder, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Encoder":
        """Open a folder in Transformers' layout: any model of a served type, of whose heads the encoder is taken.

        Raises:
            ValueError: The folder holds no such model, or its weights do not fit its config.
        """
        folder = Path(folder)
        values = read_config(folder)
        try:
            encoder = cls(EncoderConfig.from_dict(values))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        load_encoder_weights(encoder, read_weights(folder), name=str(folder))
        return encoder


def load_encoder_weights(
    encoder: Encoder, weights: Mapping[str, Tensor], *, name: str, fresh_compressor: bool = False
) -> None:
    """Load weights under any of the names that Transformers has given them; heads are left aside.

    Args:
        encoder: Takes the weights.
        weights: By name, of a base model or of a model with a head.
        name: Of the file or model, for errors.
        fresh_compressor: Whether the compressor may stay as it is where the weights have none.

    Raises:
        ValueError: A weight is missing or of another shape, or the encoder has no place for one, as for the compressor
            of an accelerated model.
    """
    own = encoder.state_dict()
    prefix = head_prefix(encoder.config.model_type)
    if not any(key.startswith(prefix) for key in weights):
        prefix = ""
    roots = {key.partition(".")[0] for key in own}
    found = {}
    for key, tensor in weights.items():
        current = key.removeprefix(prefix)
        if key.startswith(prefix) and current.partition(".")[0] in roots:
            current = current.replace("conv.weight_g", "conv.parametrizations.weight.original0")
            current = current.replace("conv.weight_v", "conv.parametrizations.weight.original1")
            found[current] = tensor
    # Models fine-tuned without masking do not store the mask vector.
    found.setdefault("masked_spec_embed", own["masked_spec_embed"])
    if fresh_compressor and not any(key.startswith(COMPRESSOR_PREFIX) for key in found):
        found |= {key: tensor for key, tensor in own.items() if key.startswith(COMPRESSOR_PREFIX)}
    if any(key.startswith(COMPRESSOR_PREFIX) for key in own.keys() - found.keys()):
        raise ValueError(
            f"{name}: weights are missing: those of {COMPRESSOR_FILE}, which Transformers does not write; copy it "
            "from where the encoder was saved by fastssl"
        )
    if put_on := [key for key in weights if f"{ACCELERATED_COMPRESSOR}." in key]:
        raise ValueError(
            f"{name}: has a compressor that `fastssl.accelerate` put on ({put_on[0]}, ...), for which an encoder of "
            "fastssl's has no place; `fastssl.restore` takes it off the model"
        )
    load_matching(encoder, found, name=name)


def _as_transformers(config: EncoderConfig) -> dict[str, Any]:
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
        if _OWN_FIELDS.get(name, config.model_type) == config.model_type
        and not (config.model_type == "data2vec-audio" and name in _DATA2VEC)
        and not (config.compressor == "none" and name in COMPRESSOR_FIELDS)
    }
    values |= {"num_feat_extract_layers": len(config.conv_dim), "hidden_act": "gelu", "feat_extract_activation": "gelu"}
    return values
