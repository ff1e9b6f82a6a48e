"""Accelerated torchaudio encoders: the numbers of the original on each utterance alone, through the same calls."""

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastssl

try:
    from torchaudio import models, pipelines
    from torchaudio.pipelines._wav2vec2 import utils as wrappers
except (ImportError, OSError, RuntimeError) as error:  # torchaudio refuses to load beside some versions of torch
    pytest.skip(f"torchaudio does not import here: {error}", allow_module_level=True)

TINY: dict[str, Any] = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2,
    "extractor_conv_bias": False,
    "encoder_embed_dim": 48,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 3,
    "encoder_num_heads": 4,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 64,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.0,
    "aux_num_out": None,
}
LARGE = {"extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True}
WAVLM = {"encoder_num_buckets": 20, "encoder_max_distance": 25}
VARIANTS: dict[str, dict[str, Any]] = {
    "wav2vec2 base": {},
    "wav2vec2 large": LARGE,
    "wav2vec2 base, layer norm": {"extractor_mode": "layer_norm", "encoder_pos_conv_kernel": 15},
    "wav2vec2 large, group norm": LARGE | {"extractor_mode": "group_norm"},
    "wav2vec2 base, logits": {"aux_num_out": 7},
    "wavlm base": WAVLM,
    "wavlm large": WAVLM | LARGE,
}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
BATCHES = {"single": [6000], "equal": [5000, 5000], "mixed": [5000, 900, 3300], "extreme": [30000, 400, 719, 399, 0]}


def make(variant: str, **options: Any) -> Any:
    settings = VARIANTS[variant]
    torch.manual_seed(0)
    factory = models.wavlm_model if variant.startswith("wavlm") else models.wav2vec2_model
    return factory(**(TINY | settings | options)).eval()


def batch_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Waveforms with noise in their padding, which nobody may hear."""
    generator = torch.Generator().manual_seed(len(lengths))
    return torch.randn(len(lengths), max(lengths), generator=generator), torch.tensor(lengths)


def assert_close(found: Tensor, expected: Tensor, relative: float, what: str = "") -> None:
    """In max norm."""
    assert found.shape == expected.shape, what
    assert (found - expected).abs().max() <= relative * expected.abs().max(), what


@pytest.mark.parametrize("batch", BATCHES)
@EVERY_VARIANT
def test_equals_the_original_on_each_utterance_alone(variant: str, batch: str) -> None:
    original = make(variant)
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, lengths = batch_of(BATCHES[batch])
    with torch.no_grad():
        last, frames = model(waveforms, lengths)
        layers, frames_of_layers = model.extract_features(waveforms, lengths)
        assert len(layers) == 3
        assert frames.dtype == lengths.dtype
        assert torch.equal(frames, frames_of_layers)
        for row, samples in enumerate(lengths.tolist()):
            count = int(frames[row])
            assert count == max(0, (samples - 400) // 320 + 1)
            for found in (last, *layers):
                assert not found[row, count:].any()
            if count:  # the original cannot take fewer samples
                alone = waveforms[row : row + 1, :samples]
                assert_close(last[row, :count], original(alone)[0][0], 2e-4, "last")
                for layer, expected in enumerate(original.extract_features(alone)[0]):
                    assert_close(layers[layer][row, :count], expected[0], 2e-4, f"layer {layer}")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_shapes_and_lengths_are_those_of_a_padded_batch_of_the_original(dtype: torch.dtype) -> None:
    original = make("wav2vec2 base, logits")
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, lengths = batch_of([5000, 900])
    waveforms, lengths = nn.functional.pad(waveforms, (0, 3000)), lengths.to(dtype)  # rows longer than the longest
    with torch.no_grad():
        for given in (lengths, None):
            (found, frames), (expected, expected_frames) = (m(waveforms, given) for m in (model, original))
            assert found.shape == expected.shape
            assert (frames is None) if given is None else torch.equal(frames, expected_frames)
            assert frames is None or frames.dtype == expected_frames.dtype
            found, expected = (m.extract_features(waveforms, given, 2)[0] for m in (model, original))
            assert [x.shape for x in found] == [x.shape for x in expected]


@pytest.mark.parametrize("batch", ["equal", "mixed"])
@EVERY_VARIANT
def test_training_gives_the_loss_and_gradients_of_each_utterance_alone(variant: str, batch: str) -> None:
    original = make(variant).train()
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, lengths = batch_of(BATCHES[batch])

    def score(frames: Tensor) -> Tensor:
        return (frames * torch.sin(torch.arange(frames.numel())).view_as(frames)).sum()

    together, frames = model(waveforms, lengths)
    loss, expected_loss = torch.zeros(()), torch.zeros(())
    for row, samples in enumerate(lengths.tolist()):
        loss = loss + score(together[row, : int(frames[row])])
        expected_loss = expected_loss + score(original(waveforms[row : row + 1, :samples])[0][0])
    loss.backward()
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=1e-3)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    scale = max(float(p.grad.abs().max()) for p in original.parameters() if p.grad is not None)
    for name, parameter in original.named_parameters():
        found = grads[name]
        if parameter.grad is None:
            assert found is None, name
        else:
            assert found is not None, name
            # The softmax does not see a bias on the keys: its gradient is rounding and nothing else.
            allowed = 1e-3 * float(parameter.grad.abs().max()) + 1e-6 * scale
            assert (found - parameter.grad).abs().max() <= allowed, name


@pytest.mark.parametrize("variant", ["wav2vec2 base", "wav2vec2 large", "wavlm base"])
def test_bf16_is_no_further_from_the_truth_than_the_original(variant: str) -> None:
    exact = make(variant).double()
    original = copy.deepcopy(exact).bfloat16()
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms = batch_of([9000])[0].bfloat16()
    with torch.no_grad():
        truth = exact(waveforms.double())[0]
        found, expected = (m(waveforms)[0].double() for m in (model, original))
    allowed = 2 * (expected - truth).abs().max() + 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (found - truth).abs().max() <= allowed


def test_parameters_are_shared_and_restored() -> None:
    model = make("wav2vec2 base")
    names, ids, kind = list(model.state_dict()), [id(p) for p in model.parameters()], type(model)
    assert fastssl.accelerate(model) is model
    assert list(model.state_dict()) == names
    assert [id(p) for p in model.parameters()] == ids
    assert isinstance(model, kind)
    assert type(model) is not kind
    assert type(model).__name__ == kind.__name__
    fastssl.accelerate(model)  # again: nothing happens
    assert fastssl.restore(model) is model
    assert type(model) is kind
    assert not [key for key in vars(model) if "fastssl" in key]


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_are_accelerated(way: str) -> None:
    model = make("wavlm base")
    if way == "pickle":  # PyTorch pickles no module with weight norm
        model.encoder.transformer.pos_conv_embed.conv = nn.Conv1d(48, 48, 16, padding=8, groups=4)
    fastssl.accelerate(model)
    again = pickle.loads(pickle.dumps(model)) if way == "pickle" else copy.deepcopy(model)
    waveforms, lengths = batch_of([5000, 900])
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(waveforms, lengths)[0], model(waveforms, lengths)[0])


@EVERY_VARIANT
def test_batch_mates_do_not_matter(variant: str) -> None:
    model = fastssl.accelerate(make(variant))
    for batch in ([5000, 900, 3300], [400 + 320 * frames for frames in range(20)]):
        waveforms, lengths = batch_of(batch)
        with torch.no_grad():
            together, frames = model(waveforms, lengths)
            for row, samples in enumerate(batch):
                alone, _ = model(waveforms[row : row + 1, :samples])
                assert torch.equal(together[row : row + 1, : frames[row]], alone)


def test_waveforms_of_any_strides() -> None:
    model = fastssl.accelerate(make("wav2vec2 base"))
    waveforms, lengths = batch_of([5000, 900])
    strided = waveforms.t().contiguous().t()
    every_second = torch.stack([waveforms, waveforms], 2).flatten(1)[:, ::2]
    with torch.no_grad():
        expected = model(waveforms, lengths)[0]
        assert torch.equal(model(strided, lengths)[0], expected)
        assert torch.equal(model(every_second, lengths)[0], expected)


def test_bad_arguments_are_named() -> None:
    model = fastssl.accelerate(make("wav2vec2 base"))
    waveforms, lengths = batch_of([5000, 900])
    cases = {
        r"lengths: expected \(2,\).* got \(3,\)": torch.tensor([1, 2, 3]),
        r"lengths: expected \(2,\).* got \(2, 1\)": lengths.unsqueeze(1),
        r"lengths: must be integers, got torch.float32": lengths.float(),
        r"lengths: must be integers, got torch.bool": lengths > 0,
        r"lengths: row 0 has 5001 samples, but the waveforms are \(2, 5000\)": lengths + 1,
        r"lengths: row 1 has -100 samples": lengths - 1000,
    }
    for message, bad in cases.items():
        for call in (model, model.extract_features):
            with pytest.raises(ValueError, match=message):
                call(waveforms, bad)
    with pytest.raises(ValueError, match=r"waveforms: expected \(B, T\)"):
        model(waveforms.unsqueeze(1))
    for count in (0, 4):
        with pytest.raises(ValueError, match="num_layers: must be from 1 to 3"):
            model.extract_features(waveforms, lengths, count)


def test_norm_over_padding_is_that_of_torchaudio() -> None:
    original = make("wav2vec2 base")
    model = fastssl.accelerate(copy.deepcopy(original), norm="padded")
    waveforms, lengths = batch_of([5000, 1900])
    with torch.no_grad():
        found, frames = model(waveforms, lengths)
        expected, _ = original(waveforms, lengths)
        alone, _ = original(waveforms[1:, :1900])
    assert_close(found[1, : frames[1]], expected[1, : frames[1]], 2e-4)
    with pytest.raises(AssertionError):
        assert_close(found[1:, : frames[1]], alone, 1e-2)


def test_what_is_not_known_or_not_served_is_named() -> None:
    with pytest.raises(ValueError, match=r"Linear has no encoder.*torchaudio\.Wav2Vec2Model"):
        fastssl.accelerate(nn.Linear(2, 2))
    for path in ("feature_extractor", "encoder.transformer", "encoder.transformer.layers.1"):
        model = make("wav2vec2 base")
        model.set_submodule(path, nn.Identity())
        with pytest.raises(
            ValueError, match=rf"model: {path} is a torch\.nn\.modules\.linear\.Identity; only torchaudio"
        ):
            fastssl.accelerate(model)
        assert type(model) is models.Wav2Vec2Model
    model = make("wav2vec2 base")
    model.feature_extractor.conv_layers[0].layer_norm = nn.GroupNorm(4, 32)
    with pytest.raises(ValueError, match=r"conv_layers\.0\.layer_norm has 4 groups for 32 channels"):
        fastssl.accelerate(model)


@pytest.mark.parametrize("variant", ["wav2vec2 base", "wavlm large"])
def test_layer_drop_draws_as_the_original(variant: str) -> None:
    """Of WavLM, the first layer too: without it the original has no position bias."""
    original = make(variant, encoder_layer_drop=0.4).train()
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = batch_of([9000, 9000])
    for seed in range(6):
        outputs = []
        for m in (model, original):
            torch.manual_seed(seed)
            outputs.append((m(waveforms)[0], torch.rand(1)))
        assert_close(outputs[0][0], outputs[1][0], 2e-4, f"seed {seed}")
        assert torch.equal(outputs[0][1], outputs[1][1])  # as many draws


def test_dropout_drops_in_training_only() -> None:
    names = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout")
    for name in names:
        model = fastssl.accelerate(make("wav2vec2 base", **{f"encoder_{name}": 0.5}))
        waveforms, lengths = batch_of([5000, 900])
        with torch.no_grad():
            assert torch.equal(model(waveforms, lengths)[0], model(waveforms, lengths)[0])
            model.train()
            assert not torch.equal(model(waveforms, lengths)[0], model(waveforms, lengths)[0]), name


class Adapted(nn.Module):
    """As LoRA puts it in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


@pytest.mark.parametrize("variant", ["wav2vec2 base, logits", "wavlm base"])
def test_layers_in_the_place_of_linear_ones_and_hooks_are_called(variant: str) -> None:
    original = make(variant)
    for layer in original.encoder.transformer.layers:
        layer.feed_forward.intermediate_dense = Adapted(layer.feed_forward.intermediate_dense)
        if variant.startswith("wavlm"):
            layer.attention.attention.out_proj = Adapted(layer.attention.attention.out_proj)
        else:
            layer.attention.q_proj = Adapted(layer.attention.q_proj)
        layer.feed_forward.output_dense.register_forward_hook(lambda module, args, out: 2 * out)
    if original.aux is not None:
        original.aux = nn.Sequential(nn.Conv1d(48, 7, 1), nn.Flatten(0, 1))  # it takes batches only
        original.aux.register_forward_pre_hook(lambda module, args: args[0].transpose(1, 2))
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = batch_of([5000, 5000])
    with torch.no_grad():
        assert_close(model(waveforms)[0], original(waveforms)[0], 2e-4)


@pytest.mark.parametrize("bundle", ["WAV2VEC2_ASR_BASE_960H", "HUBERT_ASR_LARGE", "WAVLM_BASE_PLUS"])
def test_wrappers_of_pipelines(bundle: str) -> None:
    options = {"apply_log_softmax": True, "append_star": True, "normalize_waveform": "LARGE" in bundle}
    original = wrappers._extend_model(make("wavlm base" if "WAVLM" in bundle else "wav2vec2 base, logits"), **options)
    model = fastssl.accelerate(copy.deepcopy(original))
    assert type(model) is type(original)
    waveforms, _ = batch_of([5000])
    with torch.no_grad():
        assert_close(model(waveforms)[0], original(waveforms)[0], 2e-4)
        for found, expected in zip(*(m.extract_features(waveforms)[0] for m in (model, original)), strict=True):
            assert_close(found, expected, 2e-4)


FACTORIES = [name for name in models.__dict__ if name.startswith(("wav2vec2_", "hubert_", "wavlm_"))]
BUNDLES = [name for name, value in vars(pipelines).items() if isinstance(value, pipelines.Wav2Vec2Bundle)]


@pytest.mark.parametrize("name", [name for name in FACTORIES if "pretrain" not in name and not name.endswith("_model")])
def test_every_factory_is_served(name: str) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
    assert type(fastssl.accelerate(model)) is not models.Wav2Vec2Model


def test_every_pipeline_is_served() -> None:
    assert len(BUNDLES) > 20
    made: dict[str, nn.Module] = {}
    for name in BUNDLES:
        bundle = getattr(pipelines, name)
        settings = bundle._params | {"encoder_num_layers": 1, "aux_num_out": None}
        if repr(settings) not in made:
            with torch.device("meta"):
                made[repr(settings)] = fastssl.accelerate(wrappers._get_model(bundle._model_type, settings))
    assert all(type(model) is not models.Wav2Vec2Model for model in made.values())


def test_hubert_pretraining_computes_what_it_did() -> None:
    """It calls the parts of its encoder by itself."""
    options = {key: value for key, value in TINY.items() if key != "aux_num_out"}
    heads = {"mask_prob": 0.8, "mask_selection": "static", "mask_other": 0.0, "mask_length": 3, "final_dim": 16}
    spaces = {"no_mask_overlap": False, "mask_min_space": 1, "skip_masked": False, "skip_nomask": False}
    channels = {
        "mask_channel_prob": 0.0,
        "mask_channel_selection": "static",
        "mask_channel_other": 0.0,
        "mask_channel_length": 10,
        "no_mask_channel_overlap": False,
        "mask_channel_min_space": 1,
    }
    torch.manual_seed(0)
    original = models.hubert_pretrain_model(
        **(options | heads | spaces | channels), num_classes=5, feature_grad_mult=0.1
    )
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, lengths = batch_of([9000, 7000])
    labels = torch.randint(5, (2, 27))
    outputs = []
    for m in (model, original):
        torch.manual_seed(1)
        outputs.append(m(waveforms, labels, lengths))
    for found, expected in zip(*outputs, strict=True):
        assert torch.equal(found, expected)
    with torch.no_grad():
        alone = original.wav2vec2(waveforms[:1])[0]
        assert_close(model.wav2vec2(waveforms[:1])[0], alone, 2e-4)


def test_torchaudio_is_not_imported_unless_somebody_did() -> None:
    """It may be broken, and Transformers' models are served all the same."""
    code = """
import sys
from torch import nn
import fastssl
class Broken:
    def find_spec(self, name, path=None, target=None):
        assert name != "torchaudio", "imported"
sys.meta_path.insert(0, Broken())
fastssl.restore(nn.Linear(1, 1))
try:
    fastssl.accelerate(nn.Linear(1, 1))
except ValueError as error:
    assert "torchaudio.Wav2Vec2Model" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
