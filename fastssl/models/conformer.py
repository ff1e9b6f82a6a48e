"""The encoder of BEST-RQ: log-mel frames, subsampled to 25 Hz, and a Conformer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.models.bounds import bounded
from fastssl.models.compression import make_compressor
from fastssl.models.config import Parts, SpeechEncoderConfig
from fastssl.models.folder import CONFORMER, head_prefix
from fastssl.models.multiplications import convolve
from fastssl.models.speech_encoder import EncoderOutput, SpeechEncoder
from fastssl.nn import functional
from fastssl.nn.conformer import Conformer, ConformerLayer
from fastssl.nn.feature_extractor import ConvLayer
from fastssl.nn.linear import PackedLinear
from fastssl.nn.log_mel import HOP_SAMPLES, WINDOW_SAMPLES, LogMel, normalize_over_time
from fastssl.packing import Layout, Packed

#: Of both convolutions that subsample.
_KERNEL, _STRIDE = 3, 2
#: Mel frames from one frame of the encoder to the next, and mel frames that one sees.
MEL_FRAMES_PER_FRAME, _MEL_FRAMES_SEEN = _STRIDE**2, _KERNEL + _STRIDE * (_KERNEL - 1)


@dataclass(frozen=True)
class ConformerConfig(SpeechEncoderConfig):
    """Shape of a Conformer encoder; the defaults are the base size.

    A compressor comes after the subsampling.

    Args:
        num_attention_heads: Heads of each layer; their width must be even.
        intermediate_size: Width of the feed-forward layers, of which each layer has two.
        conv_dim: Channels of the two convolutions that subsample.
        do_normalize: Whether waveforms are brought to zero mean and unit variance before the encoder. It normalises its
            log-mel frames by itself, so that the level of a recording matters little.
        model_type: "best-rq".
        num_mel_bins: Mel bands of the front end.
        conv_depthwise_kernel_size: Frames of the depthwise convolutions, odd.
    """

    hidden_size: int = bounded(576, least=2)
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    layerdrop: float = 0.0
    conv_dim: tuple[int, ...] = (512, 512)
    do_normalize: bool = False
    model_type: str = CONFORMER
    num_mel_bins: int = bounded(80, least=1)
    conv_depthwise_kernel_size: int = bounded(31, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_type != CONFORMER:
            raise ValueError(f"model_type: must be {CONFORMER!r} for a Conformer, got {self.model_type!r}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} do not divide a hidden_size of {self.hidden_size} "
                "into even widths"
            )
        if len(self.conv_dim) != 2:
            raise ValueError(f"conv_dim: must have two entries, got {self.conv_dim}")
        if self.conv_depthwise_kernel_size % 2 == 0:
            raise ValueError(f"conv_depthwise_kernel_size: must be odd, got {self.conv_depthwise_kernel_size}")

    @property
    def samples_per_frame(self) -> int:
        """Samples from one frame to the next (640: 40 ms)."""
        return HOP_SAMPLES * MEL_FRAMES_PER_FRAME

    @property
    def receptive_field_samples(self) -> int:
        """Samples that one frame of the front end sees (1360: 85 ms), but for the normalisation over the utterance."""
        return WINDOW_SAMPLES + (_MEL_FRAMES_SEEN - 1) * HOP_SAMPLES

    def count_parts(self, samples: int) -> Parts:
        """Count the multiplications for an utterance of so many samples, had the encoder no compressor."""
        mel = max(0, (samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1)
        frames, front_end = convolve(mel, self.num_mel_bins, self.conv_dim, (_KERNEL,) * 2, (_STRIDE,) * 2)
        width, inner = self.hidden_size, self.intermediate_size
        convolutions = 3 * width * width + width * self.conv_depthwise_kernel_size
        layer = 4 * width * width + 4 * width * inner + convolutions
        front_end += frames * self.conv_dim[-1] * width
        return Parts(frames, front_end, width, self.num_hidden_layers * layer)


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


class ConformerEncoder(SpeechEncoder):
    """A speech encoder over packed waveforms, with the interface of `Encoder`.

    Args:
        config: Its shape.
    """

    config_class = ConformerConfig
    model_types = (CONFORMER,)
    config: ConformerConfig
    encoder: Conformer

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__(config)
        self.log_mel = LogMel(config.num_mel_bins)
        self.subsampling = Subsampling(
            config.num_mel_bins, config.conv_dim, config.hidden_size, dropout=config.hidden_dropout
        )
        self.compressor = None if config.compressor == "none" else make_compressor(config, config.hidden_size)
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
        frames, compressed = self.compress(self.subsampling(mel), rate=rate, frame_period_ms=frame_period_ms)
        hidden_states = self.encoder(frames, layer_drop=layer_drop)
        return EncoderOutput(hidden_states[-1], hidden_states, compressed)

    def json_files(self) -> dict[str, dict[str, Any]]:
        """A config of fastssl's own."""
        return {"config.json": asdict(self.config) | {"library": "fastssl"}}

    def own_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoder's weights; without the prefix of a model with a head, all of them."""
        prefix = head_prefix(CONFORMER)
        if not any(key.startswith(prefix) for key in weights):
            return dict(weights)
        return {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
