"""The encoder of BEST-RQ: log-mel frames, subsampled to 25 Hz, and a Conformer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastssl.models.compressor import CompressorConfig, compress, make_compressor
from fastssl.models.encoder import EncoderOutput, check_value
from fastssl.models.folder import (
    COMPRESSOR_PREFIX,
    CONFORMER,
    head_prefix,
    load_matching,
    read_config,
    read_weights,
    write_encoder_weights,
    write_json,
    write_text,
)
from fastssl.models.model_card import ModelCard
from fastssl.nn import functional
from fastssl.nn.conformer import Conformer, ConformerLayer
from fastssl.nn.feature_extractor import ConvLayer
from fastssl.nn.linear import PackedLinear
from fastssl.nn.log_mel import HOP_SAMPLES, WINDOW_SAMPLES, LogMel, normalize_over_time
from fastssl.packing import Layout, Packed

if TYPE_CHECKING:
    from typing_extensions import Self

#: Of both convolutions that subsample.
_KERNEL, _STRIDE = 3, 2
#: Mel frames from one frame of the encoder to the next, and mel frames that one sees.
MEL_FRAMES_PER_FRAME, _MEL_FRAMES_SEEN = _STRIDE**2, _KERNEL + _STRIDE * (_KERNEL - 1)


@dataclass(frozen=True)
class ConformerConfig(CompressorConfig):
    """Shape of a Conformer encoder; the defaults are the base size. Names as in `EncoderConfig`.

    A compressor comes behind the subsampling.

    Args:
        hidden_size: Width of the layers.
        num_hidden_layers: Layers.
        num_attention_heads: Heads of each layer; their width must be even.
        intermediate_size: Width of the feed-forward layers, of which each layer has two.
        hidden_dropout: After each block and after the subsampling.
        attention_dropout: On attention probabilities.
        activation_dropout: Inside the feed-forward layers.
        layerdrop: Probability of skipping a layer in training.
        num_mel_bins: Mel bands of the front end.
        conv_dim: Channels of the two convolutions that subsample.
        conv_depthwise_kernel_size: Frames of the depthwise convolutions, odd.
        layer_norm_eps: Of the layer norms.
        do_normalize: Whether waveforms are brought to zero mean and unit variance before the encoder. It normalises its
            log-mel frames by itself, so that the level of a recording matters little.
        model_type: "best-rq".

    Raises:
        ValueError: Values that no encoder has, or that do not fit together.
    """

    hidden_size: int = 576
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    layerdrop: float = 0.0
    num_mel_bins: int = 80
    conv_dim: tuple[int, ...] = (512, 512)
    conv_depthwise_kernel_size: int = 31
    layer_norm_eps: float = 1e-5
    do_normalize: bool = False
    model_type: str = CONFORMER

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in fields(self):
            check_value(field.name, getattr(self, field.name), field.default)
        if self.model_type != CONFORMER:
            raise ValueError(f"model_type: must be {CONFORMER!r} for a Conformer, got {self.model_type!r}")
        for name in ("hidden_dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must be in [0, 1), got {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} do not divide a hidden_size of {self.hidden_size} "
                "into even widths"
            )
        if len(self.conv_dim) != 2:
            raise ValueError(f"conv_dim: must have two entries, got {self.conv_dim}")
        if self.conv_depthwise_kernel_size % 2 == 0:
            raise ValueError(f"conv_depthwise_kernel_size: must be odd, got {self.conv_depthwise_kernel_size}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        """From a `config.json`: other keys are ignored, and what it leaves out has its default.

        Raises:
            ValueError: A value does not serve.
        """
        names = {field.name for field in fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**known)

    @property
    def conv_kernel(self) -> tuple[int, ...]:
        """Mel frames, or frames of the first, that each convolution sees."""
        return (_KERNEL,) * len(self.conv_dim)

    @property
    def conv_stride(self) -> tuple[int, ...]:
        """Of each convolution."""
        return (_STRIDE,) * len(self.conv_dim)

    @property
    def samples_per_frame(self) -> int:
        """Samples from one frame to the next (640: 40 ms)."""
        return HOP_SAMPLES * MEL_FRAMES_PER_FRAME

    @property
    def receptive_field_samples(self) -> int:
        """Samples that one frame of the front end sees (1360: 85 ms), but for the normalisation over the utterance."""
        return WINDOW_SAMPLES + (_MEL_FRAMES_SEEN - 1) * HOP_SAMPLES


class Subsampling(nn.Module):
    """Two convolutions that leave one frame of four, and a linear map to the model's width.

    Args:
        bands: Channels in.
        channels: Of the two convolutions.
        width: D, channels out.
        dropout: After the linear map.
    """

    def __init__(self, bands: int, channels: tuple[int, ...], width: int, *, dropout: float) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList(
            ConvLayer(c_in, c_out, kernel=_KERNEL, stride=_STRIDE, bias=True, norm="layer")
            for c_in, c_out in zip((bands, *channels[:-1]), channels, strict=True)
        )
        self.projection = PackedLinear(channels[-1], width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, mel: Packed) -> Packed:
        """Frame t of (N_out, D) is made of mel frames 4t to 4t + 6 of (N, bands)."""
        frames = Packed(mel.values.to(next(self.conv_layers.parameters()).dtype), mel.layout)
        values, layout = functional.front_end(self.conv_layers, frames)
        return Packed(functional.project(self, values), layout)


def subsampled_layout(layout: Layout) -> Layout:
    """Of the encoder's frames, from that of its mel frames."""
    return layout.after_conv(_KERNEL, _STRIDE).after_conv(_KERNEL, _STRIDE)


