"""Test that accelerated models can be scripted, traced and exported, and that a recording is right for other batches.

torchaudio tests that its models can be scripted, also after dynamic quantisation; these tests do the same.
"""

import copy
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import fastssl
from fastssl.nn.compression import SequenceCompressor
from tests.interop.tiny_models import TRAINED_FAMILIES, assert_close, padded_batch, transformers_model

Norm = Literal["valid", "padded"]
SCRIPTED = ["wav2vec2 base", "wav2vec2 base, logits", "wav2vec2 large", "wavlm base", "wavlm large"]
BESIDES = [("wav2vec2 base", "Model"), ("wav2vec2 base", "ForPreTraining")]
RUNS_ORIGINAL = "records the call, so the original code runs, on padded batches and without acceleration"


@pytest.fixture
def make() -> Callable[..., Any]:
    from tests.interop import tiny_torchaudio

    return tiny_torchaudio.make


@pytest.fixture(autouse=True)
def quantised_without_a_word() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.ao\.quantization is deprecated")
        yield


def script(model: nn.Module) -> Any:
    """Return the scripted model after it was saved and loaded."""
    with pytest.warns(UserWarning, match="torch.jit.script compiles the original code") as caught:
        scripted = torch.jit.script(model)
    assert sum("torch.jit.script" in str(one.message) and one.category is UserWarning for one in caught) == 1
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


BATCHES = {
    "mixed": torch.tensor([5000, 900, 100, 3300]),
    "float, beyond": torch.tensor([9000.0, 900.5, 0.0, 5000.0]),
    "no lengths": None,
    "no frames": torch.zeros(4),
}


def assert_scripted_is_eager(model: Any, scripted: Any, relative: float) -> None:
    waveforms = torch.randn(4, 5000, generator=torch.Generator().manual_seed(3))
    for lengths in BATCHES.values():
        with torch.no_grad():
            (found, frames), (expected, expected_frames) = (m(waveforms, lengths) for m in (scripted, model))
            assert_close(found, expected, relative)
            assert frames is None if lengths is None else torch.equal(frames, expected_frames)
            for layers in (None, 2):
                states, expected_states = (m.extract_features(waveforms, lengths, layers)[0] for m in (scripted, model))
                for state, expected_state in zip(states, expected_states, strict=True):
                    assert_close(state, expected_state, relative)


@pytest.mark.parametrize("norm", ["valid", "padded"])
@pytest.mark.parametrize("variant", SCRIPTED)
def test_torchaudio_can_be_scripted(variant: str, norm: Norm, make: Callable[..., Any]) -> None:
    model = fastssl.accelerate(make(variant), norm=norm)
    kind = type(model)
    assert_scripted_is_eager(model, script(model), 2e-5)
    assert type(model) is kind  # still accelerated


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no quantised layers here")
@pytest.mark.parametrize("variant", SCRIPTED)
def test_quantised_torchaudio_can_be_scripted(variant: str, make: Callable[..., Any]) -> None:
    model = fastssl.accelerate(make(variant))
    model.encoder.transformer.pos_conv_embed.__prepare_scriptable__()
    quantised = torch.ao.quantization.quantize_dynamic(model, qconfig_spec={nn.Linear}, dtype=torch.qint8)
    assert str(quantised) != str(model)
    scripted = script(quantised)
    with pytest.warns(UserWarning, match="dynamically quantised layer has one scale"):
        assert_scripted_is_eager(quantised, scripted, 0.0)
    waveforms = torch.randn(2, 5000)
    waveforms[1] *= 30  # would change the scale of the first utterance
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together, frames = quantised(waveforms, torch.tensor([3000, 5000]))
        alone, _ = quantised(waveforms[:1, :3000])
    assert torch.equal(together[:1, : frames[0]], alone)


def test_a_pipeline_s_wrapper_can_be_scripted(make: Callable[..., Any]) -> None:
    wrappers = pytest.importorskip("torchaudio.pipelines._wav2vec2.utils")
    model = fastssl.accelerate(
        wrappers._extend_model(make("wav2vec2 base, logits"), True, apply_log_softmax=True, append_star=False)
    )
    inner = type(model.model)
    assert_scripted_is_eager(model, script(model), 2e-5)
    assert type(model.model) is inner


def test_a_script_trains(make: Callable[..., Any]) -> None:
    model = fastssl.accelerate(make("wav2vec2 large"))
    scripted = script(model)
    waveforms, lengths = torch.randn(2, 5000), torch.tensor([5000, 900])
    grads = []
    for m in (model, scripted):
        out = m(waveforms, lengths)[0]
        (out * torch.sin(torch.arange(out.numel())).view_as(out)).sum().backward()
        grads.append(m.encoder.feature_projection.projection.weight.grad)
    assert_close(grads[1], grads[0], 1e-3)


def test_with_a_compressor_it_says_to_restore_first(make: Callable[..., Any]) -> None:
    compressor = SequenceCompressor(48, kind="average", factor=2)
    model = fastssl.accelerate(make("wav2vec2 base"), compressor=compressor)
    with pytest.raises(ValueError, match=r"fastssl\.restore"):
        torch.jit.script(model)
    for m, inputs in ((model, (torch.randn(1, 5000), torch.tensor([5000]))), (hubert_with(compressor), ())):
        given = inputs or (torch.randn(1, 5000),)
        with pytest.raises(ValueError, match=r"torch\.export records the call.*fastssl\.restore"):
            torch.export.export(m, given)
        with pytest.raises(ValueError, match=r"torch\.jit\.trace records the call.*fastssl\.restore"):
            torch.jit.trace(m, given)


