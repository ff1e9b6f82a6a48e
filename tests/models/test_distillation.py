"""Test students: loss against formula, published sizes, initial weights, and frames that match the teacher's."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastssl
from benchmarks.recipes import recipe_model
from fastssl import cli
from fastssl.data.segments import FrameSegments
from fastssl.models.distillation import (
    DistillationConfig,
    DistillationModel,
    PredictionHeads,
    initialise_from_teacher,
)
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.nn.random import draw_keys
from fastssl.packing import Packed
from tests.models.test_compressed import SHAPE, waveforms_of

TEACHER = EncoderConfig(**SHAPE | {"num_hidden_layers": 6, "hidden_size": 48})


def make(**changes: Any) -> DistillationModel:
    torch.manual_seed(0)
    return DistillationModel(DistillationConfig(**SHAPE | changes).of_teacher(TEACHER))


def targets_of(model: DistillationModel, waveforms: Packed) -> list[Tensor]:
    torch.manual_seed(1)
    teacher = Encoder(TEACHER).eval()
    with torch.no_grad():
        states = teacher(waveforms).hidden_states
    return [states[layer].values for layer in model.config.targets]


def loss_by_loop(predictions: list[Tensor], targets: list[Tensor]) -> float:
    total = 0.0
    for prediction, target in zip(predictions, targets, strict=True):
        for p, h in zip(prediction.double(), target.double(), strict=True):
            cosine = (p @ h) / (p.norm() * h.norm())
            total += ((p - h).abs().mean() - torch.log(torch.sigmoid(cosine))).item()
    return total


def test_prediction_heads_and_their_loss_equal_the_formula() -> None:
    """Compare with s3prl's formula: a linear map and GELU, then one linear map per layer, each on its own part."""
    model = make()
    waveforms = waveforms_of(16_000, 9_000)
    targets = targets_of(model, waveforms)
    output = model(waveforms, keys=draw_keys(2), targets=targets)
    assert isinstance(model.heads, PredictionHeads)
    hidden = F.gelu(model.heads.hidden(model.hubert(waveforms).features.values))
    parts = zip(model.heads.outputs, hidden.split(48, dim=1), strict=True)
    predictions = [head(part) for head, part in parts]
    assert len(predictions) == 3
    assert output.loss.item() == pytest.approx(loss_by_loop(predictions, targets), rel=1e-5)
    assert output.masked_frames == len(targets[0])
    scores = output.scores()
    assert set(scores) == set(model.score_names)
    cosines = [F.cosine_similarity(p, h).sum().item() for p, h in zip(predictions, targets, strict=True)]
    assert scores["cosine_similarity"].item() == pytest.approx(sum(cosines) / 3, rel=1e-5)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if "masked" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_every_layer_learns_by_l2l() -> None:
    """The loss sums over layers. (A public reimplementation overwrites the sum, so only the last layer learns.)"""
    model = make(distillation="l2l", num_hidden_layers=3, feature_grad_mult=0.0)
    assert model.config.targets == (2, 4, 6)
    waveforms = waveforms_of(16_000, 9_000)
    targets = targets_of(model, waveforms)
    output = model(waveforms, keys=draw_keys(2), targets=targets)
    states = model.hubert(waveforms).hidden_states[1:]
    assert isinstance(model.heads, torch.nn.ModuleList)
    predictions = [head(state.values) for head, state in zip(model.heads, states, strict=True)]
    assert output.loss.item() == pytest.approx(loss_by_loop(predictions, targets), rel=1e-5)
    output.loss.backward()
    for name, parameter in model.heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("changes", "layers", "expected"),
    [
        ({}, 12, (4, 8, 12)),
        ({}, 24, (8, 16, 24)),
        ({}, 6, (2, 4, 6)),
        ({"teacher_layers": (4, 12)}, 12, (4, 12)),
        ({}, 2, (1, 2)),
        ({}, 1, (1,)),
        ({"distillation": "l2l", "num_hidden_layers": 12}, 12, tuple(range(1, 13))),
        ({"distillation": "l2l", "num_hidden_layers": 4}, 6, (2, 3, 5, 6)),
        ({"distillation": "l2l", "num_hidden_layers": 3}, 12, (4, 8, 12)),
        # Halves (4.5, 13.5, 22.5, 31.5, 40.5) are rounded up.
        ({"distillation": "l2l", "num_hidden_layers": 10}, 45, (5, 9, 14, 18, 23, 27, 32, 36, 41, 45)),
        ({"distillation": "l2l", "num_hidden_layers": 12}, 6, (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6)),
    ],
)
def test_which_layers_are_predicted(changes: dict[str, Any], layers: int, expected: tuple[int, ...]) -> None:
    assert DistillationConfig(teacher_num_hidden_layers=layers, **changes).targets == expected


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("distilhubert", 23.49),
        ("distil-3l-one", 30.58),
        ("distil-12l-half", 26.87),
        ("distil-tiny", 1.33),
        ("distil-tiny-ofa", 1.41),
    ],
)
def test_sizes_are_the_published_ones_and_those_of_the_readme(name: str, millions: float) -> None:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Encoder(recipe_model(name)).parameters())
    assert round(parameters / 1e6, 2) == millions


