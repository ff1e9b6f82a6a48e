"""Scenarios of `fastssl.accelerate`: every supported architecture, in evaluation and in training."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import fastssl
from tests.emulation.fake_cuda.scenario import Scenario, Watch
from tests.interop import tiny_models

PRECISIONS = {"fp32": None, "bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}
MODES = ("evaluation", "training")
_LENGTHS, _OTHER_LENGTHS = [16000, 9000, 12000], [8200, 15000]
Call = Callable[[nn.Module, Tensor, Tensor], Any]


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield the name of each scenario, and the scenario."""
    libraries: dict[str, tuple[dict[str, Any], Callable[[str], Any], Call]] = {}
    if find_spec("transformers") is not None:
        variants = tiny_models.VARIANTS | tiny_models.WITH_ADAPTERS
        libraries["transformers"] = variants, tiny_models.transformers_model, _call_transformers
    if find_spec("torchaudio") is not None:
        tiny = import_module("tests.interop.tiny_torchaudio")
        libraries["torchaudio"] = tiny.VARIANTS, tiny.make, _call_torchaudio
    for library, (variants, make, call) in libraries.items():
        for variant in variants:
            # torchaudio's own WavLM takes no lengths.
            alone = library == "torchaudio" and variant.startswith("wavlm")
            calls: dict[str, Any] = {"call": call, "call_original": _call_without_lengths if alone else call}
            for mode in MODES:
                for precision, dtype in PRECISIONS.items():
                    how = calls | {"make": partial(make, variant), "training": mode == "training", "dtype": dtype}
                    yield f"accelerated/{library}/{variant}/{mode}/{precision}", partial(_run, **how)


def _call_transformers(model: nn.Module, waveforms: Tensor, lengths: Tensor) -> dict[str, Any]:
    mask = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths.unsqueeze(1)
    return dict(model(waveforms, attention_mask=mask.long(), output_hidden_states=True))


def _call_torchaudio(model: nn.Module, waveforms: Tensor, lengths: Tensor) -> dict[str, Any]:
    return dict(zip(("output", "lengths"), model(waveforms, lengths), strict=True))


def _call_without_lengths(model: nn.Module, waveforms: Tensor, lengths: Tensor) -> dict[str, Any]:
    return {"output": model(waveforms)[0]}


def _run(
    watch: Watch,
    *,
    make: Callable[[], Any],
    call: Call,
    call_original: Call,
    training: bool,
    dtype: torch.dtype | None,
) -> None:
    original = make().train(training)
    model = fastssl.accelerate(copy.deepcopy(original))

    def autocast() -> AbstractContextManager[Any]:
        return nullcontext() if dtype is None else torch.autocast("cuda", dtype)

    def batch(lengths: list[int]) -> tuple[Tensor, Tensor]:
        waveforms, mask = tiny_models.padded_batch(lengths)
        return waveforms.to("cuda"), mask.sum(1).to("cuda")

    with watch.unwatched():
        model.to("cuda")
        inputs = batch(_LENGTHS)
    grad = torch.enable_grad() if training else torch.inference_mode()
    with grad:
        with watch.phase("forward"), autocast():
            output = call(model, *inputs)
        if training:
            with watch.phase("backward"):
                _loss(output).backward()
        with watch.no_new_variants():
            with autocast():
                again = call(model, *batch(_OTHER_LENGTHS))
            if training:
                _loss(again).backward()
    with watch.aside(), autocast():
        original.to("cuda")
        expected = call_original(original, *inputs)
    watch.found.notes["different dtypes"] = _different_dtypes(output, expected)


def _loss(output: dict[str, Any]) -> Tensor:
    first = next(value for value in output.values() if isinstance(value, Tensor))
    return first.float().square().mean()


def _different_dtypes(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, str]:
    """Return, by name, the dtypes of the outputs that differ from those of the original: "ours instead of theirs"."""
    ours, theirs = _tensors(found), _tensors(expected)
    assert ours.keys() >= theirs.keys(), (sorted(ours), sorted(theirs))
    return {
        name: f"{ours[name].dtype} instead of {tensor.dtype}".replace("torch.", "")
        for name, tensor in theirs.items()
        if ours[name].dtype != tensor.dtype
    }


def _tensors(output: dict[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, value in output.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, tuple):
            found |= {f"{name}.{index}": part for index, part in enumerate(value) if isinstance(part, Tensor)}
    return found
