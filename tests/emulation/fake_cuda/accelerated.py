"""Scenarios of models of other libraries: every architecture of `fastssl.accelerate`, in evaluation and in training.

Some also run without lengths, with other options, and as part of a model for pre-training; one model runs with
`attn_implementation="fastssl"`.
"""

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
from fastssl.nn import SequenceCompressor
from tests.emulation.fake_cuda.scenario import Scenario, Watch
from tests.interop import tiny_models

PRECISIONS = {"fp32": None, "bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}
MODES = ("evaluation", "training")
_LENGTHS, _OTHER_LENGTHS = [16000, 9000, 12000], [8200, 15000]
Call = Callable[[nn.Module, Tensor, Tensor], Any]


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield the name of each scenario, and the scenario."""
    if find_spec("transformers") is not None:
        for variant in tiny_models.ACCELERATED:
            make = partial(tiny_models.transformers_model, variant)
            found = [*_of(f"transformers/{variant}", make=make, call=_call_transformers)]
            if variant in tiny_models.ACCELERATED_FAMILIES:
                found += _of(f"transformers/{variant}", ", no lengths", make=make, call=_call_transformers_alone)
            is_trained = variant in tiny_models.TRAINED
            yield from (one for one in found if is_trained or "/training/" not in one[0])
        compressed = {"make": partial(tiny_models.transformers_model, "wav2vec2 base"), "change": _with_compressor}
        yield from _of("transformers/wav2vec2 base", ", compressed", call=_call_transformers, **compressed)
        padded = compressed | {"change": partial(fastssl.accelerate, norm="padded")}
        yield from _of("transformers/wav2vec2 base", ", padded norm", call=_call_transformers, **padded)
        squeezed = {"make": partial(tiny_models.transformers_model, "sew base")}
        for special, change in ((", compressed", _with_compressor), (", padded norm", padded["change"])):
            yield from _of("transformers/sew base", special, call=_call_transformers, change=change, **squeezed)
        padded |= {"make": partial(tiny_models.transformers_model, "data2vec")}
        yield from _of("transformers/data2vec", ", padded norm", call=_call_transformers, **padded)
        adapted = partial(tiny_models.transformers_model, "wav2vec2 base, adapter")
        yield from _of("transformers/wav2vec2 base, adapter", ", left padding", make=adapted, call=_call_on_the_left)
        pretrained = partial(tiny_models.transformers_model, "wav2vec2 base", "ForPreTraining", num_negatives=20)
        yield from _of("transformers/pre-training", make=pretrained, call=_call_pretraining)
        for precision, dtype in PRECISIONS.items():
            yield f"accelerated/validate/wavlm base/{precision}", partial(_validate, dtype=dtype)
        attention: dict[str, Any] = {"make": _with_our_attention, "change": lambda model: model}
        yield from _of("transformers/attention", call=_call_transformers, **attention)
        yield from _of("transformers/attention", ", no lengths", call=_call_transformers_alone, **attention)
    if find_spec("torchaudio") is not None:
        tiny = import_module("tests.interop.tiny_torchaudio")
        for variant in tiny.VARIANTS:
            make = partial(tiny.make, variant)
            # torchaudio's own WavLM takes no lengths.
            original = _call_torchaudio_alone if variant.startswith("wavlm") else _call_torchaudio
            yield from _of(f"torchaudio/{variant}", make=make, call=_call_torchaudio, call_original=original)
            if variant in ("wav2vec2 base", "wavlm large"):
                yield from _of(f"torchaudio/{variant}", ", no lengths", make=make, call=_call_torchaudio_alone)
                on_host = {"call": _call_torchaudio_on_host, "call_original": _call_torchaudio_alone}
                yield from _of(f"torchaudio/{variant}", ", lengths on the host", make=make, **on_host)


def _of(model: str, special: str = "", **how: Any) -> Iterator[tuple[str, Scenario]]:
    """Yield the scenarios of a model; a `special` one runs in bf16 only."""
    for mode in MODES:
        for precision, dtype in PRECISIONS.items():
            if not special or dtype == torch.bfloat16:
                name = f"accelerated/{model}/{mode}/{precision}{special}"
                yield name, partial(_run, **how, training=mode == "training", dtype=dtype)


def _with_compressor(model: Any) -> Any:
    compressor = SequenceCompressor(model.config.hidden_size, kind="integrate-and-fire")
    return fastssl.accelerate(model, compressor=compressor)


def _with_our_attention() -> Any:
    fastssl.register_attention()
    return tiny_models.transformers_model("wav2vec2 base", attn_implementation="fastssl", apply_spec_augment=False)


def _call_transformers(model: nn.Module, waveforms: Tensor, lengths: Tensor) -> dict[str, Any]:
    return dict(model(waveforms, attention_mask=_mask(waveforms, lengths), output_hidden_states=True))


def _call_on_the_left(model: nn.Module, waveforms: Tensor, lengths: Tensor) -> dict[str, Any]:
    mask = _mask(waveforms, lengths).flip(1)
    return dict(model(waveforms.flip(1), attention_mask=mask, output_hidden_states=True))


def _mask(waveforms: Tensor, lengths: Tensor) -> Tensor:  # (B, T)
    return (torch.arange(waveforms.shape[1], device=waveforms.device) < lengths.unsqueeze(1)).long()


def _call_transformers_alone(model: nn.Module, waveforms: Tensor, lengths: Tensor) -> dict[str, Any]:
    return dict(model(waveforms, output_hidden_states=True))


def _call_pretraining(model: nn.Module, waveforms: Tensor, lengths: Tensor) -> dict[str, Any]:
    frames = waveforms.shape[0], (waveforms.shape[1] - 400) // 320 + 1
    masked = torch.ones(frames, dtype=torch.bool, device=waveforms.device)
    negatives = torch.zeros(*frames, 20, dtype=torch.int64, device=waveforms.device)
    mask = _mask(waveforms, lengths)
    return dict(model(waveforms, mask, mask_time_indices=masked, sampled_negative_indices=negatives))


def _call_torchaudio(model: nn.Module, waveforms: Tensor, lengths: Tensor) -> dict[str, Any]:
    return dict(zip(("output", "lengths"), model(waveforms, lengths), strict=True))


def _call_torchaudio_on_host(model: nn.Module, waveforms: Tensor, lengths: Tensor) -> dict[str, Any]:
    output, lengths = model(waveforms, torch.full((len(waveforms),), waveforms.shape[1] - 100, device="cpu"))
    assert lengths.device.type == "cpu"
    return {"output": output}


def _call_torchaudio_alone(model: nn.Module, waveforms: Tensor, lengths: Tensor) -> dict[str, Any]:
    return {"output": model(waveforms)[0]}


def _run(
    watch: Watch,
    *,
    make: Callable[[], Any],
    call: Call,
    call_original: Call | None = None,
    change: Callable[[Any], Any] = fastssl.accelerate,
    training: bool,
    dtype: torch.dtype | None,
) -> None:
    original = make().train(training)
    model = change(copy.deepcopy(original))

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
        expected = (call_original or call)(original, *inputs)
    watch.found.notes["different dtypes"] = _different_dtypes(output, expected)


def _validate(watch: Watch, *, dtype: torch.dtype | None) -> None:
    """Compare a model with its original; differences have the values that `answers` gives."""
    autocast = nullcontext() if dtype is None else torch.autocast("cuda", dtype)
    with watch.unwatched():
        model = tiny_models.transformers_model("wavlm base").to("cuda")
        with autocast:
            report = fastssl.validate(model, seconds=(0.6, 1.0))
    assert report.device == "cuda:0"
    assert {"last hidden state", "gradients of encoder.layers.2"} <= {one.name for one in report.comparisons}


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