def test_sizes_of_the_grid() -> None:
    """The recipe's comment lists shapes and their numbers of parameters; the numbers must be right."""
    recipe = (Path(cli.__file__).parent.parent / "recipes" / "distil-12l-half.yaml").read_text()
    grid = re.findall(r"(\d+) x (\d+), (\d+) \(([\d.]+) M\)", recipe)
    assert len(grid) == 12
    for point in grid:
        layers, width, heads = map(int, point[:3])
        # Attention on a GPU needs a head width that is a multiple of eight.
        assert width % (8 * heads) == width % 16 == 0
        shape = dataclasses.replace(
            recipe_model("distil-12l-half"),
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=4 * width,
        )
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in Encoder(shape).parameters())
        assert round(parameters / 1e6, 2) == float(point[3]), point


def test_a_student_begins_with_the_teachers_first_layers_where_they_fit() -> None:
    torch.manual_seed(1)
    teacher = Encoder(TEACHER)
    as_wide = make(hidden_size=48, num_hidden_layers=2, feat_proj_layer_norm=True).hubert
    copied = initialise_from_teacher(as_wide, teacher)
    assert set(copied) == set(as_wide.state_dict())
    for name, tensor in as_wide.state_dict().items():
        assert torch.equal(tensor, teacher.state_dict()[name]), name
    narrower = make(hidden_size=32, feat_proj_layer_norm=True).hubert
    before = {name: tensor.clone() for name, tensor in narrower.state_dict().items()}
    copied = initialise_from_teacher(narrower, teacher)
    assert {name.split(".")[0] for name in copied} >= {"feature_extractor", "feature_projection"}
    for name, tensor in narrower.state_dict().items():
        assert torch.equal(tensor, teacher.state_dict()[name] if name in copied else before[name]), name
    assert any(name not in copied for name in before)


@pytest.mark.parametrize("samples", [400, 719, 720, 96_480, 96_719, 96_800])
def test_frames_of_teacher_and_student_always_agree(samples: int) -> None:
    """Includes 301 and 302 frames, lengths at which s3prl fails."""
    model = make()
    waveforms = waveforms_of(samples, 5_000)
    output = model(waveforms, keys=draw_keys(2), targets=targets_of(model, waveforms))
    assert output.masked_frames == (samples - 400) // 320 + 1 + 15
    assert output.loss.isfinite()


def test_padding_and_batch_mates_add_nothing() -> None:
    model = make().eval()
    waveforms = waveforms_of(30_000, 9_000, 400)
    together = model(waveforms, keys=draw_keys(3), targets=targets_of(model, waveforms)).loss
    alone = []
    for waveform in waveforms.unpack():
        one = Packed.pack([waveform])
        alone.append(model(one, keys=draw_keys(1), targets=targets_of(model, one)).loss)
    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-5, atol=0)
    nothing = Packed(torch.empty(0, 1), fastssl.Layout.from_lengths([]))
    empty = model(nothing, keys=draw_keys(0), targets=[torch.empty(0, 48)] * 3)
    assert empty.loss == 0
    assert empty.masked_frames == 0


