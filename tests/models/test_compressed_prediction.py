"""Test HuBERT and BEST-RQ with a compressor: the predicted targets, and Conformers at various rates."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastssl.data.segments import FrameSegments
from fastssl.models.best_rq import BestRqConfig, BestRqForPreTraining
from fastssl.models.conformer import ConformerConfig, ConformerEncoder
from fastssl.models.folder import read_weights
from fastssl.models.hubert import HubertConfig, HubertForPreTraining
from fastssl.models.multiplications import count_multiplications, describe_compression
from fastssl.models.pretraining import PredictionOutput
from fastssl.nn.random import draw_keys
from fastssl.packing import Packed
from fastssl.train.config import OptimizerConfig
from fastssl.train.module import _COUNTS, PretrainModule
from tests.models.test_compressed import SHAPE, waveforms_of

CONFORMER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "conv_dim": (16, 16),
    "conv_depthwise_kernel_size": 7,
}
_LENGTHS = (16_000, 9_321, 30_011)
EVERY_SYSTEM = pytest.mark.parametrize("system", ["hubert", "best-rq"])


def _model(system: str, **changes: Any) -> HubertForPreTraining | BestRqForPreTraining:
    torch.manual_seed(0)
    options: dict[str, Any] = {"compressor": "integrate-and-fire"} | changes
    if system == "hubert":
        return HubertForPreTraining(HubertConfig(**SHAPE, num_clusters=7, final_dim=16, **options))
    return BestRqForPreTraining(BestRqConfig(**CONFORMER, codebook_size=11, **options))


def _step(
    model: HubertForPreTraining | BestRqForPreTraining, waveforms: Packed, keys: Tensor, **options: Any
) -> PredictionOutput:
    if isinstance(model, BestRqForPreTraining):
        return model(waveforms, keys=keys, **options)  # type: ignore[no-any-return]
    layout = model.hubert.frame_layout(waveforms.layout)
    # Labels depend only on the utterance itself, so that batches can be compared with single utterances.
    labels = (layout.positions // 3) % 7
    return model(waveforms, keys=keys, labels=labels, **options)  # type: ignore[no-any-return]


@EVERY_SYSTEM
def test_at_rate_zero_the_objective_is_that_without_a_compressor(system: str) -> None:
    model = _model(system, compression_range=(0.0, 0.0))
    plain = _model(system, compressor="none")
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if ".compressor." not in key})
    waveforms, keys = waveforms_of(*_LENGTHS), draw_keys(3, generator=torch.Generator().manual_seed(0))
    found, expected = _step(model, waveforms, keys), _step(plain, waveforms, keys)
    assert torch.equal(found.loss, expected.loss)
    assert found.masked_frames == expected.masked_frames
    assert expected.compression is None
    assert found.compression is not None
    period = model.config.frame_period_ms
    torch.testing.assert_close(found.compression.frame_period_ms / found.masked_frames, torch.tensor(period))
    assert set(found.scores()) == set(model.score_names) > set(plain.score_names) == set(expected.scores())


@EVERY_SYSTEM
def test_what_became_of_a_frame_predicts_its_target(system: str) -> None:
    """Each target is predicted from the compressed frame that its own frame went into."""
    model = _model(system, compression_draw="period", compression_range=(90.0, 90.0), mask_time_prob=0.5)
    waveforms, keys = waveforms_of(*_LENGTHS), draw_keys(3, generator=torch.Generator().manual_seed(0))
    seen: dict[str, Any] = {}
    compressor = model.speech_encoder.compressor
    assert compressor is not None
    compressor.register_forward_hook(lambda module, args, output: seen.update(compressed=output))
    predictor = model.final_proj if isinstance(model, HubertForPreTraining) else model.classifier
    predictor.register_forward_pre_hook(lambda module, args: seen.update(rows=args[0].detach()))
    output = _step(model, waveforms, keys)
    compressed, states = seen["compressed"], output.features.values
    assert compressed.frames.layout.total < compressed.layout.total
    # The rows used for prediction are those that the masked frames went into, in the order of the frames.
    first = 0
    for source, of_frame in zip(compressed.sources.tolist(), states[compressed.sources], strict=True):
        if first < len(seen["rows"]) and torch.equal(seen["rows"][first], of_frame):
            assert torch.equal(seen["rows"][first], states[source])
            first += 1
    assert first == len(seen["rows"]) == output.masked_frames
    output.loss.backward()
    for name, parameter in compressor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_hubert_masks_what_is_left_and_predicts_the_frames_that_went_into_it() -> None:
    model = _model("hubert", compression_range=(1.0, 1.0))
    assert isinstance(model, HubertForPreTraining)
    waveforms = waveforms_of(*_LENGTHS)
    frames = model.hubert.extract_features(waveforms)
    projected = model.hubert.project(frames, rate=1.0)
    assert projected.compressed is not None
    total = projected.frames.layout.total
    mask = torch.zeros(total, dtype=torch.bool)
    mask[[2, 5]] = True
    labels = torch.arange(frames.layout.total) % 7
    output = model.predict(frames, mask=mask, labels=labels, projected=projected)
    sources = projected.compressed.sources
    rows = torch.tensor([row for row, source in enumerate(sources.tolist()) if source in (2, 5)])
    assert output.masked_frames == len(rows) > 2
    logits = model._logits(model.final_proj(output.features.values[sources[rows]]))
    expected = F.cross_entropy(logits, labels[rows], reduction="sum")
    torch.testing.assert_close(output.prediction_loss, expected.detach())


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_without_the_rows_of_masked_frames_the_others_are_ignored(share: float) -> None:
    """On a GPU, the host would have to wait for the rows that a compressor decides on."""
    model = _model("hubert")
    assert isinstance(model, HubertForPreTraining)
    states = torch.randn(50, model.config.hidden_size, requires_grad=True)
    labels, mask = torch.arange(50) % 7, torch.rand(50, generator=torch.Generator().manual_seed(0)) < share
    results: list[list[Any]] = []
    for rows in (mask.nonzero().squeeze(1), None):
        model.zero_grad()
        states.grad = None
        loss, correct = model._prediction(states, labels, mask, rows)
        loss.backward()
        assert states.grad is not None
        assert not states.grad[~mask].any()
        results.append([loss.detach(), correct, states.grad, model.final_proj.weight.grad, model.label_embeddings.grad])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_the_number_of_masked_frames_may_be_known_to_the_device_only() -> None:
    output = _step(_model("hubert"), waveforms_of(*_LENGTHS), draw_keys(3))
    assert isinstance(output, PredictionOutput)
    other = replace(output, masked_frames=torch.tensor(output.masked_frames))
    assert torch.equal(other.scores()["chance"], output.scores()["chance"])
    module = PretrainModule(_model("hubert"), optimizer=OptimizerConfig(), max_steps=1, seed=0)
    batch: Any = SimpleNamespace(names=("a", "b", "c"), problems=(), duration_s=3.5)
    found, expected = (module._sums(one, batch) for one in (other, output))
    assert expected[_COUNTS.index("masked_frames")] == output.masked_frames > 0
    assert expected[_COUNTS.index("audio_s")] == 3.5
    assert torch.equal(found, expected)


@EVERY_SYSTEM
def test_batches_add_up(system: str) -> None:
    model = _model(system).eval()
    waveforms, keys = waveforms_of(*_LENGTHS), draw_keys(3, generator=torch.Generator().manual_seed(0))
    total = model.speech_encoder.encode(model.speech_encoder.extract_features(waveforms), rate=0.0).features.layout
    weights, ends = torch.rand(total.total), torch.rand(total.total) < 0.3
    whole = _step(model, waveforms, keys, segments=FrameSegments(weights, ends))
    parts = [
        _step(model, Packed.pack([waveform]), key, segments=FrameSegments(weight, end)).loss
        for waveform, key, weight, end in zip(
            waveforms.unpack(), keys.split(1), weights.split(total.lengths), ends.split(total.lengths), strict=True
        )
    ]
    torch.testing.assert_close(whole.loss, torch.stack(parts).sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("kind", "factor"), [("average", 3), ("strided", 2), ("integrate-and-fire", 1)])
def test_a_folder_gives_a_conformer_and_its_compressor_back(kind: str, factor: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = ConformerEncoder(ConformerConfig(**CONFORMER, compressor=kind, compressor_factor=factor)).eval()
    encoder.save_pretrained(tmp_path)
    assert "| sequence compression |" in (tmp_path / "README.md").read_text()
    opened = ConformerEncoder.from_pretrained(tmp_path).eval()
    assert opened.config == encoder.config
    waveforms = waveforms_of(*_LENGTHS)
    options = {"frame_period_ms": 100.0} if kind == "integrate-and-fire" else {}
    with torch.no_grad():
        expected, found = encoder(waveforms, **options), opened(waveforms, **options)
        # Frames must not depend on batch mates.
        alone = [encoder(Packed.pack([waveform]), **options).features.values for waveform in waveforms.unpack()]
    assert torch.equal(found.features.values, expected.features.values)
    assert torch.equal(torch.cat(alone), expected.features.values)
    assert expected.compressed is not None
    wanted = 100.0 if kind == "integrate-and-fire" else 40.0 * factor
    assert expected.compressed.frame_period_ms[-1].item() == pytest.approx(wanted, rel=0.1)
    # A plain encoder has no compressor weights, but it can start the training of a compressor.
    plain = ConformerEncoder(ConformerConfig(**CONFORMER))
    plain.save_pretrained(tmp_path / "plain")
    assert not any("compressor" in key for key in read_weights(tmp_path / "plain"))
    with pytest.raises(ValueError, match="has no compressor"):
        plain(waveforms, rate=0.5)


@torch.no_grad()
def test_rate_zero_is_the_conformer_without_a_compressor() -> None:
    torch.manual_seed(0)
    encoder = ConformerEncoder(ConformerConfig(**CONFORMER, compressor="integrate-and-fire")).eval()
    plain = ConformerEncoder(ConformerConfig(**CONFORMER)).eval()
    plain.load_state_dict({key: value for key, value in encoder.state_dict().items() if "compressor" not in key})
    waveforms = waveforms_of(*_LENGTHS)
    for one, other in zip(encoder(waveforms, rate=0.0).hidden_states, plain(waveforms).hidden_states, strict=True):
        assert torch.equal(one.values, other.values)


def test_the_conformers_multiplications_are_those_that_torch_counts() -> None:
    config = ConformerConfig(**CONFORMER)
    encoder = ConformerEncoder(config).eval()
    seconds = 3.0
    counted = count_multiplications(config, seconds=seconds)
    frames = encoder(waveforms_of(int(16_000 * seconds))).features.layout.total
    dense = torch.randn(frames, 32)
    layer = encoder.encoder.layers[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                F.linear(torch.randn(frames, module.in_features), module.weight)
            elif isinstance(module, torch.nn.Conv1d):
                F.conv1d(torch.randn(1, module.in_channels, frames + 6), module.weight, groups=module.groups)
        scores = dense @ dense.T
        scores @ dense
    assert counted.transformer == config.num_hidden_layers * counter.get_total_flops() / 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mel = torch.randn(1, 80, 298)  # 3 s in windows of 25 ms, one every 10 ms
        for convolution in encoder.subsampling.modules():
            if isinstance(convolution, torch.nn.Conv1d):
                mel = F.conv1d(mel, convolution.weight, stride=2)
        F.linear(mel[0].T, encoder.subsampling.projection.weight)
    assert counted.front_end == counter.get_total_flops() / 2
    free = replace(config, compressor="integrate-and-fire")
    assert describe_compression(free).startswith("integrate-and-fire, at a rate or frame period given at run time")
    assert count_multiplications(free, seconds=seconds, frame_period_ms=80.0).transformer < counted.transformer / 2