def hubert_with(compressor: SequenceCompressor) -> Any:
    return fastssl.accelerate(transformers_model("hubert large"), compressor=copy.deepcopy(compressor))


def recordings(model: Any, given: tuple[Tensor, ...]) -> dict[str, Callable[..., Any]]:
    """Record a model in every way; the results can be called as the model."""
    made: dict[str, Callable[..., Any]] = {}
    with pytest.warns(UserWarning, match="torch.jit.trace " + RUNS_ORIGINAL):
        made["trace"] = torch.jit.trace(model, given, strict=False)
    with pytest.warns(UserWarning, match="torch.export " + RUNS_ORIGINAL) as caught:
        exported = torch.export.export(model, given)
    assert sum(RUNS_ORIGINAL in str(one.message) for one in caught) == 1
    made["export"] = exported.module()
    strict = torch.export.export(model, given, strict=True)  # leaves out all warnings
    made["export strict"] = strict.module()
    for program in (exported, strict):
        assert not [node for node in program.graph.nodes if "fastssl" in str(node.target)]
    return made


@pytest.mark.parametrize(("variant", "head"), [*((family, "ForCTC") for family in TRAINED_FAMILIES), *BESIDES])
def test_recordings_of_transformers_are_of_the_original(variant: str, head: str) -> None:
    """A recording of our code would have the lengths of the batch that it was made with."""
    original = transformers_model(variant, head)
    model = fastssl.accelerate(copy.deepcopy(original))
    kind = type(model)
    other, mask = padded_batch([5000, 2900])
    with torch.no_grad():
        expected = original(other, mask)[0]
        for name, recording in recordings(model, padded_batch([5000, 5000])).items():
            out = recording(other, mask)
            found = next(iter(out.values())) if isinstance(out, dict) else out[0]
            assert_close(found, expected, 1e-5, name)
    assert type(model) is kind


@pytest.mark.parametrize("variant", ["wav2vec2 base, logits", "wav2vec2 large"])
def test_recordings_of_torchaudio_are_of_the_original(variant: str, make: Callable[..., Any]) -> None:
    waveforms, lengths = torch.randn(2, 5000), torch.tensor([5000, 2900])
    model = fastssl.accelerate(make(variant))
    with torch.no_grad():
        expected, frames = make(variant)(waveforms, lengths)
        for name, recording in recordings(model, (torch.randn(2, 5000), torch.tensor([5000, 5000]))).items():
            found, found_frames = recording(waveforms, lengths)
            assert_close(found, expected, 1e-5, name)
            assert torch.equal(found_frames, frames), name
        assert "fastssl" in type(model).__module__


def test_make_fx_records_the_original() -> None:
    proxy_tensor: Any = pytest.importorskip("torch.fx.experimental.proxy_tensor")

    original = transformers_model("hubert large")
    model = fastssl.accelerate(copy.deepcopy(original))
    with torch.no_grad(), pytest.warns(UserWarning, match="make_fx " + RUNS_ORIGINAL):
        graph = proxy_tensor.make_fx(lambda x: model(x)[0])(torch.randn(1, 5000))
    assert not [node for node in graph.graph.nodes if "fastssl" in str(node.target)]
    waveforms = torch.randn(1, 5000)
    with torch.no_grad():
        assert_close(graph(waveforms), original(waveforms)[0], 1e-5)


def test_symbolic_trace_does_as_with_the_original(make: Callable[..., Any]) -> None:
    """It cannot trace torchaudio's models, which look at the shapes of their inputs."""
    errors = []
    for model in (make("wav2vec2 base"), fastssl.accelerate(make("wav2vec2 base"))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(torch.fx.proxy.TraceError) as error:
                torch.fx.symbolic_trace(model)
        errors.append((str(error.value), [str(one.message) for one in caught if RUNS_ORIGINAL in str(one.message)]))
    assert errors[0][0] == errors[1][0]
    assert len(errors[1][1]) == 1
    assert errors[1][1][0].startswith("torch.fx ")


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_has_the_original(dynamo: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    original = transformers_model("hubert large", "ForCTC")
    model = fastssl.accelerate(copy.deepcopy(original))
    path = tmp_path / "model.onnx"
    with pytest.warns(UserWarning, match=("torch.export " if dynamo else "torch.onnx ") + RUNS_ORIGINAL):
        torch.onnx.export(model, padded_batch([5000, 5000]), path, dynamo=dynamo)
    other, mask = padded_batch([5000, 2900])
    session = runtime.InferenceSession(path)
    given = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), (other, mask), strict=True)}
    with torch.no_grad():
        assert_close(torch.from_numpy(session.run(None, given)[0]), original(other, mask)[0], 1e-4)


def test_attention_alone_is_not_recorded() -> None:
    fastssl.register_attention()
    model = transformers_model("hubert large", attn_implementation="fastssl")
    waveforms, mask = padded_batch([5000, 2900])
    for given in ((waveforms,), (waveforms, mask)):
        with pytest.raises(ValueError, match=r"'fastssl' cannot be recorded by torch\.jit\.trace; .*'sdpa'"):
            torch.jit.trace(model, given, strict=False)
        with pytest.raises(ValueError, match=r"'fastssl' cannot be recorded by torch\.export; .*'sdpa'"):
            torch.export.export(model, given)


def test_compile_still_runs_packed() -> None:
    """It records nothing of an accelerated encoder, and no warning comes."""
    model = fastssl.accelerate(transformers_model("hubert large"))
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for lengths in ([5000, 2900], [5000, 900, 4000]):
            given = padded_batch(lengths)
            assert torch.equal(compiled(*given)[0], model(*given)[0])
