"""Test that accelerated torchaudio encoders return what the original returns for each utterance alone."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastssl
from tests.interop.tiny_models import Adapted, assert_close, assert_padded_by_last
from tests.interop.tiny_torchaudio import VARIANTS, batch_of, make

EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
BATCHES = {"single": [6000], "equal": [5000, 5000], "mixed": [5000, 900, 3300], "extreme": [30000, 400, 719, 399, 0]}


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
            assert_padded_by_last(last[row], count)
            for found in layers:
                assert not found[row, count:].any()
            if count:  # the original fails on shorter waveforms
                alone = waveforms[row : row + 1, :samples]
                assert_close(last[row, :count], original(alone)[0][0], 2e-4, "last")
                for layer, expected in enumerate(original.extract_features(alone)[0]):
                    assert_close(layers[layer][row, :count], expected[0], 2e-4, f"layer {layer}")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_shapes_and_lengths_are_those_of_a_padded_batch_of_the_original(dtype: torch.dtype) -> None:
    original = make("wav2vec2 base, logits")
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, lengths = batch_of([5000, 900])
    waveforms, lengths = nn.functional.pad(waveforms, (0, 3000)), lengths.to(dtype)  # rows longer than every utterance
    with torch.no_grad():
        for given in (lengths, None):
            (found, frames), (expected, expected_frames) = (m(waveforms, given) for m in (model, original))
            assert found.shape == expected.shape
            assert (frames is None) if given is None else torch.equal(frames, expected_frames)
            assert frames is None or frames.dtype == expected_frames.dtype
            found, expected = (m.extract_features(waveforms, given, 2)[0] for m in (model, original))
            assert [x.shape for x in found] == [x.shape for x in expected]


@EVERY_VARIANT
def test_waveforms_too_short_for_a_frame_and_none_at_all(variant: str) -> None:
    model = fastssl.accelerate(make(variant))
    width = VARIANTS[variant].get("aux_num_out", 48)
    with torch.no_grad():
        for waveforms, frames in ((torch.randn(2, 399), 0), (torch.randn(0, 5000), 15), (torch.randn(2, 0), 0)):
            lengths = torch.full((len(waveforms),), waveforms.shape[1])
            for given in (None, lengths):
                assert model(waveforms, given)[0].shape == (len(waveforms), frames, width)
                assert model.extract_features(waveforms, given)[0][2].shape == (len(waveforms), frames, 48)
            assert model(waveforms, lengths)[1].tolist() == [frames] * len(waveforms)


@pytest.mark.parametrize("batch", ["equal", "mixed"])
@EVERY_VARIANT
def test_training_gives_the_loss_and_gradients_of_each_utterance_alone(variant: str, batch: str) -> None:
    original = make(variant).train()
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, lengths = batch_of(BATCHES[batch])
    heard, expected_heard = (waveforms.clone().requires_grad_() for _ in range(2))

    def score(frames: Tensor) -> Tensor:
        return (frames * torch.sin(torch.arange(frames.numel())).view_as(frames)).sum()

    together, frames = model(heard, lengths)
    loss, expected_loss = torch.zeros(()), torch.zeros(())
    for row, samples in enumerate(lengths.tolist()):
        loss = loss + score(together[row, : int(frames[row])])
        expected_loss = expected_loss + score(original(expected_heard[row : row + 1, :samples])[0][0])
    loss.backward()
    expected_loss.backward()
    assert heard.grad is not None
    assert expected_heard.grad is not None
    assert_close(heard.grad, expected_heard.grad, 1e-3)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=1e-3)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    scale = max(float(p.grad.abs().max()) for p in original.parameters() if p.grad is not None)
    for name, parameter in original.named_parameters():
        found = grads[name]
        if parameter.grad is None:
            assert found is None, name
        else:
            assert found is not None, name
            # Attention is invariant to a bias on the keys, so its exact gradient is zero: only rounding remains.
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
    fastssl.accelerate(model)  # a second call changes nothing
    assert fastssl.restore(model) is model
    assert type(model) is kind
    assert not [key for key in vars(model) if "fastssl" in key]


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_are_accelerated(way: str) -> None:
    model = make("wavlm base")
    if way == "pickle":  # PyTorch cannot pickle a module with weight norm
        model.encoder.transformer.pos_conv_embed.conv = nn.Conv1d(48, 48, 16, padding=8, groups=4)
    fastssl.accelerate(model)
    again = pickle.loads(pickle.dumps(model)) if way == "pickle" else copy.deepcopy(model)
    waveforms, lengths = batch_of([5000, 900])
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(waveforms, lengths)[0], model(waveforms, lengths)[0])


def test_the_class_of_an_accelerated_model_makes_others() -> None:
    model = fastssl.accelerate(make("wav2vec2 base"))
    kind = type(model)
    other = kind(model.feature_extractor, model.encoder).eval()
    waveforms, lengths = batch_of([5000, 900])
    with torch.no_grad():
        assert torch.equal(other(waveforms, lengths)[0], model(waveforms, lengths)[0])
    assert type(fastssl.restore(other)) is kind.__mro__[1]


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


@EVERY_VARIANT
def test_batch_mates_do_not_matter_to_speech(variant: str, speech: list[Any]) -> None:
    model = fastssl.accelerate(make(variant))
    lengths = torch.tensor([len(waveform) for waveform in speech])
    padded = nn.utils.rnn.pad_sequence([torch.from_numpy(waveform) for waveform in speech], batch_first=True)
    with torch.no_grad():
        together, frames = model(padded, lengths)
        layers, _ = model.extract_features(padded, lengths)
        for row, waveform in enumerate(speech):
            alone = torch.from_numpy(waveform).unsqueeze(0)
            assert torch.equal(together[row : row + 1, : frames[row]], model(alone)[0])
            for layer, expected in zip(layers, model.extract_features(alone)[0], strict=True):
                assert torch.equal(layer[row : row + 1, : frames[row]], expected)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 4000), min_size=1, max_size=5), extra=st.integers(0, 1000))
def test_any_lengths(lengths: list[int], extra: int) -> None:
    original = make("wav2vec2 base")
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms = nn.functional.pad(batch_of(lengths)[0], (0, extra), value=3.0)
    with torch.no_grad():
        together, frames = model(waveforms, torch.tensor(lengths))
        for row, samples in enumerate(lengths):
            assert_padded_by_last(together[row], int(frames[row]))
            if samples >= 720:  # one frame is too little for the norm over time to be precise
                expected = original(waveforms[row : row + 1, :samples])[0][0]
                assert_close(together[row, : frames[row]], expected, 2e-4)


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
        r"lengths: expected the shape \(2,\).* got \(3,\)": torch.tensor([1, 2, 3]),
        r"lengths: expected the shape \(2,\).* got \(2, 1\)": lengths.unsqueeze(1),
        r"lengths: must be numbers of samples, got torch.bool": lengths > 0,
        r"lengths: must be numbers of samples, got torch.complex64": lengths.to(torch.complex64),
    }
    for message, bad in cases.items():
        for call in (model, model.extract_features):
            with pytest.raises(ValueError, match=message):
                call(waveforms, bad)
    with pytest.raises(TypeError, match="lengths: must be a tensor, got list"):
        model(waveforms, [5000, 900])
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


@pytest.mark.parametrize("variant", ["wav2vec2 base", "wavlm large"])
def test_layer_drop_draws_as_the_original(variant: str) -> None:
    """Includes WavLM, whose first layer computes the position bias that all layers need."""
    original = make(variant, encoder_layer_drop=0.4).train()
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = batch_of([9000, 9000])
    skipped = set()
    for seed in range(16):
        outputs = []
        for m in (model, original):
            torch.manual_seed(seed)
            outputs.append((m(waveforms)[0], torch.rand(1)))
        assert_close(outputs[0][0], outputs[1][0], 2e-4, f"seed {seed}")
        assert torch.equal(outputs[0][1], outputs[1][1])  # both drew equally often
        torch.manual_seed(seed)
        skipped.add(tuple(torch.rand(1).item() <= 0.4 for _ in range(3)))
    assert {(False, False, False), (True, False, False)} <= skipped


def test_dropout_drops_in_training_only() -> None:
    names = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout")
    for name in names:
        model = fastssl.accelerate(make("wav2vec2 base", **{f"encoder_{name}": 0.5}))
        waveforms, lengths = batch_of([5000, 900])
        with torch.no_grad():
            assert torch.equal(model(waveforms, lengths)[0], model(waveforms, lengths)[0])
            model.train()
            assert not torch.equal(model(waveforms, lengths)[0], model(waveforms, lengths)[0]), name


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
        original.aux = nn.Sequential(nn.Conv1d(48, 7, 1), nn.Flatten(0, 1))  # fails without a batch dimension
        original.aux.register_forward_pre_hook(lambda module, args: args[0].transpose(1, 2))
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = batch_of([5000, 5000])
    with torch.no_grad():
        assert_close(model(waveforms)[0], original(waveforms)[0], 2e-4)


@pytest.mark.parametrize(
    "path",
    [
        "feature_extractor",
        "feature_extractor.conv_layers.0",
        "feature_extractor.conv_layers.0.conv",
        "encoder",
        "encoder.feature_projection",
        "encoder.transformer",
        "encoder.transformer.pos_conv_embed",
        "encoder.transformer.pos_conv_embed.conv",
        "encoder.transformer.layers.1",
        "encoder.transformer.layers.1.attention",
        "encoder.transformer.layers.1.feed_forward",
    ],
)
def test_the_original_code_runs_where_a_module_that_is_not_called_has_a_hook(path: str) -> None:
    model = fastssl.accelerate(make("wav2vec2 base"))
    waveforms, _ = batch_of([5000])
    calls: list[str] = []

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            return [model(waveforms)[0], *model.extract_features(waveforms)[0]]

    expected = outputs()
    hook = model.get_submodule(path).register_forward_hook(lambda *args: calls.append(path))
    with pytest.warns(UserWarning, match="has a hook.*, so the original code runs"):
        watched = outputs()
    # Hooks run on `forward`. For these two modules, `extract_features` calls other methods instead.
    assert len(calls) == (1 if path in ("encoder", "encoder.transformer") else 2)
    hook.remove()
    for found, expected_one in zip(watched, expected, strict=True):
        assert_close(found, expected_one, 2e-4)
    assert all(torch.equal(a, b) for a, b in zip(outputs(), expected, strict=True))
