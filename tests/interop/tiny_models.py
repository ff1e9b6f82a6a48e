"""Small models of every architecture with random weights, and batches for them."""

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_codevectors_per_group": 20,
    "codevector_dim": 16,
    "proj_codevector_dim": 24,
    "vocab_size": 11,
    "num_labels": 5,
    "classifier_proj_size": 20,
    "tdnn_dim": [16, 16, 24],
    "tdnn_kernel": [3, 3, 1],
    "tdnn_dilation": [1, 2, 1],
    "xvector_output_dim": 12,
    "mask_time_length": 3,
}
LARGE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
ADAPTER = {"add_adapter": True, "output_hidden_size": 40, "num_adapter_layers": 2}
NO_DROPOUT = dict.fromkeys(
    (
        "hidden_dropout",
        "attention_dropout",
        "activation_dropout",
        "feat_proj_dropout",
        "final_dropout",
        "layerdrop",
        "feat_quantizer_dropout",
    ),
    0.0,
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2 base": ("Wav2Vec2", {}),
    "wav2vec2 large": ("Wav2Vec2", LARGE),
    "wav2vec2 base, layer norm": ("Wav2Vec2", {"feat_extract_norm": "layer", "conv_bias": True}),
    "wav2vec2 base, adapter": ("Wav2Vec2", ADAPTER),
    "wav2vec2 large, adapters": ("Wav2Vec2", LARGE | ADAPTER | {"adapter_attn_dim": 8, "output_hidden_size": 48}),
    "hubert base": ("Hubert", {}),
    "hubert large": ("Hubert", LARGE),
    "hubert without projection norm": ("Hubert", {"feat_proj_layer_norm": False}),
    "wavlm base": ("WavLM", {"num_buckets": 20, "max_bucket_distance": 25}),
    "wavlm large": ("WavLM", LARGE | {"num_buckets": 20, "max_bucket_distance": 25}),
    "data2vec": ("Data2VecAudio", {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 7}),
    "unispeech base": ("UniSpeech", {}),
    "unispeech large": ("UniSpeech", LARGE),
    "unispeech-sat base": ("UniSpeechSat", {}),
    "unispeech-sat large": ("UniSpeechSat", LARGE),
}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
BATCHES = {"single": [6000], "equal": [5000, 5000], "mixed": [5000, 900, 3300], "extreme": [30000, 400, 719, 720]}


def make(variant: str, head: str = "Model", **options: Any) -> Any:
    family, settings = VARIANTS[variant]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY | NO_DROPOUT | settings | options)
    return getattr(transformers, f"{family}{head}")(config).eval()


def batch_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    waveforms = torch.randn(len(lengths), max(lengths), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return waveforms * mask, mask


def assert_close(found: Tensor, expected: Tensor, relative: float, what: str = "") -> None:
    """In max norm."""
    assert found.shape == expected.shape, what
    assert (found - expected).abs().max() <= relative * expected.abs().max(), what
