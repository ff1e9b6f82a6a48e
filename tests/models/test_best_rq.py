"""Test BEST-RQ's objective: its loss against plain code, independence of batch mates, and the masking noise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastssl
from benchmarks.recipes import recipe_model
from fastssl.models.best_rq import BestRqConfig, BestRqForPreTraining
from fastssl.models.conformer import subsampled_layout
from fastssl.nn.masking import sample_span_mask
from fastssl.nn.random import draw_keys, utterance_keys
from fastssl.packing import Layout, Packed
from tests.device_waits import device_waits
from tests.interop.tiny_models import assert_same_weights, waveforms_of

SMALL = BestRqConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=40,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    conv_dim=(16, 20),
    conv_depthwise_kernel_size=5,
    codebook_size=30,
)

RECIPES = Path(fastssl.__file__).parent / "recipes"


def make_model(**changes: Any) -> BestRqForPreTraining:
    torch.manual_seed(0)
    return BestRqForPreTraining(replace(SMALL, **changes)).train()


def keys_of(batch: int) -> Tensor:
    return utterance_keys(0, 3, torch.arange(batch))


def masked_frames(model: BestRqForPreTraining, layout: Layout, keys: Tensor) -> Tensor:
    config = model.config
    return sample_span_mask(
        layout,
        keys,
        probability=config.mask_time_prob,
        length=config.mask_time_length,
        min_spans=config.mask_time_min_masks,
    )


def test_loss_is_the_cross_entropy_of_the_codes_of_masked_frames() -> None:
    model = make_model()
    waveforms, keys = waveforms_of(16_000, 9_000), keys_of(2)
    output = model(waveforms, keys=keys)
    mel = model.best_rq.extract_features(waveforms)
    layout = output.features.layout
    mask = masked_frames(model, layout, keys)
    logits = F.linear(output.features.values, model.classifier.weight, model.classifier.bias)
    targets = []
    for frames, length in zip(mel.unpack(), layout.lengths, strict=True):
        for t in range(length):
            projected = F.normalize(model.quantizer.projection @ frames[4 * t : 4 * t + 4].flatten(), dim=0)
            targets.append((model.quantizer.codebook - projected).norm(dim=1).argmin())
    wanted = torch.stack(targets)
    assert torch.equal(model.targets(mel), wanted)
    expected = F.cross_entropy(logits[mask], wanted[mask], reduction="sum")
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    assert torch.equal(output.loss, output.prediction_loss)
    assert output.features_penalty == 0
    assert output.masked_frames == int(mask.sum()) > 5
    assert output.correct == (logits.argmax(1) == wanted)[mask].sum()
    assert torch.equal(output.code_counts, torch.bincount(wanted, minlength=30))


def test_masked_frames_become_noise_and_no_other() -> None:
    model = make_model(mask_time_prob=0.3, mask_time_length=2)
    waveforms, keys = waveforms_of(60_000, 50_123, 80_000), draw_keys(3)
    seen: list[Packed] = []
    model.best_rq.subsampling.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(waveforms, keys=keys)
    mel = model.best_rq.extract_features(waveforms)
    layout = subsampled_layout(mel.layout)
    mask = masked_frames(model, layout, keys)
    noise = []
    for frames, put_in, masked in zip(mel.unpack(), seen[0].unpack(), mask.split(layout.lengths), strict=True):
        changed = (frames != put_in).all(1)
        expected = F.pad(masked.repeat_interleave(4), (0, len(frames) - 4 * len(masked)))
        assert torch.equal(changed, expected)
        assert torch.equal(frames[~expected], put_in[~expected])
        noise.append(put_in[expected])
    drawn = torch.cat(noise).flatten()
    assert len(drawn) > 10_000
    assert len(drawn.unique()) > 0.98 * len(drawn)
    assert abs(drawn.mean().item()) < 0.005
    assert abs(drawn.std().item() - 0.1) < 0.005


def test_a_masked_frame_does_not_reach_the_encoder() -> None:
    model = make_model(mask_time_prob=1.0, mask_time_length=1)
    mel = model.best_rq.extract_features(waveforms_of(8_000))
    layout = subsampled_layout(mel.layout)
    rows = torch.arange(layout.total)
    put_in = model._put_noise(mel, layout, keys_of(1), rows)
    other = Packed(torch.randn_like(mel.values), mel.layout)
    assert torch.equal(
        model._put_noise(other, layout, keys_of(1), rows).values[: 4 * layout.total], put_in.values[: 4 * layout.total]
    )


def test_everything_of_an_utterance_is_the_same_in_any_batch() -> None:
    model = make_model()
    waveforms, keys = waveforms_of(9_000, 16_000, 1_300, 3_000), keys_of(4)
    together = model(waveforms, keys=keys)
    outputs = []
    for row, waveform in enumerate(waveforms.unpack()):
        alone = model(Packed.pack([waveform.clone()]), keys=keys[row : row + 1])
        assert torch.equal(together.features.unpack()[row], alone.features.values)
        outputs.append(alone)
    assert outputs[2].masked_frames == 0
    assert together.masked_frames == sum(output.masked_frames for output in outputs)
    assert together.correct == sum(output.correct for output in outputs)
    assert torch.equal(together.code_counts, torch.stack([output.code_counts for output in outputs]).sum(0))
    loss = torch.stack([output.loss for output in outputs]).sum()
    torch.testing.assert_close(together.loss, loss, rtol=1e-5, atol=0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(together.loss, parameters)
    sums = torch.autograd.grad(loss, parameters)
    for name, grad, expected in zip(names, grads, sums, strict=True):
        # A third of this bias belongs to the keys. Attention is invariant to it, so its gradient is only rounding.
        assert (grad - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def test_the_tiny_preset_is_bit_exact_too() -> None:
    torch.manual_seed(0)
    encoder = BestRqForPreTraining(recipe_model("best-rq-tiny")).eval().best_rq
    waveforms = waveforms_of(3_200, 64_000, 1_360, 31_337, 4_000)
    with torch.no_grad():
        together = encoder(waveforms).features.unpack()
        for ours, waveform in zip(together, waveforms.unpack(), strict=True):
            assert torch.equal(ours, encoder(Packed.pack([waveform.clone()])).features.values)


def test_an_empty_batch_costs_nothing_and_reaches_every_parameter() -> None:
    for lengths in ((), (1_000, 0)):
        model = make_model()
        empty = Packed(torch.zeros(sum(lengths), 1), Layout.from_lengths(lengths))
        output = model(empty, keys=torch.zeros(len(lengths), dtype=torch.int64))
        assert output.masked_frames == 0
        assert output.loss.item() == 0.0
        assert output.code_counts.sum() == 0
        output.loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.eq(0).all(), name


def test_autocast_changes_neither_targets_nor_mask() -> None:
    model = make_model()
    waveforms, keys = waveforms_of(16_000, 9_000), keys_of(2)
    expected = model(waveforms, keys=keys)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(waveforms, keys=keys)
    assert output.loss.dtype == torch.float32
    assert output.features.values.dtype == torch.bfloat16
    assert output.masked_frames == expected.masked_frames
    assert torch.equal(output.code_counts, expected.code_counts)
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-2, atol=0)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.ne(0).any() for p in model.parameters())


def test_it_learns() -> None:
    model = make_model(codebook_size=8, mask_time_prob=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # Each tone lasts 0.4 s or ten frames, so a masked frame's code follows from its neighbours.
    torch.manual_seed(0)
    pitch = torch.tensor([300.0, 900.0, 2700.0, 500.0, 1800.0]).repeat_interleave(6_400)
    tones = (2 * torch.pi * pitch / 16_000).cumsum(0).sin().unsqueeze(1) + 0.01 * torch.randn(32_000, 1)
    losses = []
    for update in range(50):
        output = model(Packed.pack([tones]), keys=utterance_keys(0, update, torch.tensor([1])))
        optimizer.zero_grad()
        (output.loss / output.masked_frames).backward()
        optimizer.step()
        losses.append(output.loss.item() / output.masked_frames)
    shares = output.code_counts / output.code_counts.sum()
    # This is the loss of a model that knows only the codes' frequencies.
    entropy = -(shares * shares.clamp(min=1e-9).log()).sum().item()
    assert sum(losses[-10:]) / 10 < 0.85 * entropy


def test_weights_of_a_folder(tmp_path: Path) -> None:
    model = make_model()
    model.best_rq.save_pretrained(tmp_path)
    fresh = BestRqForPreTraining.from_pretrained(tmp_path)
    assert_same_weights(dict(fresh.best_rq.state_dict()), dict(model.best_rq.state_dict()))
    assert fresh.config == model.config
    other = make_model()
    torch.nn.init.zeros_(other.classifier.weight)
    other.quantizer.codebook.zero_()
    other.load_weights(model.state_dict(), name="run")
    assert_same_weights(dict(other.state_dict()), dict(model.state_dict()))
    with pytest.raises(
        ValueError, match=r"run: quantizer\.codebook has shape \(30, 16\), expected \(20, 16\); to load only the enc"
    ):
        make_model(codebook_size=20).load_weights(model.state_dict(), name="run")
    with pytest.raises(ValueError, match=r"run: weights are missing: encoder\."):
        make_model(num_hidden_layers=3).load_weights(model.state_dict(), name="run")


@pytest.mark.parametrize("name", ["best-rq-base", "best-rq-tiny"])
def test_recipes_change_the_defaults(name: str) -> None:
    config = recipe_model(name)
    assert isinstance(config, BestRqConfig)
    assert not hasattr(config, "gumbel_temperature")
    assert (config == BestRqConfig()) == (name == "best-rq-base")


def test_sizes_of_recipes() -> None:
    parameters = {}
    for name in ("best-rq-base", "best-rq-tiny"):
        with torch.device("meta"):
            parameters[name] = sum(p.numel() for p in BestRqForPreTraining(recipe_model(name)).parameters()) / 1e6
    assert parameters["best-rq-base"] == pytest.approx(90.84, abs=0.01)
    assert parameters["best-rq-tiny"] == pytest.approx(2.12, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_time_prob": 1.5}, "mask_time_prob: must be at least 0 and at most 1, got 1.5"),
        ({"mask_time_length": 0}, "mask_time_length: must be at least 1, got 0"),
        ({"mask_time_min_masks": -1}, "mask_time_min_masks: must be at least 0, got -1"),
        ({"mask_noise_std": -0.1}, "mask_noise_std: must be at least 0, got -0.1"),
        ({"codebook_size": 0}, "codebook_size: must be at least 1, got 0"),
        ({"codebook_dim": 1.5}, "codebook_dim: must be of type int, got 1.5"),
    ],
)
def test_values_that_no_objective_has_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@pytest.mark.gpu
def test_the_host_waits_for_the_device_once() -> None:
    """That wait reads the number of masked frames."""
    torch.manual_seed(0)
    config = replace(SMALL, hidden_dropout=0.1, attention_dropout=0.1, activation_dropout=0.1)
    model = BestRqForPreTraining(config).cuda().train()
    waveforms, keys = waveforms_of(16000, 9000, 400).to("cuda"), keys_of(3).cuda()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            output = model(waveforms, keys=keys)
        output.loss.backward()

    waits = device_waits(step)
    assert len(waits) == 1, waits
