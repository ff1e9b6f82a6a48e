"""Test WavLM pre-training: how it mixes utterances, that the rest is HuBERT's objective, and whole runs."""

import dataclasses
import math
from pathlib import Path
from typing import cast

import pytest
import torch
import yaml
from torch import Tensor

import fastssl
from fastssl import cli
from fastssl.data.batches import AudioBatch, WaveformDataset, fixed_batches
from fastssl.data.corpus import open_corpus
from fastssl.data.noise import NoiseRecordings
from fastssl.models.hubert import HubertConfig, HubertForPreTraining
from fastssl.models.pretraining import StepContext
from fastssl.models.wavlm import WavLMConfig, WavLMForPreTraining, mix_utterances
from fastssl.nn.random import utterance_keys
from fastssl.packing import Packed
from fastssl.train.config import write_config
from fastssl.train.metrics_file import read_metrics
from fastssl.train.pretrain import pretrain
from tests.tiny import write_recording
from tests.train.conftest import MakeConfig, MakeSystem, model_of, rewound

TINY = cast(WavLMConfig, model_of("wavlm"))
ALWAYS = dataclasses.replace(TINY, do_normalize=False, mixing_prob=1.0, mixing_noise_prob=0.0)
LENGTHS = (9000, 5001, 6000, 7400, 9345)  # none shorter than half of another


