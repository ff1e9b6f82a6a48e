"""Make tiny, randomly initialised models of other libraries and batches for them, and compare results."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastssl.packing import Packed

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_length": 3,
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
}
LARGE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
BUCKETS = {"num_buckets": 20, "max_bucket_distance": 25}
#: Name of a variant -> prefix of Transformers' class names, and changes to TINY.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2 base": ("Wav2Vec2", {}),
    "wav2vec2 large": ("Wav2Vec2", LARGE),
    "wav2vec2 base, layer norm": ("Wav2Vec2", {"feat_extract_norm": "layer", "conv_bias": True}),
    "hubert base": ("Hubert", {}),
    "hubert large": ("Hubert", LARGE),
    "hubert without projection norm": ("Hubert", {"feat_proj_layer_norm": False}),
    "wavlm base": ("WavLM", BUCKETS),
    "wavlm large": ("WavLM", LARGE | BUCKETS),
    "data2vec": ("Data2VecAudio", {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 7}),
    "data2vec, bias, even kernel": (
        "Data2VecAudio",
        {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 8, "conv_bias": True},
    ),
    "unispeech base": ("UniSpeech", {}),
    "unispeech large": ("UniSpeech", LARGE),
    "unispeech-sat base": ("UniSpeechSat", {}),
    "unispeech-sat large": ("UniSpeechSat", LARGE),
}
ADAPTER = {"add_adapter": True, "output_hidden_size": 40, "num_adapter_layers": 2}
#: Variants with adapters, which pre-training does not have.
WITH_ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2 base, adapter": ("Wav2Vec2", ADAPTER),
    "wav2vec2 large, adapters": ("Wav2Vec2", LARGE | ADAPTER | {"adapter_attn_dim": 8, "output_hidden_size": 48}),
}
#: Variants of SEW, which refuses utterances of less than LEAST_SQUEEZED samples: it squeezes two frames into one.
LEAST_SQUEEZED = 720
SQUEEZED: dict[str, tuple[str, dict[str, Any]]] = {
    "sew base": ("SEW", {"conv_dim": [32] * 13}),
    "sew, layer norm, odd kernel, without projection": (
        "SEW",
        {
            "conv_dim": [32] * 12 + [48],
            "feat_extract_norm": "layer",
            "conv_bias": True,
            "num_conv_pos_embeddings": 15,
        },
    ),
}
_ROTARY = {"position_embeddings_type": "rotary", "conv_depthwise_kernel_size": 7}
#: Variants of the Conformer, which are accelerated in evaluation only.
CONFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "conformer base": ("Wav2Vec2Conformer", _ROTARY | {"hidden_act": "swish"}),
    "conformer, layer norm, silu, adapter": (
        "Wav2Vec2Conformer",
        _ROTARY | ADAPTER | {"feat_extract_norm": "layer", "conv_bias": True, "hidden_act": "silu"},
    ),
    "conformer, no positions, gelu": (
        "Wav2Vec2Conformer",
        {"position_embeddings_type": None, "conv_depthwise_kernel_size": 5},
    ),
}
#: All that `accelerate` supports in training, and all that it supports.
TRAINED = VARIANTS | WITH_ADAPTERS | SQUEEZED
ACCELERATED = TRAINED | CONFORMERS
#: torchaudio's factories for the published architectures.
TORCHAUDIO_FACTORIES = [
    "wav2vec2_base",
    "wav2vec2_large",
    "wav2vec2_large_lv60k",
    "wav2vec2_xlsr_300m",
    "wav2vec2_xlsr_1b",
    "wav2vec2_xlsr_2b",
    "hubert_base",
    "hubert_large",
    "hubert_xlarge",
    "wavlm_base",
    "wavlm_large",
]
#: One variant of each architecture that `Encoder` supports.
FAMILIES = ("wav2vec2 base", "hubert large", "wavlm base", "data2vec", "unispeech base", "unispeech-sat large")
#: One variant of each architecture that `accelerate` supports in training, and of each that it supports.
TRAINED_FAMILIES = (*FAMILIES, "sew base")
ACCELERATED_FAMILIES = (*TRAINED_FAMILIES, "conformer base")
BATCHES = {"single": [6000], "equal": [5000, 5000], "mixed": [5000, 900, 3300], "extreme": [30000, 400, 719, 720]}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
EVERY_TRAINED_VARIANT = pytest.mark.parametrize("variant", TRAINED)
EVERY_ACCELERATED_VARIANT = pytest.mark.parametrize("variant", ACCELERATED)
EVERY_FAMILY = pytest.mark.parametrize("variant", FAMILIES)
EVERY_ACCELERATED_FAMILY = pytest.mark.parametrize("variant", ACCELERATED_FAMILIES)


def transformers_model(variant: str, head: str = "Model", **options: Any) -> Any:
    """Return a tiny model in evaluation mode; no parameter keeps an initial value, such as 0, that hides errors."""
    transformers = pytest.importorskip("transformers")
    family, settings = ACCELERATED[variant]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY | settings | options)
    model = getattr(transformers, f"{family}{head}")(config).eval()
    disturb(model)
    return model


def disturb(model: torch.nn.Module) -> None:
    """Add noise to every parameter and statistic, so that one that is swapped or not copied changes the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                mean, variance = (module.get_buffer(name) for name in ("running_mean", "running_var"))
                mean.normal_(generator=generator)
                variance.uniform_(0.5, 2.0, generator=generator)


class Adapted(torch.nn.Module):
    """Linear layer with a low-rank adapter, as LoRA makes it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = (
            base,
            torch.nn.Linear(base.in_features, 2),
            torch.nn.Linear(2, base.out_features),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def padded_batch(lengths: list[int]) -> tuple[Tensor, Tensor]:  # (B, T), (B, T)
    """Return waveforms padded with zeros at the end, and their attention mask."""
    generator = torch.Generator().manual_seed(len(lengths))
    waveforms = torch.randn(len(lengths), max(lengths), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return waveforms * mask, mask


def waveforms_of(*lengths: int) -> Packed:
    generator = torch.Generator().manual_seed(len(lengths))
    return Packed.pack([torch.randn(length, 1, generator=generator) for length in lengths])


def assert_close(found: Tensor, expected: Tensor, relative: float, what: str = "") -> None:
    """Assert equality in max norm, up to `relative` times the largest expected value."""
    assert found.shape == expected.shape, what
    assert (found - expected).abs().max() <= relative * expected.abs().max(), what


def assert_padded_by_last(row: Tensor, count: int) -> None:  # (F, D)
    """Assert that the padding repeats the last of the row's `count` frames, or is zero if the row has no frames."""
    last = row[count - 1] if count else torch.zeros_like(row[:1]).sum(0)
    assert torch.equal(row[count:], last.expand_as(row[count:]))


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that names are the same and weights are equal bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
