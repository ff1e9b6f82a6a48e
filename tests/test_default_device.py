"""Test that nothing is created on PyTorch's default device: with "meta" as that device, all results are the same."""

import ast
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastssl
from fastssl.data.batches import AudioBatch, BatchSpec
from fastssl.data.mfcc import mfcc
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.pretraining import StepContext
from fastssl.nn import SequenceCompressor
from fastssl.nn.random import utterance_keys
from fastssl.packing import Packed
from fastssl.train.config import DataConfig
from fastssl.train.data import PretrainDataModule
from fastssl.train.systems import SYSTEMS, build_model
from fastssl.train.teacher import Teacher
from tests.interop.tiny_models import FAMILIES, padded_batch, transformers_model
from tests.ops.standard import Standard, every, interpreted
from tests.train.conftest import model_of
from tests.train.test_draws import batch_of

COMPRESSORS = ["average", "strided", "integrate-and-fire"]


class _Nowhere(TorchDispatchMode):
    """Refuses operators whose results have no memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert not [one for one in tree_leaves(result) if isinstance(one, Tensor) and one.is_meta], func
        return result


@contextmanager
def elsewhere() -> Iterator[None]:
    """Make "meta" the default device, and refuse tensors on it."""
    with torch.device("meta"), _Nowhere():
        yield


def same(compute: Callable[[], list[Tensor]]) -> None:
    """Assert that a computation gives the same with another default device."""
    results = []
    for there in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 (the generator that Transformers draws from)
        if there:
            with elsewhere():
                results.append(compute())
        else:
            results.append(compute())
    assert results[0]
    for found, expected in zip(results[1], results[0], strict=True):
        assert found.device == expected.device
        assert torch.equal(found, expected)


def step(model: nn.Module, forward: Callable[[], Tensor]) -> list[Tensor]:
    """Return the output of a training step and the gradients."""
    model.train().zero_grad()
    out = forward()
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _compressor(kind: Any) -> SequenceCompressor:
    return SequenceCompressor(48, kind=kind, factor=None if kind == "integrate-and-fire" else 2)


RANDOM: dict[str, Any] = {
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "feat_proj_dropout": 0.1,
    "layerdrop": 0.4,
    "mask_time_prob": 0.5,
}


@pytest.mark.parametrize(
    ("variant", "kind"),
    [(variant, None) for variant in (*FAMILIES, "wav2vec2 base, adapter")]
    + [(variant, kind) for variant in ("wav2vec2 base", "wavlm base") for kind in COMPRESSORS],
)
def test_accelerated_models(variant: str, kind: Any) -> None:
    model = fastssl.accelerate(transformers_model(variant, **RANDOM))
    if kind is not None:
        fastssl.accelerate(model, compressor=_compressor(kind))
    waveforms, mask = padded_batch([5000, 900, 3300, 300])
    same(lambda: [*model.eval()(waveforms, attention_mask=mask, output_hidden_states=True).hidden_states])
    same(lambda: step(model, lambda: model(waveforms, attention_mask=mask).last_hidden_state))
    same(lambda: step(model, lambda: model(waveforms).last_hidden_state))


def test_accelerated_pretraining_head() -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base", "ForPreTraining", **RANDOM))
    waveforms, mask = padded_batch([5000, 3300])
    masked = torch.zeros(2, 15, dtype=torch.bool)
    masked[:, 3:7] = True
    negatives = torch.randint(0, 30, (2, 15, 4), generator=torch.Generator().manual_seed(1))
    given = {"attention_mask": mask, "mask_time_indices": masked, "sampled_negative_indices": negatives}
    same(lambda: step(model, lambda: model(waveforms, **given).loss))


@pytest.mark.parametrize("variant", ["wav2vec2 base", "wavlm large", "wav2vec2 base, logits"])
def test_accelerated_models_of_torchaudio(variant: str) -> None:
    tiny = pytest.importorskip("tests.interop.tiny_torchaudio")
    model = fastssl.accelerate(tiny.make(variant, encoder_layer_drop=0.4, encoder_dropout=0.1))
    waveforms, lengths = tiny.batch_of([5000, 900, 300])
    same(lambda: step(model, lambda: model(waveforms, lengths)[0]))
    same(lambda: step(model, lambda: model(waveforms, lengths.double())[0]))
    same(lambda: [*model.eval().extract_features(waveforms, lengths)[0]])


def test_attention_of_transformers() -> None:
    model = transformers_model("wav2vec2 base")
    fastssl.register_attention()
    model.set_attn_implementation("fastssl")
    waveforms, mask = padded_batch([5000, 900])
    frames = model.feature_projection(model.feature_extractor(waveforms).transpose(1, 2))[0]
    valid = torch.arange(frames.shape[1]) < torch.tensor([15, 2]).unsqueeze(1)

    def attend() -> list[Tensor]:
        from fastssl.interop.attention import _attend
        from fastssl.packing import PaddedRows

        q = frames.detach().unflatten(2, (4, -1)).transpose(1, 2)
        return [_attend(model, q, q, q, rows)[0] for rows in (None, PaddedRows.from_mask(valid))]

    same(attend)
    assert mask.any()


@pytest.mark.parametrize("source", ["model", "folder", "torchaudio", "wavlm"])
def test_loaded_encoders(source: str, tmp_path: Path) -> None:
    opened: Any
    if source == "torchaudio":
        opened = pytest.importorskip("tests.interop.tiny_torchaudio").make("wavlm base")
    else:
        opened = transformers_model("wavlm base" if source == "wavlm" else "wav2vec2 large")
    if source == "folder":
        opened.save_pretrained(tmp_path)
        opened = tmp_path
    waveforms = Packed.pack([torch.randn(length, 1) for length in (5000, 900)])
    torch.manual_seed(0)
    expected = fastssl.load_encoder(opened)
    torch.manual_seed(0)
    with torch.device("meta"):
        encoder = fastssl.load_encoder(opened)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    encoder.requires_grad_(requires_grad=True)
    same(lambda: step(encoder, lambda: encoder(waveforms).features.values))
    with torch.no_grad():
        same(lambda: [encoder.eval()(waveforms).features.values])


class FixedTeacher:
    """The teacher of a run, without its cache."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def of(self, batch: AudioBatch) -> Any:
        return None, self.teacher.encode(batch.waveforms)[1]