def test_a_compressed_student_predicts_every_frame_of_the_teacher() -> None:
    model = make(compressor="integrate-and-fire", compression_range=(0.8, 0.8))
    waveforms = waveforms_of(30_000, 9_000)
    targets = targets_of(model, waveforms)
    total = len(targets[0])
    segments = FrameSegments(torch.full((total,), 0.25), torch.arange(total) % 4 == 3)
    output = model(waveforms, keys=draw_keys(2), targets=targets, segments=segments)
    assert output.features.layout.total < 0.9 * total
    assert output.masked_frames == total
    again = model.hubert(waveforms, rate=0.8)
    assert isinstance(model.heads, PredictionHeads)
    assert again.compressed is not None
    predictions = [again.compressed.upsample(prediction) for prediction in model.heads(again.features.values)]
    assert output.distillation_loss.item() == pytest.approx(loss_by_loop(predictions, targets), rel=1e-4)
    scores = output.scores()
    guidance = 0.05 * scores["segment_loss"] + 0.5 * scores["frame_loss"]
    assert output.loss.item() == pytest.approx((output.distillation_loss + guidance).item(), rel=1e-5)
    output.loss.backward()
    assert model.hubert.compressor is not None
    assert all(parameter.grad is not None for parameter in model.hubert.compressor.parameters())


def test_transformers_opens_students(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    student = make().hubert.eval()
    student.save_pretrained(tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "HubertModel"
    (waveform,) = waveforms_of(9_000).unpack()
    with torch.no_grad():
        expected = theirs(waveform.view(1, -1)).last_hidden_state[0]
        found = student(Packed.pack([waveform])).features.values
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_rejects_bad_input() -> None:
    model = make()
    waveforms = waveforms_of(9_000)
    targets = targets_of(model, waveforms)
    for wrong in (targets[:2], [target[:-1] for target in targets], [target[:, :-1] for target in targets]):
        with pytest.raises(ValueError, match=r"targets: expected 3 of shape \(27, 48\)"):
            model(waveforms, keys=draw_keys(1), targets=wrong)
    cases: dict[str, dict[str, Any]] = {
        "model_type: this system trains a hubert encoder, got 'wav2vec2'": {"model_type": "wav2vec2"},
        "distillation: must be one of pred, l2l": {"distillation": "both"},
        "teacher_layers: must be at least 0, got -1": {"teacher_layers": (-1, 4)},
        "teacher_layers: l2l needs one for each of the student's 12 layers, got 2": {
            **{"distillation": "l2l", "num_hidden_layers": 12},
            "teacher_layers": (4, 12),
        },
        "num_hidden_layers: l2l needs at least one layer, got 0": {"distillation": "l2l", "num_hidden_layers": 0},
        "cosine_loss_weight": {"cosine_loss_weight": -1.0},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            DistillationConfig(**options)
    strides = EncoderConfig(conv_stride=(5, 2, 2, 2, 2, 2, 1))
    with pytest.raises(ValueError, match=r"conv_stride: the teacher has .*they must be equal"):
        DistillationConfig().of_teacher(strides)
    with pytest.raises(ValueError, match=r"teacher_layers: the teacher has layers 0 to 6, got \[4, 8\]"):
        DistillationConfig(teacher_layers=(4, 8)).of_teacher(TEACHER)


@pytest.mark.parametrize(
    "recipe", ["distilhubert", "distil-3l-one", "distil-12l-half", "distil-tiny", "distil-tiny-ofa"]
)
def test_which_students_have_a_norm_before_the_projection(recipe: str) -> None:
    """DistilHuBERT has none in s3prl; its teacher, and our other students, have one."""
    with torch.device("meta"):
        student = Encoder(recipe_model(recipe))
    assert ("feature_projection.layer_norm.weight" in student.state_dict()) == (recipe != "distilhubert")


def test_a_student_without_the_norm_starts_from_a_teacher_that_has_it() -> None:
    """Its projection gets the frames as the front end gives them, and the teacher's weights."""
    teacher = Encoder(TEACHER)
    student = make(hidden_size=TEACHER.hidden_size).hubert.eval()
    copied = initialise_from_teacher(student, teacher)
    assert "feature_projection.projection.weight" in copied
    assert not any(name.startswith("feature_projection.layer_norm") for name in copied)
    frames = Packed.pack([torch.randn(7, TEACHER.conv_dim[-1])])
    projection = teacher.feature_projection.projection
    expected = F.linear(frames.values, projection.weight, projection.bias)
    assert torch.allclose(student.project(frames).frames.values, expected, atol=1e-6)
