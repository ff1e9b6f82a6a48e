"""Compare counts of multiplications with published figures and with PyTorch's counter."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.model_card import ModelCard
from fastssl.models.multiplications import count_multiplications, describe_compression

transformers = pytest.importorskip("transformers")
_TWO_LAYERS = EncoderConfig(num_hidden_layers=2)


def test_counts_of_the_base_models_for_ten_seconds() -> None:
    """The convolutions take 24.54 G; after them, two layers take 10.38 G and twelve layers 49.5 G."""
    two, twelve = count_multiplications(_TWO_LAYERS, seconds=10.0), count_multiplications(EncoderConfig(), seconds=10.0)
    assert two.front_end == twelve.front_end == pytest.approx(24.54e9, rel=1e-3)
    assert two.transformer == pytest.approx(10.38e9, rel=1e-3)
    assert twelve.transformer == pytest.approx(49.5e9, rel=2e-3)
    assert count_multiplications(_TWO_LAYERS, seconds=0.01).transformer == 0


@pytest.mark.parametrize("seconds", [1.0, 7.3])
def test_equal_what_torch_counts(seconds: float) -> None:
    config = EncoderConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, conv_dim=(32,) * 7
    )
    theirs = transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=96,
            conv_dim=(32,) * 7,
            attn_implementation="eager",
        )
    ).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(torch.randn(1, int(16_000 * seconds)))
    counted = counter.get_total_flops() / 2
    # PyTorch also counts multiplications with a convolution's padding, so the comparison needs a tolerance.
    assert count_multiplications(config, seconds=seconds).total == pytest.approx(counted, rel=0.02)


def test_fewer_frames_spare_what_is_behind_the_convolutions() -> None:
    config = replace(_TWO_LAYERS, compressor="integrate-and-fire")
    all_frames = count_multiplications(config, seconds=10.0, frame_period_ms=20.0)
    quarter = count_multiplications(config, seconds=10.0, frame_period_ms=80.0)
    assert quarter.front_end == all_frames.front_end
    assert quarter.front_end == pytest.approx(24.54e9 + 499 * 512 * (5 * 512 + 1), rel=1e-3)
    assert all_frames.transformer / 4.5 < quarter.transformer < all_frames.transformer / 4
    two = count_multiplications(_TWO_LAYERS, seconds=10.0)
    average = count_multiplications(replace(_TWO_LAYERS, compressor="average", compressor_factor=4), seconds=10.0)
    assert average.front_end == two.front_end
    assert average.transformer == quarter.transformer


def test_model_cards_say_it() -> None:
    fixed, free = (
        replace(_TWO_LAYERS, compressor="average", compressor_factor=4),
        replace(_TWO_LAYERS, compressor="integrate-and-fire"),
    )
    assert describe_compression(fixed) == (
        "average, 4 frames to one. Compression cannot reduce the front end's 70 % of the multiplications for 10 s of "
        "audio; it saves 23 %"
    )
    assert "every 80 ms" in describe_compression(free)
    for config, said in ((fixed, True), (free, True), (_TWO_LAYERS, False)):
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in Encoder(config).parameters())
        card = ModelCard().as_markdown(config, parameters=parameters)
        assert ("| sequence compression |" in card) == said
