"""Lower limits on the time that work takes: the time of its GEMMs, or of a copy of the bytes it moves.

The GEMM limit is the sum of the times that the GEMMs of the valid audio take alone, each measured at its own shape in
the same run. Everything else (norms, activations, softmax, dropout, losses, the optimiser) counts as free, so the limit
can be approached but not reached.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.machine import seconds_of, undisturbed
from fastssl.models.encoder import EncoderConfig
from fastssl.models.wav2vec2 import Wav2Vec2Config
from fastssl.packing import Layout

# Matrix products with more rows or a larger inner dimension than this are measured at this size, and their time is
# scaled up. Beyond this size, the rate no longer changes.
_TALLEST = 8192
_SECONDS_PER_SHAPE = 0.15
_REPEATS = 9


class Gemm(NamedTuple):
    """`times` repetitions of a batch of `batch` matrix products, (rows, inner) x (inner, columns)."""

    rows: int
    inner: int
    columns: int
    batch: int = 1
    times: int = 1

    @property
    def flops(self) -> int:
        """Number of floating-point operations; a multiplication with its addition counts as two."""
        return 2 * self.rows * self.inner * self.columns * self.batch * self.times


def linear(
    rows: int, inner: int, columns: int, *, backward: bool, grad_input: bool = True, times: int = 1
) -> list[Gemm]:
    """Return the GEMMs of a linear layer: forward, and with `backward` the gradients of its weight and input."""
    gemms = [Gemm(rows, inner, columns, times=times)]
    if backward:
        gemms += [Gemm(inner, rows, columns, times=times)]
        gemms += [Gemm(rows, columns, inner, times=times)] if grad_input else []
    return gemms


def attention(frames: Sequence[int], heads: int, width: int, *, backward: bool, times: int = 1) -> list[Gemm]:
    """Return the GEMMs of attention: QK' and PV of each utterance, and with `backward` also dV, dP, dQ and dK.

    The limit assumes that the backward pass recomputes nothing.
    """
    per_direction = 3 if backward else 1
    gemms = []
    for length in frames:
        wide, deep = Gemm(length, width, length, heads), Gemm(length, length, width, heads)
        # In the backward pass, dP has the shape of QK'; dV, dQ and dK have the shape of PV.
        gemms += [wide._replace(times=times * (2 if backward else 1))]
        gemms += [deep._replace(times=times * (1 + per_direction if backward else 1))]
    return gemms


def front_end(config: EncoderConfig, layout: Layout, *, backward: bool) -> tuple[list[Gemm], Layout]:
    """Return the front end's convolutions as GEMMs, and the layout of the frames that they produce.

    Each convolution is a product with a matrix (kernel x input channels, output channels). The gradient of the
    waveform is not needed and not counted.
    """
    gemms: list[Gemm] = []
    c_in = 1
    for c_out, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        layout = layout.after_conv(kernel, stride)
        gemms += linear(layout.total, kernel * c_in, c_out, backward=backward, grad_input=c_in > 1)
        c_in = c_out
    return gemms, layout


def encoder(config: EncoderConfig, samples: Sequence[int], *, backward: bool) -> list[Gemm]:
    """Return all GEMMs of `fastssl.models.encoder.Encoder` on utterances with these numbers of samples."""
    gemms, layout = front_end(config, Layout.from_lengths(samples), backward=backward)
    gemms += linear(layout.total, config.conv_dim[-1], config.hidden_size, backward=backward)
    gemms += _positional(config, layout.total, backward=backward)
    return gemms + _transformer(config, layout.lengths, backward=backward)


def squeezed_encoder(config: EncoderConfig, samples: Sequence[int], *, factor: int, backward: bool) -> list[Gemm]:
    """Return all GEMMs of SEW, whose frames are as wide as the transformer, and squeezed by a factor before it."""
    gemms, layout = front_end(config, Layout.from_lengths(samples), backward=backward)
    squeezed = [frames // factor for frames in layout.lengths]
    gemms += _positional(config, sum(squeezed), backward=backward)
    gemms += _transformer(config, squeezed, backward=backward)
    return gemms + linear(sum(squeezed), config.hidden_size, factor * config.hidden_size, backward=backward)


def conformer(config: EncoderConfig, samples: Sequence[int], *, backward: bool) -> list[Gemm]:
    """Return all GEMMs of a Conformer with rotary positions: depthwise convolutions are not among them."""
    gemms, layout = front_end(config, Layout.from_lengths(samples), backward=backward)
    N, D, depth = layout.total, config.hidden_size, config.num_hidden_layers
    gemms += linear(N, config.conv_dim[-1], D, backward=backward)
    gemms += _transformer(config, layout.lengths, backward=backward)
    gemms += linear(N, D, config.intermediate_size, backward=backward, times=depth)
    gemms += linear(N, config.intermediate_size, D, backward=backward, times=depth)
    gemms += linear(N, D, 2 * D, backward=backward, times=depth)
    return gemms + linear(N, D, D, backward=backward, times=depth)


def _positional(config: EncoderConfig, frames: int, *, backward: bool) -> list[Gemm]:
    D, groups, kernel = config.hidden_size, config.num_conv_pos_embedding_groups, config.num_conv_pos_embeddings
    # Gradient of the positional convolution's input: a convolution of the same shape.
    positional = linear(frames, kernel * D // groups, D // groups, backward=backward, grad_input=False, times=groups)
    return positional + positional[:1] if backward else positional


def _transformer(config: EncoderConfig, lengths: Sequence[int], *, backward: bool) -> list[Gemm]:
    N, D, depth = sum(lengths), config.hidden_size, config.num_hidden_layers
    gemms = linear(N, D, D, backward=backward, times=4 * depth)
    gemms += linear(N, D, config.intermediate_size, backward=backward, times=depth)
    gemms += linear(N, config.intermediate_size, D, backward=backward, times=depth)
    heads = config.num_attention_heads
    return gemms + attention(lengths, heads, D // heads, backward=backward, times=depth)


def quantizer(frames: int, c_in: int, groups: int, codes: int, width: int) -> list[Gemm]:
    """Return the GEMMs of a Gumbel quantiser: the logits, and the straight-through gradient of the codes.

    Looking up the chosen code takes no matrix product.
    """
    return [*linear(frames, c_in, groups * codes, backward=True), Gemm(frames, width // groups, codes, times=groups)]


def pretraining(config: Wav2Vec2Config, samples: Sequence[int], masked: Sequence[int]) -> list[Gemm]:
    """Return all GEMMs of a wav2vec 2.0 pre-training step.

    Args:
        config: Config of the model.
        samples: Number of samples of each utterance.
        masked: Number of masked frames of each utterance.
    """
    M, G, V = sum(masked), config.num_codevector_groups, config.num_codevectors_per_group
    gemms = encoder(config, samples, backward=True)
    gemms += quantizer(M, config.conv_dim[-1], G, V, config.codevector_dim)
    gemms += linear(M, config.hidden_size, config.proj_codevector_dim, backward=True)
    gemms += linear(M, config.codevector_dim, config.proj_codevector_dim, backward=True)
    for frames in masked:
        gemms += linear(frames, config.proj_codevector_dim, frames, backward=True)
    return gemms


def gemm_limits(gemms: Sequence[Gemm], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Measure the limit in seconds with `aten::mm`, and in fp32 on a CPU also with the faster of `mm` and oneDNN."""
    by_aten, fastest = 0.0, 0.0
    for gemm in gemms:
        if gemm.flops:
            rows, inner = min(gemm.rows, _TALLEST), min(gemm.inner, _TALLEST)
            seconds = _gemm_seconds(gemm._replace(rows=rows, inner=inner, times=1), dtype, device)
            scale = gemm.times * (gemm.rows / rows) * (gemm.inner / inner)
            by_aten += scale * seconds["aten"]
            fastest += scale * min(seconds.values())
    name = f"GEMMs ({str(dtype).removeprefix('torch.')})"
    limits = {f"{name}, aten::mm": by_aten}
    if _has_onednn(dtype, device):
        limits[f"{name}, fastest there is"] = fastest
    return limits


