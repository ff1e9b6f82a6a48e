"""The encoder that every system here pre-trains: parameter names and folder layout of Transformers' Wav2Vec2Model."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastssl.nn.feature_extractor import FeatureExtractor, FeatureProjection, scale_gradient
from fastssl.nn.transformer import Transformer
from fastssl.packing import Packed

if TYPE_CHECKING:
    from typing_extensions import Self

SAMPLE_RATE_HZ = 16000


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder; names and defaults of Transformers' `Wav2Vec2Config` (the base model).

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
        num_conv_pos_embeddings: Kernel of the positional convolution, in frames.
        num_conv_pos_embedding_groups: Its groups.
        do_stable_layer_norm: Norm before each block instead of after it.
        layer_norm_eps: Of the layer norms.
        initializer_range: Standard deviation of initial linear weights.
        do_normalize: Whether waveforms are brought to zero mean and unit variance before the encoder.
        feature_grad_mult: Factor on the gradient that reaches the front end.
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

    def __post_init__(self) -> None:
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise ValueError(
                f"conv_dim, conv_kernel, conv_stride: {len(self.conv_dim)}, {len(self.conv_kernel)} and "
                f"{len(self.conv_stride)} layers; they must agree"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        """From a Transformers `config.json`, whose other keys are ignored.

        Raises:
            ValueError: The model has a part that is not built here.
        """
        for key, served in {
            "hidden_act": "gelu",
            "feat_extract_activation": "gelu",
            "add_adapter": False,
            "adapter_attn_dim": None,
        }.items():
            if values.get(key, served) != served:
                raise ValueError(f"config: {key}={values[key]!r} is not supported, only {served!r}")
        names = {field.name for field in fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
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


class EncoderOutput(NamedTuple):
    """What an encoder returns."""

    features: Packed  # (N, D), the last hidden state
    hidden_states: list[Packed]  # the input of each layer, then the features (after the final norm, where there is one)


class Encoder(nn.Module):
    """wav2vec 2.0 encoder over packed waveforms; its state dict is that of Transformers' `Wav2Vec2Model`.

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
            config.conv_dim[-1], config.hidden_size, eps=config.layer_norm_eps, dropout=config.feat_proj_dropout
        )
        self.masked_spec_embed = nn.Parameter(torch.rand(config.hidden_size))
        self.encoder = Transformer(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            positional_kernel=config.num_conv_pos_embeddings,
            positional_groups=config.num_conv_pos_embedding_groups,
            pre_norm=config.do_stable_layer_norm,
            dropout=config.hidden_dropout,
            attention_dropout=config.attention_dropout,
            activation_dropout=config.activation_dropout,
            layer_drop=config.layerdrop,
            eps=config.layer_norm_eps,
        )
        for module in self.encoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
                nn.init.zeros_(module.bias)

    def forward(self, waveforms: Packed) -> EncoderOutput:
        """Encode waveforms.

        Args:
            waveforms: (N, 1) samples at 16 kHz, normalised if the config says `do_normalize`. An utterance shorter
                than the receptive field (400 samples) has no frame.
        """
        features = self.extract_features(waveforms)
        projected, _ = self.feature_projection(features.values)
        hidden_states = self.encoder(Packed(projected, features.layout))
        return EncoderOutput(hidden_states[-1], hidden_states)

    def extract_features(self, waveforms: Packed) -> Packed:
        """Frames of the front end, (N, conv_dim[-1]), their gradient scaled by `feature_grad_mult`."""
        if waveforms.values.dim() != 2 or waveforms.values.shape[1] != 1:
            raise ValueError(f"waveforms: expected (N, 1) samples, got {tuple(waveforms.values.shape)}")
        values, layout = self.feature_extractor(waveforms)
        return Packed(scale_gradient(values, self.config.feature_grad_mult), layout)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and preprocessor_config.json, as Transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": "wav2vec2", "architectures": ["Wav2Vec2Model"], "torch_dtype": "float32"}
        config |= _as_transformers(self.config)
        _write_json(folder / "config.json", config)
        preprocessor = {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "sampling_rate": SAMPLE_RATE_HZ,
            "padding_value": 0.0,
            "do_normalize": self.config.do_normalize,
            "return_attention_mask": self.config.feat_extract_norm == "layer",
        }
        _write_json(folder / "preprocessor_config.json", preprocessor)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        partial = folder / "model.safetensors.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Encoder":
        """Open a folder in Transformers' layout: any wav2vec 2.0 model, of whose heads the encoder is taken.

        Raises:
            ValueError: The folder holds no such model, or its weights do not fit its config.
        """
        folder = Path(folder)
        values = read_config(folder)
        encoder = cls(EncoderConfig.from_dict(values))
        load_encoder_weights(encoder, read_weights(folder), name=str(folder))
        return encoder


