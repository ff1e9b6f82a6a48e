"""Measure `strided_conv`: `python -m benchmarks.ops.bench_strided_conv --device cpu|cuda [--only ROW]`.

Runs all seven convolutional layers of wav2vec 2.0 base, from the waveform to the gradients of all weights.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import limits, rivals, workloads
from benchmarks.harness import Contenders, Entry, Outputs, Row, backends, compare, worst_error
from benchmarks.recipes import recipe_model
from benchmarks.report import Rows, main
from fastssl import ops
from fastssl.models.encoder import Encoder
from fastssl.nn.functional import conv_layer
from fastssl.packing import Packed

_GATE_S = [0.5, 0.3]


def front_end(title: str, lengths_s: Sequence[float], device: torch.device) -> Row:
    """Compare every fastssl backend with Transformers' front end, eager and under torch.compile.

    Args:
        title: Title of the row.
        lengths_s: Lengths of the utterances in seconds.
        device: Device to measure on: fp32 on the CPU, bf16 autocast on a GPU.
    """
    torch.manual_seed(0)
    config = recipe_model("wav2vec2-base")
    dtype, tolerance = (torch.float32, 1e-4) if device.type == "cpu" else (torch.bfloat16, 0.05)
    encoder = Encoder(config)
    extractor = encoder.feature_extractor.to(device)
    theirs = rivals.transformers_encoder(encoder.to(device)).feature_extractor
    batch, gate_batch = workloads.waveforms(lengths_s, device), workloads.waveforms(_GATE_S, device)
    audio, _ = workloads.padded(batch)
    layout = limits.front_end(config, batch.layout, backward=False)[1]
    grad_out = _fixed_gradient(layout.total, config.conv_dim[-1], device)
    padded_grad_out = Packed(grad_out, layout).to_padded()
    step = partial(_step, dtype=dtype)

    def ours(backend: str) -> Entry:
        def encode(frames: Packed) -> Tensor:
            layers = [conv_layer(layer) for layer in extractor.conv_layers]
            return ops.strided_conv_stack(frames.values, layers, frames.layout, backend=backend)[0]

        run = step(extractor, lambda: encode(batch), grad_out)
        return run, step(extractor, lambda: encode(gate_batch))

    def transformers() -> Entry:
        run = step(theirs, lambda: theirs(audio).transpose(1, 2), padded_grad_out)
        return run, step(theirs, lambda: _each_alone(theirs, gate_batch))

    def transformers_compiled() -> Entry:
        model, (run_eager, check_eager) = rivals.compiled(theirs), transformers()
        run = step(theirs, lambda: model(audio).transpose(1, 2), padded_grad_out)

        def check() -> Outputs:  # compare on the batch that will be timed, because the model is compiled for its shape
            worst_error("compiled and eager", run(), run_eager(), tolerance)
            return check_eager()

        return run, check

    contenders = Contenders()
    for backend in backends("strided_conv", device):
        contenders.add(f"fastssl, {backend}", *ours(backend))
    contenders.add("Transformers, eager", *transformers())
    contenders.add("Transformers, torch.compile", *transformers_compiled())
    gemms = limits.front_end(config, batch.layout, backward=True)[0]
    in_double = rivals.in_double(theirs)
    gate_in_double = Packed(gate_batch.values.double(), gate_batch.layout)
    reference = _step(in_double, lambda: _each_alone(in_double, gate_in_double), dtype=torch.float64)
    return compare(
        title,
        contenders,
        reference=reference,
        tolerance=tolerance,
        device=device,
        limits=lambda: limits.gemm_limits(gemms, dtype, device),
        audio_s=sum(lengths_s),
        budget_s=8,
        notes=[f"padded batch: {workloads.padding_factor(lengths_s):.2f} times the valid audio"],
    )


def _each_alone(model: nn.Module, batch: Packed) -> Tensor:
    """Encode each utterance alone: Transformers' group norm includes padding, which makes padded batches inexact."""
    return torch.cat([model(waveform.t())[0].t() for waveform in batch.unpack()])


def _step(
    model: nn.Module, encode: Callable[[], Tensor], grad_out: Tensor | None = None, *, dtype: torch.dtype
) -> Callable[[], Outputs]:
    """Return a function that runs forward and backward, under CUDA autocast if `dtype` is bf16."""

    def run() -> Outputs:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
            out = encode()
        grad = _fixed_gradient(out.shape[0], out.shape[1], out.device) if grad_out is None else grad_out
        out.backward(grad.to(out.dtype))
        grads = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"out": out.detach()} | grads

    return run


def _fixed_gradient(rows: int, channels: int, device: torch.device) -> Tensor:
    return torch.sin(torch.arange(rows * channels, device=device, dtype=torch.float32)).view(rows, channels)


def front_end_row(device: torch.device) -> Row:
    """Measure the front end on one utterance of 15.6 s on the CPU, or on 800 s of audio on a GPU."""
    if device.type == "cpu":
        return front_end("front end (7 layers) forward and backward, one 15.6 s utterance", [15.6], device)
    lengths_s = workloads.read_speech(workloads.utterances_for(800))
    return front_end("front end (7 layers) forward and backward, read-speech, 800 s", lengths_s, device)


ROWS: Rows = {
    "front-end": front_end_row,
    "front-end-read-speech": partial(
        front_end, "front end (7 layers) forward and backward, read-speech batch of 4", workloads.read_speech(4)
    ),
}

if __name__ == "__main__":
    main(ROWS, __doc__)
