"""Test that the limit counts exactly the multiplications that a model needs on valid audio."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import limits, rivals, workloads
from benchmarks.limits import Gemm
from benchmarks.recipes import recipe_model
from fastssl.models.encoder import Encoder, EncoderConfig

pytest.importorskip("transformers")

CPU = torch.device("cpu")
TINY = replace(recipe_model("wav2vec2-tiny"), conv_dim=(16,) * 7, hidden_size=32, intermediate_size=48)


@pytest.mark.parametrize("backward", [False, True])
def test_the_encoder_has_the_products_that_transformers_makes_without_padding(backward: bool) -> None:
    samples = 80_000
    # One group, because PyTorch's counter is wrong for the backward of grouped convolutions.
    config = replace(TINY, num_conv_pos_embedding_groups=1)
    model = rivals.transformers_encoder(Encoder(config)).eval()  # training would add the audio's gradient
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        out = model(torch.randn(1, samples)).last_hidden_state
        if backward:
            out.sum().backward()
    counted = sum(gemm.flops for gemm in limits.encoder(config, [samples], backward=backward))
    # Transformers' positional convolution computes one extra frame, and drops it.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def counted(family: str, config: EncoderConfig, *, backward: bool, **settings: Any) -> int:
    """Return the operations that PyTorch counts in a model of Transformers on an utterance of 5 s."""
    names = ["conv_dim", "conv_kernel", "conv_stride", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups"]
    names += ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    library: Any = pytest.importorskip("transformers")
    settings |= {name: getattr(config, name) for name in names}
    model = getattr(library, f"{family}Model")(getattr(library, f"{family}Config")(**settings)).eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        out = model(torch.randn(1, 80_000)).last_hidden_state
        if backward:
            out.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("backward", [False, True])
def test_a_squeezed_encoder_has_the_products_of_sew(backward: bool) -> None:
    config = replace(TINY, conv_dim=(32,) * 7, num_conv_pos_embedding_groups=1)
    expected = counted("SEW", config, backward=backward, squeeze_factor=3)
    found = sum(gemm.flops for gemm in limits.squeezed_encoder(config, [80_000], factor=3, backward=backward))
    assert found == pytest.approx(expected, rel=0.01)


def test_a_conformer_has_its_products_besides_depthwise_convolutions() -> None:
    settings: dict[str, Any] = {"position_embeddings_type": "rotary", "conv_depthwise_kernel_size": 3}
    expected = counted("Wav2Vec2Conformer", TINY, backward=False, **settings)
    found = sum(gemm.flops for gemm in limits.conformer(TINY, [80_000], backward=False))
    depthwise = 2 * 3 * TINY.hidden_size * TINY.num_hidden_layers * 249  # of 249 frames
    assert found + depthwise == pytest.approx(expected, rel=1e-6)


def test_utterances_add_up_where_they_do_not_see_each_other() -> None:
    one, two = ([gemm.flops for gemm in limits.encoder(TINY, [n], backward=True)] for n in (20_000, 50_000))
    both = limits.encoder(TINY, [20_000, 50_000], backward=True)
    assert sum(gemm.flops for gemm in both) == sum(one) + sum(two)


def test_pretraining_adds_the_head() -> None:
    samples, masked = [32_000], [40]
    encoder = sum(gemm.flops for gemm in limits.encoder(TINY, samples, backward=True))
    step = sum(gemm.flops for gemm in limits.pretraining(TINY, samples, masked))
    # Logits of 2 x 64 codes, their straight-through gradient, both projections, all pairs of masked frames.
    head = 2 * 40 * (3 * 16 * 128 + 2 * 32 * 64 + 3 * 32 * 64 + 3 * 64 * 64 + 3 * 64 * 40)
    assert step - encoder == head


def test_attention_has_two_products_forward_and_four_backward() -> None:
    forward, both = (limits.attention([10, 7], 3, 4, backward=backward) for backward in (False, True))
    assert sum(gemm.flops for gemm in forward) == 2 * 2 * 3 * 4 * (100 + 49)
    assert sum(gemm.flops for gemm in both) == 3 * sum(gemm.flops for gemm in forward)


def test_limits_are_measured_by_every_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "undisturbed", lambda work: work())
    gemms = [Gemm(24, 16, 8, times=3), Gemm(12, 8, 12, batch=2), Gemm(0, 8, 8)]
    found = limits.gemm_limits(gemms, torch.float32, CPU)
    assert list(found) == ["GEMMs (float32), aten::mm", "GEMMs (float32), fastest there is"]
    by_aten, fastest = found.values()
    assert 0 < fastest <= by_aten
    assert len(limits.gemm_limits(gemms, torch.bfloat16, CPU)) == 1


def test_a_copy_is_scaled_to_the_bytes_moved() -> None:
    copy = limits.copy_limit(moved_bytes=24_000_000, footprint_bytes=8_000_000, device=CPU)
    copy.run()
    assert copy.named_seconds(1e-3) == ("copy, 8 MB at 8 GB/s", 3e-3)


def test_tall_products_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "undisturbed", lambda work: work())
    monkeypatch.setattr(limits, "_TALLEST", 8)
    monkeypatch.setattr(limits, "_interleaved_medians", lambda calls, device: dict.fromkeys(calls, 1.0))
    limits._gemm_seconds.cache_clear()
    found = limits.gemm_limits([Gemm(32, 4, 4), Gemm(4, 16, 4, times=5)], torch.float32, CPU)
    limits._gemm_seconds.cache_clear()
    assert set(found.values()) == {4.0 + 5 * 2.0}


def test_audio_of_the_benchmarks_has_layers_of_work() -> None:
    config = recipe_model("wav2vec2-base")
    lengths_s = workloads.read_speech(4)
    total = sum(gemm.flops for gemm in limits.encoder(config, workloads.samples_of(lengths_s), backward=False))
    assert 12e9 < total / sum(lengths_s) < 17e9  # published: 6.9 G multiply-adds per second at 15 s
