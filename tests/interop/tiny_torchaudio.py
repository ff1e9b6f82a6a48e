"""Make tiny torchaudio encoders and batches. Importing this module skips a test file if torchaudio does not work."""

from typing import Any

import pytest
import torch
from torch import Tensor

try:
    from torchaudio import models as models
except (ImportError, OSError, RuntimeError) as error:  # torchaudio does not load with some versions of torch
    pytest.skip(f"torchaudio does not import here: {error}", allow_module_level=True)

TINY: dict[str, Any] = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2,
    "extractor_conv_bias": False,
    "encoder_embed_dim": 48,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 3,
    "encoder_num_heads": 4,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 64,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.0,
    "aux_num_out": None,
}
LARGE = {"extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True}
WAVLM = {"encoder_num_buckets": 20, "encoder_max_distance": 25}
VARIANTS: dict[str, dict[str, Any]] = {
    "wav2vec2 base": {},
    "wav2vec2 large": LARGE,
    "wav2vec2 base, layer norm": {"extractor_mode": "layer_norm", "encoder_pos_conv_kernel": 15},
    "wav2vec2 large, group norm": LARGE | {"extractor_mode": "group_norm"},
    "wav2vec2 base, logits": {"aux_num_out": 7},
    "wavlm base": WAVLM,
    "wavlm large": WAVLM | LARGE,
}


def make(variant: str, **options: Any) -> Any:
    settings = VARIANTS[variant]
    torch.manual_seed(0)
    factory = models.wavlm_model if variant.startswith("wavlm") else models.wav2vec2_model
    return factory(**(TINY | settings | options)).eval()


def batch_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Return waveforms padded with noise, which must not affect any output, and their lengths."""
    generator = torch.Generator().manual_seed(len(lengths))
    return torch.randn(len(lengths), max(lengths), generator=generator), torch.tensor(lengths)
