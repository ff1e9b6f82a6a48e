"""Test `fastssl.validate`: it passes where models agree, names where they begin to differ, and changes no model."""

import copy
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastssl
from fastssl.interop import in_place
from fastssl.interop import transformers as transformers_code
from fastssl.interop.speech_like import speech_like
from fastssl.interop.validation_report import Comparison
from fastssl.kernels import gpus
from fastssl.nn import SequenceCompressor
from tests.interop.tiny_models import EVERY_ACCELERATED_VARIANT, FAMILIES, TINY, Adapted, transformers_model

transformers = pytest.importorskip("transformers")
SHORT = (0.15, 0.4)
TORCHAUDIO = ["wav2vec2 base", "wav2vec2 large, group norm", "wav2vec2 base, logits", "wavlm base", "wavlm large"]
RANDOM: dict[str, Any] = dict.fromkeys(
    ["hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop", "mask_time_prob"],
    0.4,
)


def make_torchaudio(variant: str, **options: Any) -> Any:
    from tests.interop import tiny_torchaudio

    return tiny_torchaudio.make(variant, **options)


def names(report: fastssl.ValidationReport) -> list[str]:
    return [one.name for one in report.comparisons]


@EVERY_ACCELERATED_VARIANT
def test_every_architecture_of_transformers_agrees(variant: str) -> None:
    """What is random in training is off: dropout, layer drop and SpecAugment."""
    report = fastssl.validate(transformers_model(variant, **RANDOM), seconds=SHORT)
    assert "input of encoder.layers.0" in names(report)
    assert "output of encoder.layers.2" in names(report)
    assert "gradients of encoder.layers.2" in names(report)
    assert all(one.in_a_batch is not None and one.allowed < 1e-4 for one in report.comparisons)
    assert any(one.difference > 0 for one in report.comparisons)


@pytest.mark.parametrize("variant", FAMILIES)
def test_an_accelerated_model_is_compared_with_its_original(variant: str) -> None:
    report = fastssl.validate(fastssl.accelerate(transformers_model(variant)), seconds=SHORT, training=False)
    assert not report.wrong
    assert any(one.difference > 0 for one in report.comparisons)
    assert not any("gradients" in one for one in names(report))


@pytest.mark.parametrize("variant", TORCHAUDIO)
def test_every_architecture_of_torchaudio_agrees(variant: str) -> None:
    random_parts = {
        "encoder_dropout": 0.4,
        "encoder_attention_dropout": 0.4,
        "encoder_layer_drop": 0.4,
        "encoder_projection_dropout": 0.4,
        "encoder_ff_interm_dropout": 0.4,
    }
    report = fastssl.validate(make_torchaudio(variant, **random_parts), seconds=SHORT)
    assert "output of encoder.transformer.layers.2" in names(report)
    assert ("logits" if "logits" in variant else "output of the encoder") in names(report)
    assert "gradients of encoder.transformer.layers.0" in names(report)


@pytest.mark.parametrize("way", ["weights", "autocast"])
@pytest.mark.parametrize("variant", ["wav2vec2 large", "wavlm base"])
def test_bf16_is_compared_with_fp32(variant: str, way: str) -> None:
    model = transformers_model(variant)
    model = model.bfloat16() if way == "weights" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        report = fastssl.validate(model, seconds=SHORT)
    assert (report.dtype, report.exact_dtype) == ("bfloat16", "float32")
    last = report.comparisons[names(report).index("last hidden state")]
    assert 1e-3 < last.rounding < last.allowed < 1
    assert "in bfloat16" in str(report)


