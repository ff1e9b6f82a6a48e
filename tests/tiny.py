"""Define a model of a few thousand parameters, and make short recordings to train it on."""

from pathlib import Path

import numpy as np
import soundfile

from fastssl.models.wav2vec2 import GumbelTemperature, Wav2Vec2Config

TINY_MODEL = Wav2Vec2Config(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    activation_dropout=0.1,
    feat_proj_dropout=0.0,
    feat_quantizer_dropout=0.1,
    layerdrop=0.2,
    do_normalize=True,
    feature_grad_mult=1.0,
    conv_dim=(16,) * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    num_codevectors_per_group=8,
    codevector_dim=16,
    proj_codevector_dim=16,
    gumbel_temperature=GumbelTemperature(decay=0.9),
)


def write_recording(path: Path, seconds: float, seed: int) -> None:
    """Write noise whose loudness rises and falls."""
    random = np.random.default_rng(seed)
    samples = random.standard_normal(round(16000 * seconds)).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples * (0.02 + 0.1 * np.abs(np.sin(np.arange(len(samples)) / 1600))), 16000)