class ConformerEncoder(nn.Module):
    """A speech encoder over packed waveforms, with the interface of `Encoder`.

    Args:
        config: Its shape.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.log_mel = LogMel(config.num_mel_bins)
        self.subsampling = Subsampling(
            config.num_mel_bins, config.conv_dim, config.hidden_size, dropout=config.hidden_dropout
        )
        self.compressor = make_compressor(config, config.hidden_size)
        layers = [
            ConformerLayer(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                kernel=config.conv_depthwise_kernel_size,
                dropout=config.hidden_dropout,
                attention_dropout=config.attention_dropout,
                activation_dropout=config.activation_dropout,
                eps=config.layer_norm_eps,
            )
            for _ in range(config.num_hidden_layers)
        ]
        head_width = config.hidden_size // config.num_attention_heads
        self.encoder = Conformer(layers, head_width=head_width, layer_drop=config.layerdrop)
        for part in (self.subsampling, self.encoder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
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
                than the receptive field (1360 samples) has no frame.
            rate: Of the compressor, 0 for all frames: a number, or (B,).
            frame_period_ms: The mean period that frames should have instead: a number, or (B,).

        Raises:
            ValueError: The waveforms have another shape; a rate or a period is out of range, or there is no compressor
                that takes one.
        """
        return self.encode(self.extract_features(waveforms), rate=rate, frame_period_ms=frame_period_ms)

    def extract_features(self, waveforms: Packed) -> Packed:
        """Log-mel frames every 10 ms, (N, num_mel_bins), of zero mean and unit variance over each utterance."""
        if waveforms.values.dim() != 2 or waveforms.values.shape[1] != 1:
            raise ValueError(f"waveforms: expected (N, 1) samples, got {tuple(waveforms.values.shape)}")
        return normalize_over_time(self.log_mel(waveforms))

    def encode(
        self,
        mel: Packed,
        *,
        rate: float | Tensor | None = None,
        frame_period_ms: float | Tensor | None = None,
        layer_drop: torch.Generator | None = None,
    ) -> EncoderOutput:
        """Encode what `extract_features` returns; `layer_drop` is a CPU generator for the layers to skip.

        Other arguments and errors as of `forward`.
        """
        frames, compressed = compress(
            self.compressor, self.subsampling(mel), rate=rate, frame_period_ms=frame_period_ms
        )
        hidden_states = self.encoder(frames, layer_drop=layer_drop)
        return EncoderOutput(hidden_states[-1], hidden_states, compressed)

    def save_pretrained(self, folder: str | Path, *, card: ModelCard | None = None) -> None:
        """Write config.json, model.safetensors and README.md, in a layout of fastssl's own.

        Args:
            folder: Made where it is not there.
            card: What README.md says of how the encoder came about; without one, a README.md that is there is kept.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", asdict(self.config) | {"library": "fastssl"})
        if card is not None or not (folder / "README.md").exists():
            parameters = sum(parameter.numel() for parameter in self.parameters())
            write_text(folder / "README.md", (card or ModelCard()).as_markdown(self.config, parameters=parameters))
        write_encoder_weights(folder, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ConformerEncoder":
        """Open a folder that `save_pretrained` wrote, or one of a model that holds the encoder.

        Raises:
            ValueError: The folder holds no such model, or its weights do not fit its config.
        """
        folder = Path(folder)
        values = read_config(folder, model_types=[CONFORMER])
        try:
            encoder = cls(ConformerConfig.from_dict(values))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        load_conformer_weights(encoder, read_weights(folder), name=str(folder))
        return encoder


def load_conformer_weights(
    encoder: ConformerEncoder, weights: Mapping[str, Tensor], *, name: str, fresh_compressor: bool = False
) -> None:
    """Load the encoder's weights; a head's are left aside.

    Args:
        encoder: Takes the weights.
        weights: By name, of an encoder or of a model with a head.
        name: Of the file or model, for errors.
        fresh_compressor: Whether the compressor may stay as it is where the weights have none.

    Raises:
        ValueError: A weight is missing or of another shape, or the encoder has no place for one.
    """
    prefix = head_prefix(CONFORMER)
    if any(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    if fresh_compressor and not any(key.startswith(COMPRESSOR_PREFIX) for key in weights):
        own = encoder.state_dict()
        weights = {**weights, **{key: own[key] for key in own if key.startswith(COMPRESSOR_PREFIX)}}
    load_matching(encoder, weights, name=name)