def signals(lengths: tuple[int, ...], *, seed: int = 0) -> list[Tensor]:
    """Return noise of several levels; no sample is 0."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 1, generator=generator) * 10 ** (index % 3 - 1) for index, length in enumerate(lengths)]


def keys_of(update: int, count: int) -> Tensor:
    return utterance_keys(3, update, torch.arange(count) * 7919)


def parts(update: int, config: WavLMConfig = ALWAYS, noise: Packed | None = None) -> list[tuple[Tensor, Tensor]]:
    """Return each utterance of an update, and what was added to it."""
    clean = signals(LENGTHS)
    mixed = mix_utterances(Packed.pack(clean), keys_of(update, len(clean)), config, noise=noise)
    return [(x, y - x) for x, y in zip(clean, mixed.unpack(), strict=True)]


def span(added: Tensor) -> tuple[int, int]:
    """Return the index of the first changed sample, and one more than that of the last."""
    changed = added.flatten().nonzero().flatten()
    return (int(changed[0]), int(changed[-1]) + 1) if len(changed) else (0, 0)


def source_of(added: Tensor, sources: list[Tensor]) -> tuple[int, float]:
    """Return the index of the source that the part was cut from, and the factor that scales it."""
    start, stop = span(added)
    part = added[start:stop, 0]
    for index, source in enumerate(sources):
        if len(part) <= len(source):
            windows = source[:, 0].unfold(0, len(part), 1)
            probe = windows[:, :8] * (part[0] / windows[:, :1])
            for row in (probe - part[:8]).abs().amax(1).lt(1e-3 * part[:8].abs().max()).nonzero().flatten().tolist():
                factor = float(part.norm() / windows[row].norm())
                if torch.allclose(windows[row] * factor, part, rtol=1e-3, atol=1e-4 * float(part.abs().max())):
                    return index, factor
    raise AssertionError("the part comes from no source")


def test_parts_come_from_other_clean_utterances_within_half_the_length() -> None:
    clean = signals(LENGTHS)
    shares, places, chosen = [], [], set()
    for update in range(120):
        for index, (utterance, added) in enumerate(parts(update)):
            start, stop = span(added)
            length = stop - start
            assert length <= len(utterance) // 2
            if update < 12 and length >= 8:
                source, factor = source_of(added, clean)
                assert source != index
                chosen.add((index, source))
                ratio = utterance.square().mean() / (factor**2 * clean[source].square().mean())
                assert -5.01 < 10 * math.log10(float(ratio)) < 5.01
            shares.append(length / (len(utterance) // 2))
            places.append(start / (len(utterance) - length))
    assert len(chosen) > 15  # of 20 pairs
    for values in (shares, places):
        found = torch.tensor(values)
        # A mean of uniform numbers in 0 to 1, within four standard deviations, and both ends.
        assert abs(found.mean() - 0.5) < 4 / math.sqrt(12 * len(values))
        assert found.quantile(0.1) < 0.2
        assert found.quantile(0.9) > 0.8


def test_a_part_is_no_longer_than_its_source() -> None:
    clean = signals((9000, 300))
    lengths = []
    for update in range(20):
        start, stop = span(mix_utterances(Packed.pack(clean), keys_of(update, 2), ALWAYS).unpack()[0] - clean[0])
        lengths.append(stop - start)
    assert max(lengths) == 300


def test_energy_ratios_are_uniform() -> None:
    clean, ratios = signals((4000, 4000)), []
    for update in range(300):
        mixed = mix_utterances(Packed.pack(clean), keys_of(update, 2), ALWAYS).unpack()[0]
        start, stop = span(mixed - clean[0])
        if stop - start > 64:
            factor = source_of(mixed - clean[0], [clean[1]])[1]
            ratios.append(10 * math.log10(float(clean[0].square().mean() / (factor**2 * clean[1].square().mean()))))
    found = torch.tensor(ratios)
    assert abs(found.mean()) < 4 * 10 / math.sqrt(12 * len(found))
    assert found.min() < -4
    assert found.max() > 4


def test_one_in_five_is_mixed() -> None:
    config = dataclasses.replace(ALWAYS, mixing_prob=0.2)
    mixed = [bool(added.any()) for update in range(400) for _, added in parts(update, config)]
    expected, deviation = 0.2 * len(mixed), math.sqrt(0.16 * len(mixed))
    assert abs(sum(mixed) - expected) < 4 * deviation


def test_order_changes_nothing_and_other_batch_mates_do() -> None:
    clean, keys = signals(LENGTHS), keys_of(0, len(LENGTHS))
    mixed = mix_utterances(Packed.pack(clean), keys, ALWAYS).unpack()
    order = [3, 0, 4, 2, 1]
    again = mix_utterances(Packed.pack([clean[index] for index in order]), keys[order], ALWAYS).unpack()
    for place, index in enumerate(order):
        assert torch.equal(again[place], mixed[index])
    alone = mix_utterances(Packed.pack(clean[:1]), keys[:1], ALWAYS)
    assert torch.equal(alone.values, clean[0])
    fewer = mix_utterances(Packed.pack(clean[:2]), keys[:2], ALWAYS).unpack()
    assert not torch.equal(fewer[0], mixed[0])


def test_silence_adds_nothing_and_takes_nothing() -> None:
    clean = [torch.zeros(5000, 1), torch.ones(5000, 1)]
    for update in range(10):
        mixed = mix_utterances(Packed.pack(clean), keys_of(update, 2), ALWAYS).unpack()
        assert torch.equal(mixed[0], clean[0])
        assert torch.equal(mixed[1], clean[1])


@pytest.mark.parametrize("damaged", [1e-42, math.inf, math.nan])
def test_samples_that_have_no_factor_spoil_no_other_utterance(damaged: float) -> None:
    clean, noises = [torch.full((5000, 1), damaged), torch.ones(5000, 1)], [torch.empty(0, 1)]
    for update in range(10):
        for noise in (None, Packed.pack([*noises, torch.full((5000, 1), damaged)])):
            mixed = mix_utterances(Packed.pack(clean), keys_of(update, 2), ALWAYS, noise=noise).unpack()
            assert torch.equal(mixed[1], clean[1])


def test_mixtures_are_normalised_and_others_stay() -> None:
    config = dataclasses.replace(TINY, do_normalize=True, mixing_prob=0.5)
    clean = [x / x.std() for x in signals((9000, 9000, 9000))]
    seen = set()
    for update in range(8):
        for before, after in zip(
            clean, mix_utterances(Packed.pack(clean), keys_of(update, 3), config).unpack(), strict=True
        ):
            changed = not torch.equal(before, after)
            seen.add(changed)
            if changed:
                assert abs(after.mean()) < 1e-5
                assert after.var(correction=0) == pytest.approx(1.0, abs=1e-4)
    assert seen == {True, False}


def test_noise_is_mixed_where_there_is_one() -> None:
    noises = [torch.empty(0, 1), *signals((3000, 500), seed=1), torch.empty(0, 1), torch.empty(0, 1)]
    config = dataclasses.replace(ALWAYS, mixing_prob=0.5, mixing_noise_prob=1.0)  # speech is never mixed in
    ratios = []
    for update in range(60):
        for index, (utterance, added) in enumerate(parts(update, config, Packed.pack(noises))):
            if index not in (1, 2):
                assert not added.any()
            elif span(added)[1] - span(added)[0] > 32:
                source, factor = source_of(added, noises)
                assert source == index
                ratio = utterance.square().mean() / (factor**2 * noises[index].square().mean())
                ratios.append(10 * math.log10(float(ratio)))
    assert -5.01 < min(ratios) < 0
    assert 15 < max(ratios) < 20.01


def test_noise_is_read_for_its_share_of_the_utterances(tmp_path: Path) -> None:
    write_recording(tmp_path / "audio" / "long.wav", 3.0, seed=0)
    write_recording(tmp_path / "noise" / "fan.wav", 2.0, seed=1)
    write_recording(tmp_path / "noise" / "rain.wav", 1.0, seed=2)
    cuts = tuple(open_corpus(tmp_path / "noise", min_duration_s=0.1).cuts)
    noise = NoiseRecordings(cuts, share=0.25)
    drawn = [noise.draw(f"u{index}", seed=0, update=4) for index in range(2000)]
    found = [cut.id for cut in drawn if cut is not None]
    assert abs(len(found) - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75)
    assert abs(found.count(cuts[0].id) - len(found) / 2) < 4 * math.sqrt(len(found) / 4)
    assert drawn == [noise.draw(f"u{index}", seed=0, update=4) for index in range(2000)]
    assert drawn != [noise.draw(f"u{index}", seed=0, update=5) for index in range(2000)]

    spec = fixed_batches(open_corpus(tmp_path / "audio").cuts, max_duration_s=9, crop_s=None, seed=0)[0]
    batch = WaveformDataset(normalize=True, noise=NoiseRecordings(cuts, share=1.0))[spec]
    assert batch.noise is not None
    assert batch.noise.layout.lengths[0] in (16_000, 32_000)
    assert WaveformDataset(normalize=True, noise=NoiseRecordings(cuts, share=0.0))[spec].noise is not None
    (tmp_path / "noise" / "rain.wav").write_bytes(b"RIFF")
    (tmp_path / "noise" / "fan.wav").unlink()
    batch = WaveformDataset(normalize=True, noise=NoiseRecordings(cuts, share=1.0))[spec]
    assert batch.noise is not None
    assert batch.noise.layout.lengths == (0,)
    assert len(batch.names) == 1
    assert [problem.name.split("/")[-1] in ("fan.wav", "rain.wav") for problem in batch.problems] == [True]


def _batch() -> AudioBatch:
    waveforms = Packed.pack([x / x.std() for x in signals(LENGTHS)])
    frames = sum(max(0, (length - 400) // 320 + 1) for length in LENGTHS)
    labels = torch.arange(frames) % TINY.num_clusters
    return AudioBatch(waveforms, torch.arange(len(LENGTHS)) * 7919, ("",) * len(LENGTHS), 0, (), labels)


def test_without_mixing_the_loss_is_huberts() -> None:
    torch.manual_seed(0)
    hubert = model_of("hubert")
    assert isinstance(hubert, HubertConfig)
    model = WavLMForPreTraining(dataclasses.replace(TINY, mixing_prob=0.0)).train()
    plain = HubertForPreTraining(hubert).train()
    state = {name.replace("wavlm.", "hubert."): tensor for name, tensor in model.state_dict().items()}
    extra = state.keys() - plain.state_dict().keys()
    assert all("rel_attn_embed" in name or "gru_rel_pos" in name for name in extra)
    # With an empty table of positions WavLM's encoder is HuBERT's.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_attn_embed" in name:
                parameter.zero_()
    plain.load_state_dict({name: tensor for name, tensor in state.items() if name not in extra})
    batch, context = _batch(), StepContext(keys_of(0, len(LENGTHS)), update=0)
    ours, theirs = model.step(batch, context), plain.step(batch, context)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    assert ours.masked_frames == theirs.masked_frames


def test_training_sees_mixtures_and_validation_clean_utterances() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, mixing_prob=1.0)
    model = WavLMForPreTraining(config)
    batch, context = _batch(), StepContext(keys_of(0, len(LENGTHS)), update=0)
    assert batch.labels is not None
    clean = model.eval()(batch.waveforms, keys=context.keys, labels=batch.labels)
    assert torch.equal(model.step(batch, context).loss, clean.loss)
    mixed = model.train().step(batch, context)
    waveforms = mix_utterances(batch.waveforms, context.keys, config)
    assert torch.equal(mixed.loss, model(waveforms, keys=context.keys, labels=batch.labels).loss)
    assert not torch.equal(mixed.loss, clean.loss)
    empty = AudioBatch(Packed.pack([torch.empty(0, 1)]), torch.tensor([1]), ("",), 0, (), torch.empty(0).long())
    assert model.step(empty, StepContext(keys_of(0, 1), update=0)).masked_frames == 0


def test_a_run_resumes_to_the_bit_and_opens_as_wavlm_model(
    make_config: MakeConfig,
    make_system: MakeSystem,
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    write_recording(tmp_path / "noise" / "fan.wav", 2.0, seed=1)
    config = make_system(make_config(**{"trainer.keep_every": 4}), "wavlm")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(TINY, mixing_prob=0.8, mixing_noise_prob=0.5),
        data=dataclasses.replace(config.data, noise=str(tmp_path / "noise")),
    )
    pretrain(config)
    halves = rewound(config, tmp_path / "halves", update=4)
    pretrain(halves, resume=True)
    expected, found = (
        torch.load(Path(one.output) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for one in (config, halves)
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    rows = [row for row in read_metrics(Path(config.output) / "metrics.csv") if "prediction_loss" in row]
    assert rows[-1]["prediction_loss"] < rows[0]["prediction_loss"]

    encoder = fastssl.load_encoder(config.output).eval()
    theirs = transformers.WavLMModel.from_pretrained(Path(config.output) / "encoder").eval()
    waveform = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = encoder(Packed.from_padded(waveform.unsqueeze(2), [16_000])).features.values
        torch.testing.assert_close(ours, theirs(waveform).last_hidden_state[0], rtol=1e-4, atol=1e-4)

    # Noise that is not the run's cannot continue it.
    write_recording(tmp_path / "noise" / "rain.wav", 2.0, seed=2)
    with pytest.raises(ValueError, match=r"AUDIO or data\.noise no longer has the recordings"):
        pretrain(dataclasses.replace(halves, trainer=dataclasses.replace(halves.trainer, max_steps=9)), resume=True)


def test_folders_of_data_have_whole_paths_in_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "fastssl.train.pretrain.pretrain", lambda config, **_: write_config(config, tmp_path / "a.yaml")
    )
    options = [option for name in ("labels", "noise", "valid") for option in (f"--data.{name}", name)]
    assert cli.main(["pretrain", "audio", "--recipe", "wavlm-tiny", "--output", "run", *options]) == 0
    data = yaml.safe_load((tmp_path / "a.yaml").read_text())["data"]
    assert [data[name] for name in ("labels", "noise", "valid")] == [
        str(tmp_path / name) for name in ("labels", "noise", "valid")
    ]


def test_noise_is_for_systems_that_mix(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.noise: wav2vec2 does not mix noise into its input"):
        make_config(**{"data.noise": str(tmp_path)})