def load_encoder(path_or_model: str | Path | nn.Module) -> Encoder:
    """Open an encoder, in evaluation mode.

    Args:
        path_or_model: A run of `fastssl pretrain`, a folder in Transformers' layout (wav2vec 2.0), or a Transformers
            wav2vec 2.0 model, whose weights are copied.

    Raises:
        ValueError: It is none of these; says what was looked for.
    """
    if isinstance(path_or_model, Encoder):
        return path_or_model.eval()
    if isinstance(path_or_model, nn.Module):
        return _from_transformers_model(path_or_model).eval()
    folder = Path(path_or_model)
    if (folder / "encoder" / "config.json").exists():
        folder = folder / "encoder"
    return Encoder.from_pretrained(folder).eval()


def _from_transformers_model(model: nn.Module) -> Encoder:
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "wav2vec2":
        raise ValueError(f"path_or_model: {type(model).__name__} is not a Transformers wav2vec 2.0 model")
    encoder = Encoder(EncoderConfig.from_dict(config.to_dict()))  # type: ignore[union-attr]
    load_encoder_weights(encoder, model.state_dict(), name=type(model).__name__)
    return encoder.to(next(model.parameters()).device)


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a folder in Transformers' layout, with `do_normalize` of its preprocessor."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder}: no model there; looked for {path} and {folder / 'encoder' / 'config.json'}")
    values: dict[str, Any] = json.loads(path.read_text())
    if values.get("model_type") != "wav2vec2":
        raise ValueError(f"{path}: model_type is {values.get('model_type')!r}, expected 'wav2vec2'")
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.exists():
        values["do_normalize"] = json.loads(preprocessor.read_text()).get("do_normalize", True)
    return values


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder in Transformers' layout."""
    path = folder / "model.safetensors"
    if path.exists():
        return load_file(path)
    path = folder / "pytorch_model.bin"
    if path.exists():
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return weights
    raise ValueError(f"{folder}: no weights there; looked for model.safetensors and pytorch_model.bin")


def load_encoder_weights(encoder: Encoder, weights: Mapping[str, Tensor], *, name: str) -> None:
    """Load weights under any of the names that Transformers has given them; heads are left aside.

    Raises:
        ValueError: A weight is missing or of another shape.
    """
    own = encoder.state_dict()
    prefix = "wav2vec2." if any(key.startswith("wav2vec2.") for key in weights) else ""
    found = {}
    for key in own:
        old_key = key.replace("parametrizations.weight.original0", "weight_g")
        old_key = old_key.replace("parametrizations.weight.original1", "weight_v")
        for candidate in (prefix + key, prefix + old_key):
            if candidate in weights:
                found[key] = weights[candidate]
    # Models fine-tuned without masking do not store the mask vector.
    found.setdefault("masked_spec_embed", own["masked_spec_embed"])
    missing = sorted(own.keys() - found.keys())
    if missing:
        raise ValueError(f"{name}: weights are missing: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    for key, tensor in found.items():
        if tensor.shape != own[key].shape:
            raise ValueError(f"{name}: {key} has shape {tuple(tensor.shape)}, expected {tuple(own[key].shape)}")
    encoder.load_state_dict(found)


def _as_transformers(config: EncoderConfig) -> dict[str, Any]:
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    values |= {"num_feat_extract_layers": len(config.conv_dim), "hidden_act": "gelu", "feat_extract_activation": "gelu"}
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