class CopyLimit(NamedTuple):
    """A limit set by memory bandwidth: the time to move bytes at the rate of a copy.

    The copy touches as much memory as the work. It takes turns with the contenders, so that it finds the caches in the
    same state.

    Args:
        run: Makes the copy.
        moved_bytes: Smallest number of bytes that the work can read and write.
        footprint_bytes: Number of bytes that the copy reads and writes: as much memory as the work touches.
    """

    run: Callable[[], Any]
    moved_bytes: int
    footprint_bytes: int

    def named_seconds(self, copy_s: float) -> tuple[str, float]:
        """Return the limit's name and its time in seconds, computed from the time of one copy."""
        rate = self.footprint_bytes / copy_s
        return f"copy, {self.footprint_bytes / 1e6:.3g} MB at {rate / 1e9:.3g} GB/s", self.moved_bytes / rate


def copy_limit(moved_bytes: int, footprint_bytes: int, device: torch.device) -> CopyLimit:
    """Return a limit whose copy is a clone of half the footprint: like an op, it must allocate its result."""
    source = torch.ones(footprint_bytes // 8, dtype=torch.float32, device=device)
    return CopyLimit(source.clone, moved_bytes, footprint_bytes)


@cache
def _gemm_seconds(gemm: Gemm, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    rows, inner, columns, batch, _ = gemm
    a = torch.randn(batch, rows, inner, device=device, dtype=dtype)
    b = torch.randn(batch, columns, inner, device=device, dtype=dtype)  # the layout of a linear layer's weight
    calls: dict[str, Callable[[], Any]]
    if batch == 1:
        x, weight = a[0], b[0]
        calls = {"aten": lambda: torch.mm(x, weight.t())}
    else:
        calls = {"aten": lambda: torch.bmm(a, b.transpose(1, 2))}
    if _has_onednn(dtype, device):
        calls["oneDNN"] = lambda: [_onednn(x, weight) for x, weight in zip(a, b, strict=True)]
    return _median_seconds(calls, device)


def _has_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether oneDNN offers a matrix product other than that of `aten::mm`; in bf16 they are the same."""
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _onednn(x: Tensor, weight: Tensor) -> Tensor:  # (M, K), (N, K) -> (M, N)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def _median_seconds(calls: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Return each call's median time in seconds over a few interleaved repetitions."""
    for call in calls.values():
        call()
    return undisturbed(lambda: _interleaved_medians(calls, device))


def _interleaved_medians(calls: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    began_s = time.perf_counter()
    for repeat in range(_REPEATS):
        if repeat >= 3 and time.perf_counter() - began_s > _SECONDS_PER_SHAPE * len(calls):
            break
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
    return {name: statistics.median(values) for name, values in seconds.items()}