def off_by(
    change: float, op: Callable[..., Any], *, calls: int | None = None, only: Callable[..., bool] | None = None
) -> Any:
    """Return an op with an error in one place of its result, relative to its norm; maybe in one of three calls only."""
    done = -1

    def wrong(x: Tensor, *args: Any, **options: Any) -> Any:
        nonlocal done
        out = op(x, *args, **options)
        done += 1
        values, *rest = out if isinstance(out, tuple) else (out,)
        if (calls is None or done % 3 == calls) and (only is None or only(*args)):
            error = torch.zeros_like(values)
            error.view(len(values), -1)[len(values) // 2, 0] = change
            values = values + error * values.detach().abs().max()
        return (values, *rest) if isinstance(out, tuple) else values

    return wrong


@pytest.mark.parametrize(
    ("op", "calls", "first"),
    [
        ("strided_conv_stack", None, "front end"),
        ("positional_conv", None, "input of encoder.layers.0"),
        ("varlen_attention", 0, "output of encoder.layers.0"),
        ("varlen_attention", 2, "output of encoder.layers.2"),
        ("bias_gelu_dropout", 1, "output of encoder.layers.1"),
    ],
)
def test_it_names_the_first_layer_that_a_wrong_kernel_reaches(
    op: str, calls: int | None, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers_model("wav2vec2 base")
    monkeypatch.setattr(fastssl.ops, op, off_by(1e-3, getattr(fastssl.ops, op), calls=calls))
    with pytest.raises(fastssl.ValidationError, match=rf"differs .* first in the {first}: by .* is allowed") as caught:
        fastssl.validate(model, seconds=SHORT, training=False)
    report = caught.value.report
    assert report.wrong[0].name == first
    assert [one for one in report.comparisons if one.is_right] == list(report.comparisons[: names(report).index(first)])
    assert f"{first} " in str(report)
    assert "DIFFERS" in str(report)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_it_finds_what_is_wrong_in_a_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_several(*args: Any) -> bool:
        return any(isinstance(one, fastssl.Layout) and len(one.lengths) > 1 for one in args)

    monkeypatch.setattr(fastssl.ops, "varlen_attention", off_by(1e-3, fastssl.ops.varlen_attention, only=of_several))
    with pytest.raises(fastssl.ValidationError, match=r"first in the output of encoder\.layers\.0") as caught:
        fastssl.validate(transformers_model("hubert base"), seconds=SHORT)
    first = caught.value.report.wrong[0]
    assert first.difference <= first.allowed < first.in_a_batch  # type: ignore[operator]


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.001 * grad


def test_it_names_the_last_layer_with_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = fastssl.ops.varlen_attention
    monkeypatch.setattr(
        fastssl.ops,
        "varlen_attention",
        lambda q, *rest, **options: _WrongGradient.apply(attention(q, *rest, **options)),
    )
    with pytest.raises(fastssl.ValidationError, match=r"first in the gradients of encoder\.layers\.2 \(encoder.*_proj"):
        fastssl.validate(transformers_model("data2vec"), seconds=SHORT)
    assert not fastssl.validate(transformers_model("data2vec"), seconds=SHORT, training=False).wrong


def test_a_result_that_is_not_finite_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastssl.ops, "positional_conv", off_by(float("nan"), fastssl.ops.positional_conv))
    with pytest.raises(fastssl.ValidationError, match=r"first in the input of encoder\.layers\.0: by nan"):
        fastssl.validate(transformers_model("wav2vec2 large"), seconds=SHORT, training=False)


@pytest.mark.parametrize("call", range(1, 7))
def test_a_nan_in_any_utterance_differs(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two utterances are computed alone and then in a batch, without gradients and with them."""
    right, calls = transformers_code._adapt, iter(range(1, 7))
    monkeypatch.setattr(
        transformers_code, "_adapt", lambda *given: right(*given) * (float("nan") if next(calls) == call else 1.0)
    )
    with pytest.raises(fastssl.ValidationError):
        fastssl.validate(transformers_model("wav2vec2 large"), seconds=SHORT)


def test_a_difference_that_is_not_finite_is_never_right() -> None:
    """The original overflows, so its rounding is infinite, too."""
    found = Comparison("last hidden state", float("inf"), None, rounding=float("inf"), allowed=float("inf"))
    assert not found.is_right


def test_an_original_that_is_not_finite_is_named_as_the_cause() -> None:
    model = transformers_model("wav2vec2 large")
    model.encoder.layers[1].final_layer_norm.weight.data[0] = float("nan")
    with pytest.raises(fastssl.ValidationError, match="The original itself is not finite") as error:
        fastssl.validate(model, seconds=SHORT, training=False)
    assert "finds the kernel" not in str(error.value)


def test_re_entrant_checkpointing_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it, the backward pass of the original WavLM never ends."""

    def apply(*_: Any) -> None:
        raise AssertionError("re-entrant")

    monkeypatch.setattr(torch.utils.checkpoint.CheckpointFunction, "apply", apply)
    model = transformers_model("wavlm base")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    used = model.encoder.layers[0]._gradient_checkpointing_func
    assert not fastssl.validate(model, seconds=SHORT).wrong
    assert model.encoder.layers[0]._gradient_checkpointing_func is used


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all that `validate` must leave as it is."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = type(module), module.training, {key: id(value) for key, value in vars(module).items()}
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        found[f"{name} hooks"] = [list(one.items()) for one in hooks]
        if hasattr(module, "config"):
            found[f"{name} config"] = repr(module.config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = tensor.grad
        found[f"{name} tensor"] = id(tensor), tensor.requires_grad, tensor.detach().numpy().tobytes()
        found[f"{name} gradient"] = id(grad), None if grad is None else grad.numpy().tobytes()
    return found


def seed_everything() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002


def draws() -> tuple[float, float, float]:
    """Draw from every generator of the host."""
    return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002


@pytest.mark.parametrize(
    ("variant", "mode"),
    [
        ("wav2vec2 base, adapter", nullcontext),
        ("torchaudio wavlm base", torch.no_grad),
        ("wavlm large", torch.inference_mode),
    ],
)
def test_the_model_and_the_generators_do_not_change(variant: str, mode: Callable[[], Any]) -> None:
    name = variant.removeprefix("torchaudio ")
    model = transformers_model(name) if name == variant else make_torchaudio(name)
    model.train()
    model.feature_extractor.eval()
    model.feature_extractor.requires_grad_(False)
    first = next(model.encoder.parameters())
    first.grad = torch.ones_like(first)
    next(one for one in model.modules() if isinstance(one, nn.Linear)).register_forward_hook(lambda *args: None)
    for accelerated in (False, True):
        if accelerated:
            fastssl.accelerate(model)
        before = state_of(model)
        seed_everything()
        expected = draws()
        seed_everything()
        with mode():
            fastssl.validate(model, seconds=SHORT[:1])
            assert torch.is_grad_enabled() == (mode is nullcontext)
        assert draws() == expected
        assert state_of(model) == before


def test_heads_adapters_and_what_is_left_out_are_named() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(target_modules=["q_proj", "output_dense"], init_lora_weights=False, r=2, lora_dropout=0.5)
    model = peft.get_peft_model(transformers_model("wav2vec2 base", "ForCTC"), lora)
    kept = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    report = fastssl.validate(model, seconds=SHORT)
    assert report.notes == (
        "compared: Wav2Vec2Model of transformers, `base_model.model.wav2vec2` of a PeftModel; parts outside it are not "
        "compared",
    )
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == kept


def test_what_else_is_accelerated_is_named() -> None:
    report = fastssl.validate(transformers_model("wav2vec2 base", "ForPreTraining"), seconds=SHORT, training=False)
    assert report.notes[1].startswith("left out: the quantiser and the loss, which are accelerated too")


def test_adapters_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong gradient of an adapter is found, though a layer of somebody else is called in both."""
    model = transformers_model("hubert base")
    model.encoder.layers[1].attention.q_proj = Adapted(model.encoder.layers[1].attention.q_proj)
    linear = fastssl.nn.functional.linear

    def without_adapter(module: Any, x: Tensor) -> Tensor:
        return linear(module.base if isinstance(module, Adapted) else module, x)

    assert not fastssl.validate(model, seconds=SHORT).wrong
    monkeypatch.setattr(fastssl.nn.functional, "linear", without_adapter)
    with pytest.raises(fastssl.ValidationError, match=r"first in the output of encoder\.layers\.1"):
        fastssl.validate(model, seconds=SHORT)


def test_without_a_compressor_and_with_the_norm_over_padding() -> None:
    compressor = SequenceCompressor(TINY["hidden_size"], kind="average", factor=2)
    model = fastssl.accelerate(transformers_model("wavlm large"), compressor=compressor, norm="padded")
    report = fastssl.validate(model, seconds=SHORT)
    assert [one.partition(",")[0] for one in report.notes[1:]] == [
        "left out: the compressor",
        "left out: a padded batch",
    ]
    assert all(one.in_a_batch is None for one in report.comparisons)
    assert model.fastssl_compressor is compressor


def test_each_of_several_encoders_is_compared() -> None:
    pair = nn.ModuleDict(
        {"a": transformers_model("hubert base"), "b": fastssl.accelerate(transformers_model("data2vec"))}
    )
    report = fastssl.validate(pair, seconds=SHORT, training=False)
    assert [one for one in names(report) if "last" in one] == ["a: last hidden state", "b: last hidden state"]
    assert len(report.notes) == 2


def test_a_forward_on_the_encoder_is_left_out() -> None:
    model = transformers_model("hubert base")
    forward = model.forward
    model.forward = lambda *args, **options: forward(*args, **options)
    assert "left out: the `forward`" in fastssl.validate(model, seconds=SHORT, training=False).notes[1]
    assert "forward" in vars(model)


def hooked(model: Any) -> Any:
    model.encoder.layers[0].register_forward_hook(lambda *args: None)
    return model


def called_projection(model: Any) -> Any:
    for layer in model.encoder.layers:
        layer.attention.q_proj = Adapted(layer.attention.q_proj)
        layer.attention.q_proj.weight, layer.attention.q_proj.bias = layer.attention.q_proj.base.parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastssl.accelerate(model, call_projections=True)


def sharded(model: Any) -> Any:
    model.encoder.layer_norm.weight = nn.Parameter(model.encoder.layer_norm.weight.to("meta"))
    return model


REFUSED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "hook": (
        "wav2vec2 base",
        hooked,
        "has a hook or a replaced `forward`, so the original code runs.*nothing to compare",
    ),
    "projections": ("wavlm base", called_projection, "the original WavLMModel ignores.*call_projections=False"),
    "fp64": (
        "wav2vec2 base",
        lambda model: model.double(),
        "is in torch.float64; expected ordinary parameters in fp32",
    ),
    "meta": ("wav2vec2 base", sharded, "the parameter encoder.layer_norm.weight has no storage"),
    "no encoder": ("wav2vec2 base", lambda model: model.feature_projection, "has no encoder that can be accelerated"),
    "batch norm": ("hubert base", lambda model: model, "conv_pos_batch_norm=True is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_by_name(case: str) -> None:
    variant, change, message = REFUSED[case]
    options: dict[str, Any] = {"conv_pos_batch_norm": True} if case == "batch norm" else {}
    model = change(transformers_model(variant, **options))
    with pytest.raises(ValueError, match=message):
        fastssl.validate(model, seconds=SHORT)


@pytest.mark.parametrize("seconds", [(), (0.05,), (1.0, float("nan")), (float("inf"),), (-1.0,)])
def test_bad_lengths_are_named(seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"seconds: expected lengths of 0\.1 s or more"):
        fastssl.validate(transformers_model("wav2vec2 base"), seconds=seconds)


def test_lengths_may_come_from_a_generator() -> None:
    report = fastssl.validate(transformers_model("wav2vec2 base"), seconds=(one for one in SHORT), training=False)
    assert report.seconds == SHORT


def test_the_sound_is_like_speech_and_always_the_same() -> None:
    sound = speech_like(48_000, seed=3)
    assert np.array_equal(sound, speech_like(48_000, seed=3))
    assert not np.array_equal(sound, speech_like(48_000, seed=4))
    assert len(sound) == 48_000
    assert sound.dtype == np.float32
    assert abs(sound.mean()) < 1e-5
    assert sound.std() == pytest.approx(1, abs=1e-5)
    levels = np.sqrt((sound.reshape(-1, 400) ** 2).mean(1))
    assert levels.max() / levels.min() > 10  # pauses
    spectrum = np.abs(np.fft.rfft(sound)) ** 2
    assert spectrum[: len(spectrum) // 4].sum() > spectrum.sum() / 2  # voices, below 2 kHz


@pytest.fixture
def no_warning_yet() -> Iterator[None]:
    in_place._warn_of_unproven_kernels.cache_clear()
    yield
    in_place._warn_of_unproven_kernels.cache_clear()


@pytest.mark.usefixtures("no_warning_yet")
def test_the_first_model_on_a_gpu_comes_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Wav2Vec2Config(**TINY)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        models = [transformers.Wav2Vec2Model(config) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastssl.accelerate(transformers_model("wav2vec2 base"))  # on the CPU
        monkeypatch.setattr(gpus, "RUN_ON", ((9, 0),))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        fastssl.accelerate(models[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.warns(
        UserWarning, match=r"not been run on a GPU.*fastssl\.validate\(model\).*`fastssl check`"
    ) as caught:
        fastssl.accelerate(models[1])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastssl.accelerate(models[2])


class Recorder:
    """An object with a hook; copying it would fail."""

    def __init__(self) -> None:
        self.called = 0

    def __deepcopy__(self, memo: Any) -> None:
        raise AssertionError

    def hook(self, *args: Any) -> None:
        self.called += 1


def test_hooks_are_called_and_not_copied() -> None:
    model, recorder = transformers_model("hubert base"), Recorder()
    model.encoder.layers[0].feed_forward.output_dense.register_forward_hook(recorder.hook)
    assert not fastssl.validate(model, seconds=SHORT).wrong
    assert recorder.called == 2 * 2 * 3 + 2  # of two utterances, evaluation and training of three models, and a batch


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = transformers_model("data2vec")
        assert model.encoder.layer_norm.weight.is_inference()
        assert not fastssl.validate(model, seconds=SHORT).wrong
    assert model.encoder.layer_norm.weight.is_inference()


def test_a_copy_of_the_model_stays_comparable() -> None:
    """A copy shares nothing with the given model, so validating it after a training step is the same."""
    model = fastssl.accelerate(transformers_model("unispeech base")).train()
    model(torch.randn(1, 4000)).last_hidden_state.sum().backward()
    reports = [fastssl.validate(one, seconds=SHORT) for one in (model, copy.deepcopy(model))]
    assert reports[0] == reports[1]
