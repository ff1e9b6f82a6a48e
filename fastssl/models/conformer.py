"""The encoder of BEST-RQ: log-mel frames, subsampled to 25 Hz, and a Conformer (arXiv 2202.01855)."""

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
from fastssl.nn.log_mel import HOP_SAMPLES, WINDOW_SAMPLES, LogMel, mel_layout, normalize_over_time
from fastssl.packing import Layout, Packed
from fastssl.reading import brief

#: Kernel size and stride, in frames, of both subsampling convolutions.
_KERNEL, _STRIDE = 3, 2
#: Mel frames from one encoder frame to the next, and mel frames that one encoder frame depends on.
MEL_FRAMES_PER_FRAME, _MEL_FRAMES_SEEN = _STRIDE**2, _KERNEL + _STRIDE * (_KERNEL - 1)


@dataclass(frozen=True)
class ConformerConfig(SpeechEncoderConfig):
    """Shape of a Conformer encoder; the defaults give the base size.

    The compressor, if any, sits between the subsampling and the Conformer layers.

    Args:
        num_attention_heads: Attention heads per layer; hidden_size / num_attention_heads must be an even integer.
        intermediate_size: Inner width of the feed-forward blocks; each layer has two.
        conv_dim: Output channels of the two subsampling convolutions.
        do_normalize: Scale each waveform to zero mean and unit variance before the encoder. This matters little,
            because the encoder normalises its log-mel frames over each utterance.
        model_type: Name of the architecture in `config.json`; must be "best-rq".
        num_mel_bins: Number of mel bands.
        conv_depthwise_kernel_size: Kernel size of the depthwise convolutions, in frames; must be odd.

    Raises:
        ValueError: A value is out of bounds, or values do not fit together.
    """

    hidden_size: int = bounded(576, least=2, ceiling=65_536)
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    layerdrop: float = 0.0
    conv_dim: tuple[int, ...] = (512, 512)
    do_normalize: bool = False
    model_type: str = CONFORMER
    num_mel_bins: int = bounded(80, least=1, ceiling=1024)
    conv_depthwise_kernel_size: int = bounded(31, least=1, ceiling=65_535)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_type != CONFORMER:
            raise ValueError(f"model_type: must be {CONFORMER!r} for a Conformer, got {brief(self.model_type)}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"num_attention_heads: must divide hidden_size={self.hidden_size} into even widths, "
                f"got {self.num_attention_heads}"
            )
        if len(self.conv_dim) != 2:
            raise ValueError(f"conv_dim: must have two entries, one per convolution, got {self.conv_dim}")
        if self.conv_depthwise_kernel_size % 2 == 0:
            raise ValueError(f"conv_depthwise_kernel_size: must be odd, got {self.conv_depthwise_kernel_size}")

    @property
    def samples_per_frame(self) -> int:
        """Number of samples, at 16 kHz, from one frame to the next: 640 (40 ms)."""
        return HOP_SAMPLES * MEL_FRAMES_PER_FRAME

    @property
    def receptive_field_samples(self) -> int:
        """Number of samples, at 16 kHz, that one frame is computed from: 1360 (85 ms).

        In addition, the normalisation of the log-mel frames makes every frame depend on the whole utterance.
        """
        return WINDOW_SAMPLES + (_MEL_FRAMES_SEEN - 1) * HOP_SAMPLES

    def count_parts(self, samples: int) -> Parts:
        """Count the multiply-accumulates for one utterance, as if the encoder had no compressor.

        Args:
            samples: Length of the utterance, in samples at 16 kHz.
        """
        mel = max(0, (samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1)
        frames, front_end = convolve(mel, self.num_mel_bins, self.conv_dim, (_KERNEL,) * 2, (_STRIDE,) * 2)
        width, inner = self.hidden_size, self.intermediate_size
        convolutions = 3 * width * width + width * self.conv_depthwise_kernel_size
        layer = 4 * width * width + 4 * width * inner + convolutions
        front_end += frames * self.conv_dim[-1] * width
        return Parts(frames, front_end, width, self.num_hidden_layers * layer)


class Subsampling(nn.Module):
    """Two strided convolutions that keep one frame in four, and a linear map to the width of the layers.

    Args:
        bands: Number of mel bands of the input frames.
        channels: Output channels of the two convolutions.
        width: D, the number of channels of the output.
        dropout: Probability of dropout after the linear map.
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
        """Subsample mel frames. Output frame t of an utterance depends on its mel frames 4t to 4t + 6.

        Args:
            mel: (N, bands) mel frames, one every 10 ms.

        Returns:
            (N_out, D) frames, one every 40 ms.
        """
        frames = Packed(mel.values.to(next(self.conv_layers.parameters()).dtype), mel.layout)
        values, layout = functional.front_end(self.conv_layers, frames)
        return Packed(functional.project(self, values), layout)


def subsampled_layout(layout: Layout) -> Layout:
    """Compute the layout of the encoder's frames from the layout of its mel frames."""
    return layout.after_conv(_KERNEL, _STRIDE).after_conv(_KERNEL, _STRIDE)


class ConformerEncoder(SpeechEncoder):
    """The Conformer encoder of BEST-RQ for packed waveforms, with the same interface as `Encoder`.

    Args:
        config: Shape of the encoder.
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

    def _front_end(self, samples: Packed) -> Packed:
        # Log-mel frames (N_mel, num_mel_bins), one every 10 ms; each band has zero mean and unit variance.
        samples.layout.plan(self._ask)
        return normalize_over_time(self.log_mel(samples))

    def _ask(self, layout: Layout) -> Layout:
        mel = mel_layout(layout)
        mel.ask_for_indices()
        frames = subsampled_layout(mel)
        (self.encoder if self.compressor is None else self.compressor).ask(frames)
        return frames

    def encode(
        self,
        mel: Packed,
        *,
        rate: float | Tensor | None = None,
        frame_period_ms: float | Tensor | None = None,
        layer_drop: torch.Generator | None = None,
    ) -> EncoderOutput:
        """Encode the result of `extract_features`; the errors are those of `forward`.

        Args:
            mel: (N_mel, num_mel_bins) normalised log-mel frames.
            rate: As in `forward`.
            frame_period_ms: As in `forward`.
            layer_drop: CPU generator that decides which layers training skips; None uses PyTorch's global generator.
        """
        frames, compressed = self.compress(self.subsampling(mel), rate=rate, frame_period_ms=frame_period_ms)
        frames.layout.plan(self.encoder.ask)
        hidden_states = self.encoder(frames, layer_drop=layer_drop)
        return EncoderOutput(hidden_states[-1], hidden_states, compressed)

    def json_files(self) -> dict[str, dict[str, Any]]:
        """Return the content of config.json, in fastssl's own format."""
        return {"config.json": asdict(self.config) | {"library": "fastssl"}}

    def own_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pick the encoder's weights: those with the prefix `best_rq.`, or all weights if none has this prefix.

        Args:
            weights: Tensors of an encoder, or of a model with a head, by name.

        Returns:
            The encoder's tensors by the names of this module's state dict.
        """
        prefix = head_prefix(CONFORMER)
        if not any(key.startswith(prefix) for key in weights):
            return dict(weights)
        return {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
