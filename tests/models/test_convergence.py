"""Test that a small model learns the same with kernels as with references: both loss curves coincide."""

import math

import pytest
import torch
from torch import Tensor

from fastssl.kernels import dispatch
from fastssl.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2ForPreTraining
from fastssl.nn.random import utterance_keys
from fastssl.packing import Packed

CONFIG = Wav2Vec2Config(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    activation_dropout=0.1,
    feat_proj_dropout=0.1,
    layerdrop=0.0,
    mask_time_prob=0.3,
    mask_time_length=5,
    conv_dim=(32,) * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    num_codevectors_per_group=16,
    codevector_dim=32,
    proj_codevector_dim=32,
    num_negatives=20,
    features_penalty_weight=0.0,
    feat_quantizer_dropout=0.0,
    do_normalize=True,
    feature_grad_mult=1.0,
)
UPDATES = 100  # later, rounding changes the codes of some frames, so that single updates differ


def waveform(index: int, samples: int) -> Tensor:
    """Return tones that change every 80 ms, so that masked frames can be predicted from their surroundings."""
    generator = torch.Generator().manual_seed(index)
    pitch = 200 * 2 ** torch.randint(0, 5, (samples // 1280 + 1,), generator=generator)
    phase = (2 * math.pi * pitch.repeat_interleave(1280)[:samples] / 16000).cumsum(0)
    return (phase.sin() + 0.1 * torch.randn(samples, generator=generator)).unsqueeze(1)


def train(device: str, dtype: torch.dtype) -> Tensor:  # (UPDATES,)
    torch.manual_seed(0)
    model = Wav2Vec2ForPreTraining(CONFIG).train().to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, eps=1e-6)
    ids = torch.arange(3)
    curve = []
    for update in range(UPDATES):
        waveforms = Packed.pack([waveform(3 * update + i, 12000 + 4000 * i).to(dtype) for i in range(3)])
        keys = utterance_keys(0, update, ids).to(device)
        output = model(waveforms.to(device), keys=keys, gumbel_temperature=1.0)
        optimizer.zero_grad()
        (output.loss / output.masked_frames).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(output.contrastive_loss / output.masked_frames)
    return torch.stack(curve).cpu()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_kernels_learn_as_references_do(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels = train(device, dtype)
    monkeypatch.setattr(dispatch, "DEFAULT_BACKEND", "reference")
    with_references = train(device, dtype)
    assert with_references[-20:].mean() < with_references[:20].mean() - 0.15, "nothing was learned"
    apart = (with_kernels - with_references).abs()
    assert apart.max() < (1e-9 if dtype == torch.float64 else 1e-3)
