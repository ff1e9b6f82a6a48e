"""Measure the encoder's forward pass: `python -m benchmarks.bench_encoder --device cpu|cuda [--output JSON]`."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import limits, rivals, workloads
from benchmarks.harness import Contenders, Entry, Outputs, Row, compare, worst_error
from benchmarks.recipes import recipe_model
from benchmarks.report import Rows, main
from fastssl.models.encoder import Encoder
from fastssl.packing import Packed

# Lengths (s) of the gate's utterances. They differ, so that the gate covers uneven batches.
_GATE_S = [1.0, 0.7]
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def forward(title: str, lengths_s: Sequence[float], device: torch.device) -> Row:
    """Compare our encoder with Transformers (eager, compiled) and torchaudio: fp32 on the CPU, bf16 on a GPU.

    Args:
        title: Title of the row.
        lengths_s: Lengths of the utterances in seconds.
        device: Device to measure on.
    """
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    encoder = Encoder(recipe_model("wav2vec2-base")).to(device, dtype).eval()
    theirs = rivals.transformers_encoder(encoder).to(dtype).eval()
    batch = workloads.waveforms(lengths_s, device)
    batch = Packed(batch.values.to(dtype), batch.layout)
    audio, mask = workloads.padded(batch)
    lengths = batch.layout.cu_seqlens.diff()
    tolerance = _TOLERANCES[dtype]
    check_theirs: Callable[[], Outputs] = _no_grad(lambda: _each_alone(partial(_encode, theirs), device, dtype))

    def transformers_compiled() -> Entry:
        model = rivals.compiled(theirs)

        def check() -> Outputs:  # compare on the batch that will be timed, because the model is compiled for its shape
            found, eager = _encode(model, audio, mask), _encode(theirs, audio, mask)
            worst_error("compiled and eager", {"out": found}, {"out": eager}, tolerance)
            return check_theirs()

        return _no_grad(lambda: _encode(model, audio, mask)), _no_grad(check)

    def torchaudio() -> Entry:
        model = rivals.torchaudio_encoder(encoder).to(dtype).eval()
        run = _no_grad(lambda: model.extract_features(audio, lengths)[0][-1])
        return run, _no_grad(lambda: _each_alone(lambda x: model.extract_features(x)[0][-1], device, dtype))

    contenders = Contenders()
    contenders.add("fastssl", _no_grad(lambda: encoder(batch)), _check_ours(encoder, device, dtype))
    if device.type == "cuda":
        graphed = copy.deepcopy(encoder).use_cuda_graphs()
        contenders.add("fastssl, CUDA graphs", _no_grad(lambda: graphed(batch)), _check_ours(graphed, device, dtype))
    contenders.add("Transformers, eager", _no_grad(lambda: _encode(theirs, audio, mask)), check_theirs)
    rivals.add_compiled(contenders, device, transformers_compiled, quick=len(lengths_s) == 1)
    contenders.invite("torchaudio", torchaudio)
    gemms = limits.encoder(encoder.config, workloads.samples_of(lengths_s), backward=False)
    return compare(
        title,
        contenders,
        reference=lambda: _reference(encoder, device),
        tolerance=tolerance,
        device=device,
        limits=lambda: limits.gemm_limits(gemms, dtype, device),
        audio_s=sum(lengths_s),
        notes=[f"padded batch: {workloads.padding_factor(lengths_s):.2f} times the valid audio"],
    )


def bf16_against_fp32(device: torch.device) -> Row:
    """Compare our forward pass in bf16 with the same in fp32 and with Transformers in bf16."""
    torch.manual_seed(0)
    lengths_s = workloads.read_speech(8)
    encoder = Encoder(recipe_model("wav2vec2-base")).to(device).eval()
    half = Encoder(encoder.config).to(device, torch.bfloat16).eval()
    half.load_state_dict(encoder.state_dict())
    theirs = rivals.transformers_encoder(encoder).to(torch.bfloat16).eval()
    batch = workloads.waveforms(lengths_s, device)
    batch_half = Packed(batch.values.bfloat16(), batch.layout)
    audio, mask = workloads.padded(batch_half)
    contenders = Contenders()
    contenders.add("fastssl, bf16", _no_grad(lambda: half(batch_half)), _check_ours(half, device, torch.bfloat16))
    contenders.add("ours in fp32", _no_grad(lambda: encoder(batch)), _check_ours(encoder, device, torch.float32))
    contenders.add(
        "Transformers, eager, bf16",
        _no_grad(lambda: _encode(theirs, audio, mask)),
        _no_grad(lambda: _each_alone(partial(_encode, theirs), device, torch.bfloat16)),
    )
    gemms = limits.encoder(encoder.config, workloads.samples_of(lengths_s), backward=False)
    return compare(
        "encoder forward in bf16 and in fp32, wav2vec 2.0 base, read-speech batch of 8",
        contenders,
        reference=lambda: _reference(encoder, device),
        tolerance=_TOLERANCES[torch.bfloat16],
        device=device,
        limits=lambda: limits.gemm_limits(gemms, torch.bfloat16, device),
        audio_s=sum(lengths_s),
        budget_s=6,
    )


def _no_grad(call: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(call)


def _encode(model: Any, audio: Tensor, mask: Tensor | None = None) -> Tensor:
    out: Tensor = model(audio, attention_mask=mask).last_hidden_state
    return out


def _check_ours(encoder: Encoder, device: torch.device, dtype: torch.dtype) -> Callable[[], Outputs]:
    waveforms = workloads.waveforms(_GATE_S, device)
    batch = Packed(waveforms.values.to(dtype), waveforms.layout)
    return _no_grad(lambda: {f"utterance {i}": x for i, x in enumerate(encoder(batch).features.unpack())})


def _each_alone(model: Callable[[Tensor], Tensor], device: torch.device, dtype: torch.dtype) -> Outputs:
    """Encode each utterance alone: the rivals' group norm includes padding, which makes padded batches inexact."""
    waveforms = workloads.waveforms(_GATE_S, device).unpack()
    return {f"utterance {i}": model(x.to(dtype).t())[0] for i, x in enumerate(waveforms)}


def _reference(encoder: Encoder, device: torch.device) -> Outputs:
    """Compute the reference with Transformers in fp64."""
    model = rivals.in_double(rivals.transformers_encoder(encoder))
    outputs: Outputs = _no_grad(lambda: _each_alone(partial(_encode, model), device, torch.float64))()
    return outputs


ROWS: Rows = {
    "encoder-read-speech": partial(
        forward, "encoder forward, wav2vec 2.0 base, read-speech batch of 8", workloads.read_speech(8)
    ),
    "encoder-even": partial(
        forward, "encoder forward, wav2vec 2.0 base, 8 utterances of 1.5 to 17 s drawn evenly", workloads.even(8)
    ),
    "encoder-one": partial(forward, "encoder forward, wav2vec 2.0 base, one 10 s utterance", [10.0]),
    "encoder-bf16": bf16_against_fp32,
    "encoder-short": partial(forward, "encoder forward, wav2vec 2.0 base, short batch of 16", workloads.short(16)),
    "encoder-long": partial(forward, "encoder forward, wav2vec 2.0 base, one utterance of 60 s", workloads.long(1)),
}

if __name__ == "__main__":
    main(ROWS, __doc__)