def teacher_of(system: str, config: Any) -> Any:
    if not SYSTEMS[system].needs.teacher:
        return None
    shape = {field.name: getattr(config, field.name) for field in dataclasses.fields(EncoderConfig)}
    encoder = Encoder(EncoderConfig(**shape | {"compressor": "none", "compressor_factor": 1}))
    return FixedTeacher(Teacher(encoder, config.teacher_layers, gives_frames=False))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("system", "kind"),
    [(system, "none") for system in SYSTEMS]
    + [(system, kind) for system in ("wav2vec2", "distillation") for kind in COMPRESSORS],
)
def test_pretraining_steps(system: str, kind: str, training: bool) -> None:
    config: Any = model_of(system)
    random = {name: value for name, value in RANDOM.items() if hasattr(config, name)}
    if kind != "none":
        random |= {"compressor": kind, "compressor_factor": 1 if kind == "integrate-and-fire" else 2}
    if SYSTEMS[system].needs.teacher:
        random["teacher_layers"] = (1, 2)
    config = dataclasses.replace(config, **random)
    batch, model, teacher = batch_of(5), build_model(config), teacher_of(system, config)

    def compute() -> list[Tensor]:
        drops = torch.Generator().manual_seed(5)
        context = StepContext(utterance_keys(3, 5, batch.ids), 5, drops, teacher)
        output = model.train(training).step(batch, context)
        model.zero_grad()
        output.loss.backward()
        scores: list[Any] = [*output.scores().values()]
        scores = [value for value in scores if isinstance(value, Tensor)]
        return [output.loss.detach(), *scores, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    same(compute)


@pytest.mark.parametrize("system", SYSTEMS)
def test_batches_of_a_run(system: str, recordings: Path, tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    for index, rate_hz in enumerate((16_000, 8_000, 44_100)):
        noise = np.random.default_rng(index).standard_normal(3 * rate_hz) * 0.1
        soundfile.write(audio / f"{index}.wav", noise, rate_hz)
    draw = functools.partial(SYSTEMS[system].draw, model_of(system))

    def compute() -> list[Tensor]:
        config = DataConfig(num_workers=0, noise=str(recordings))
        data = PretrainDataModule(
            str(audio), config, normalize=True, seed=3, accumulation=1, noise_share=1.0, draw=draw
        )
        spec = BatchSpec(0, tuple(data.train_corpus.cuts), 0.7, 3)
        # The loader itself draws a seed on the default device.
        batch = data._loader([spec], "train").dataset[spec]
        return [one for one in tree_leaves(dataclasses.asdict(batch)) if isinstance(one, Tensor)]

    same(compute)


def test_mfcc_of_a_recording() -> None:
    waveform = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    same(lambda: [mfcc(waveform)])


def _served(standard: Standard, implementation: Any, case: str) -> bool:
    backend, device = implementation
    return not interpreted(backend, device) and standard.serves(case, backend, device, torch.float32)


@pytest.mark.parametrize(
    ("standard", "case", "backend", "device"),
    every(lambda standard: [(case,) for case in standard.cases], where=_served),
)
def test_ops(standard: Standard, case: str, backend: str, device: str) -> None:
    inputs = standard.inputs(case, backend, device)
    leaves = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}

    def compute() -> list[Tensor]:
        out = standard.run(case, leaves, backend)
        wanted = [x for x in leaves.values() if x.requires_grad]
        grads: Any = torch.autograd.grad(out.sum(), wanted, allow_unused=True)
        return [out.detach(), *(one for one in grads if one is not None)]

    same(compute)


#: Functions that create tensors on the default device if they are not told another.
_FACTORIES = {
    "arange",
    "as_tensor",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "hann_window",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tensor",
    "zeros",
}
#: Files of which the tensors are examples: those of a process of its own, and those that kernels are compiled for.
_EXAMPLES = ("cli/check/cases.py", "kernels/*/triton_kernel.py")


def _on_the_default_device(tree: ast.AST) -> Iterator[ast.Call]:
    """Yield calls that create tensors on the default device, but for a module's parameters and buffers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("Parameter", "register_buffer"):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and node.func.attr in _FACTORIES and all(option.arg != "device" for option in node.keywords):
                yield node
        yield from _on_the_default_device(node)


def test_every_new_tensor_has_a_device() -> None:
    package = Path(fastssl.__file__).parent
    found = [
        f"{path.relative_to(package)}:{call.lineno}: {ast.unparse(call)}"
        for path in sorted(package.rglob("*.py"))
        if not any(path.relative_to(package).match(pattern) for pattern in _EXAMPLES)
        for call in _on_the_default_device(ast.parse(path.read_text()))
    ]
    assert not found
