"""Measure what sequence compression saves: `python -m benchmarks.bench_compression --device cpu|cuda [--output JSON]`.

Times the forward pass of one encoder at several frame periods, and compares the savings in time with those in
multiplications. One contender compresses earlier than the papers do: it pools between two convolutions. The weights are
random; `benchmarks/studies` measures the quality of compressed encoders.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from benchmarks import workloads
from benchmarks.harness import Contenders, Outputs, Row, compare
from benchmarks.report import Rows, main
from fastssl import ops
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.multiplications import count_multiplications
from fastssl.nn.compression import SequenceCompressor
from fastssl.nn.functional import conv_layer
from fastssl.packing import Packed

_PERIODS_MS = (20.0, 30.0, 40.0, 60.0, 80.0)
# Durations (s) that give 48 and 44 frames. No period leaves half a frame over: rounding could keep or drop it.
_GATE_S = [0.98, 0.9]
_TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 0.1}
#: Number of convolutions before the pooling. Two more follow, and their frames are 40 ms apart.
_POOLED_AFTER = 5
_POOLED = "fastssl, pooled by 2 between convolutions 5 and 6"


def _name(period_ms: float) -> str:
    return f"fastssl, a frame every {period_ms:g} ms"


def _encode_pooled(encoder: Encoder, waveforms: Packed) -> Packed:
    """Run the encoder with pairs of frames averaged between its convolutions 5 and 6."""
    layers = [conv_layer(layer) for layer in encoder.feature_extractor.conv_layers]
    early = Packed(*ops.strided_conv_stack(waveforms.values, layers[:_POOLED_AFTER], waveforms.layout))
    pool = SequenceCompressor(early.values.shape[1], kind="average", factor=2)
    pooled = pool(early).frames
    frames = Packed(*ops.strided_conv_stack(pooled.values, layers[_POOLED_AFTER:], pooled.layout))
    projected, _ = encoder.feature_projection(frames.values)
    features: Packed = encoder.encoder(Packed(projected, frames.layout))[-1]
    return features


def _operations(config: EncoderConfig, lengths_s: list[float], period_ms: float) -> int:
    return sum(count_multiplications(config, seconds=s, frame_period_ms=period_ms).total for s in lengths_s)


def _operations_pooled(config: EncoderConfig, lengths_s: list[float]) -> int:
    """Count the multiplications: all of the earlier convolutions, half of the later ones, the transformer at 40 ms."""
    plain = replace(config, compressor="none")
    early = replace(
        plain,
        conv_dim=plain.conv_dim[:_POOLED_AFTER],
        conv_kernel=plain.conv_kernel[:_POOLED_AFTER],
        conv_stride=plain.conv_stride[:_POOLED_AFTER],
    )
    total = 0.0
    for s in lengths_s:
        before = count_multiplications(early, seconds=s).front_end
        whole, behind = count_multiplications(plain, seconds=s, frame_period_ms=40.0)
        total += before + (whole - before) / 2 + behind
    return round(total)


def periods(title: str, layers: int, device: torch.device) -> Row:
    """Measure one encoder at every frame period, in fp32 on the CPU and in bf16 on a GPU.

    Args:
        title: Title of the row.
        layers: Number of transformer layers.
        device: Device to measure on.
    """
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = EncoderConfig(num_hidden_layers=layers, compressor="integrate-and-fire", do_normalize=False)
    encoder = Encoder(config).to(device, dtype).eval()
    exact = Encoder(config).to(device, torch.float64).eval()
    exact.load_state_dict(encoder.state_dict())
    lengths_s = workloads.read_speech(8 if device.type == "cpu" else workloads.utterances_for(400))

    def outputs(model: Encoder, dtype: torch.dtype) -> Outputs:
        batch = _as(workloads.waveforms(_GATE_S, device), dtype)
        found = {_name(period): model(batch, frame_period_ms=period).features.values for period in _PERIODS_MS}
        return found | {_POOLED: _encode_pooled(model, batch).values}

    batch = _as(workloads.waveforms(lengths_s, device), dtype)
    gate = cache(_no_grad(partial(outputs, encoder, dtype)))
    contenders = Contenders()
    for period in _PERIODS_MS:
        contenders.add(_name(period), _no_grad(partial(encoder, batch, frame_period_ms=period)), gate)
    contenders.add(_POOLED, _no_grad(partial(_encode_pooled, encoder, batch)), gate)
    row = compare(
        title,
        contenders,
        reference=_no_grad(partial(outputs, exact, torch.float64)),
        tolerance=_TOLERANCES[dtype],
        device=device,
        audio_s=sum(lengths_s),
        # On two cores a round takes 15 to 30 s, and three rounds are too few to resolve a difference of 15 %.
        budget_s=150 if device.type == "cpu" else 30,
    )
    counts = {_name(period): _operations(config, lengths_s, period) for period in _PERIODS_MS}
    counts[_POOLED] = _operations_pooled(config, lengths_s)
    full = _name(_PERIODS_MS[0])
    for name, count in counts.items():
        time = row.measurements[name].seconds / row.measurements[full].seconds
        share = count / counts[full]
        row.notes.append(
            f"{name}: {time:.3f} of the time, {share:.3f} of the multiplications; ratio {time / share:.2f}"
        )
    return row


def _as(batch: Packed, dtype: torch.dtype) -> Packed:
    return Packed(batch.values.to(dtype), batch.layout)


def _no_grad(call: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(call)


ROWS: Rows = {
    "compression-two-layers": partial(
        periods, "encoder forward at several frame periods, 2 layers of 768, read-speech", 2
    ),
    "compression-base": partial(periods, "encoder forward at several frame periods, 12 layers of 768, read-speech", 12),
}

if __name__ == "__main__":
    main(ROWS, __doc__ or "", targets={"cpu": [], "cuda": []})
