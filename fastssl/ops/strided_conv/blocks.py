"""The native CPU kernels of `strided_conv`: matrix products on blocks of frames that stay in cache.

The frames of a layer lie on a *grid*: as packed, but with so many zero rows after each sequence that every sequence
begins at a multiple of all later strides. Hence one product serves frames of many sequences, no window reaches from a
sequence into the next one, and the time spent in Python does not depend on the number of sequences. Activations exist
for one block at a time: what is kept is packed, and the grid is where C++ unfolds it. README.md has the derivation.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.ops._gemm import nn, nt, tn

#: The compiled kernels that this module calls: name -> signature.
PARTS = {
    "strided_conv_epilogue_fwd": (
        "(Tensor source, Tensor? source_begins, Tensor taps, Tensor parameters, Tensor statistics, Tensor cu_seqlens,"
        " Tensor grid, int first_row, int rows, Tensor(a!) out, bool out_is_packed, int stride, str norm, float eps,"
        " str activation) -> ()"
    ),
    "strided_conv_epilogue_bwd": (
        "(Tensor grad_first, Tensor grad_second, int phases, bool grad_is_packed, Tensor source, Tensor source_begins,"
        " Tensor taps, Tensor parameters, Tensor statistics, Tensor cu_seqlens, Tensor grid, int first_row, int rows,"
        " Tensor(a!)? grad_conv, bool grad_conv_is_packed, Tensor(b!)? sums, int stride, str norm, float eps,"
        " str activation) -> ()"
    ),
    "strided_conv_group_bwd": (
        "(Tensor grad_first, Tensor grad_second, int phases, bool grad_is_packed, Tensor conv_out, Tensor parameters,"
        " Tensor statistics, Tensor cu_seqlens, Tensor grid, Tensor(a!) grad_conv, Tensor(b!) sums, float eps,"
        " str activation) -> ()"
    ),
    "strided_conv_group_statistics": "(Tensor conv_out, Tensor parameters, Tensor cu_seqlens, float eps) -> Tensor",
    "strided_conv_first_statistics": (
        "(Tensor x, Tensor taps, Tensor parameters, Tensor cu_seqlens_in, Tensor cu_seqlens, int stride, float eps)"
        " -> (Tensor, Tensor, Tensor)"
    ),
}

# A block's windows have about this many numbers (measured: larger ones leave the cache, smaller ones cost calls).
_BLOCK_NUMBERS = 3 << 19


class _Layer(NamedTuple):
    """One layer, as the kernels take it; layer -1 is the input, an identity."""

    weight: Tensor  # (C_out, K, C_in)
    taps: Tensor  # (K, C_out) in the accumulation type where the kernels compute the convolution, else (0, C_out)
    parameters: Tensor  # (3, C_out) bias, norm_weight, norm_bias in the accumulation type
    cu_seqlens: Tensor  # (B + 1,) of its output
    grid: Tensor  # (B + 1,) of its output
    rows: int  # of the grid
    total: int  # frames of its output
    stride: int
    norm: str
    eps: float
    activation: str
    halo: int  # earlier output frames whose windows reach a frame that a window begins at


class _Gradients(NamedTuple):
    """Gradients of a layer's output: row u * phases + p is in `first` for the low p, in `second` for the others."""

    first: Tensor  # (U, phases_first * C)
    second: Tensor  # (U, phases_second * C)
    phases: int
    packed: bool  # `first` is all of the packed gradient


class _Stack:
    """The layers of one call, with the outputs of their convolutions as far as they exist."""

    def __init__(
        self,
        x: Tensor,  # (N, C_in)
        weights: Sequence[Tensor],  # (C_out, C_in, K)
        biases: Sequence[Tensor | None],  # (C_out,)
        norm_weights: Sequence[Tensor | None],  # (C_out,)
        norm_biases: Sequence[Tensor | None],  # (C_out,)
        cu_seqlens: Sequence[Tensor],  # (B + 1,)
        totals: Sequence[int],
        strides: Sequence[int],
        norms: Sequence[str],
        eps: Sequence[float],
        activations: Sequence[str],
        *,
        first_from_waveform: bool,
    ) -> None:
        self.x, self.first_from_waveform = x, first_from_waveform
        accumulation = torch.promote_types(x.dtype, torch.float32)
        grids = _grids(cu_seqlens, [weight.shape[2] for weight in weights], strides)
        self.layers = []
        for index, weight in enumerate(weights):
            kernel = weight.shape[2] if index == 0 and first_from_waveform else 0
            channels = weight.shape[0]
            parameters = torch.stack(
                [
                    torch.full((channels,), default, dtype=accumulation) if given is None else given.to(accumulation)
                    for given, default in ((biases[index], 0.0), (norm_weights[index], 1.0), (norm_biases[index], 0.0))
                ]
            )
            self.layers.append(
                _Layer(
                    weight.permute(0, 2, 1).contiguous(),
                    weight[:, 0, :kernel].t().to(accumulation).contiguous(),
                    parameters,
                    cu_seqlens[index + 1],
                    grids[index + 1],
                    int(grids[index + 1][-1]),
                    totals[index],
                    strides[index],
                    norms[index],
                    eps[index],
                    activations[index],
                    -(-weight.shape[2] // strides[index]) - 1,
                )
            )
        c_in = x.shape[1]
        identity = torch.tensor([0.0, 1.0, 0.0], dtype=accumulation)[:, None].expand(3, c_in).contiguous()
        no_taps, rows = identity.new_empty(0, c_in), int(grids[0][-1])
        self.input = _Layer(x, no_taps, identity, cu_seqlens[0], grids[0], rows, len(x), 1, "none", 0.0, "none", 0)
        self.conv_outs = [x.new_empty(0, weight.shape[0]) for weight in weights]
        self.statistics = [layer.parameters.new_empty(0) for layer in self.layers]

    def convolve(self, index: int) -> Tensor:  # (total, C_out)
        """The convolution of a layer by itself, packed."""
        layer = self.layers[index]
        conv_out = self.x.new_empty(layer.total, layer.weight.shape[0])
        matrix = layer.weight.flatten(1)
        identity = layer.parameters.new_zeros(3, matrix.shape[0])
        identity[1] = 1
        for start, stop in self.blocks(index):
            product = nt(self.windows(index, start, stop), matrix)
            torch.ops.fastssl_native.strided_conv_epilogue_fwd(
                product, None, layer.taps[:0], identity, self.statistics[index], layer.cu_seqlens, layer.grid,
                start, stop - start, conv_out, True, 1, "none", 0.0, "none",
            )  # fmt: skip
        return conv_out

    def blocks(self, index: int, *, whole: bool = False) -> Iterator[tuple[int, int]]:
        """First and last grid rows of the blocks of a layer's output."""
        layer = self.layers[index]
        rows = layer.rows if whole else max(16, _BLOCK_NUMBERS // layer.weight[0].numel())
        for start in range(0, layer.rows, max(rows, 1)):
            yield start, min(start + rows, layer.rows)

    def windows(self, index: int, start: int, stop: int) -> Tensor:  # (stop - start, K * C_in)
        """What output rows `start` to `stop` of a layer see: overlapping rows over a block of its input."""
        layer = self.layers[index]
        _, kernel, c_in = layer.weight.shape
        frames = self.x.new_empty((stop - start - 1) * layer.stride + kernel, c_in)
        self.epilogue(index - 1, frames, first_row=start * layer.stride)
        return frames.as_strided((stop - start, kernel * c_in), (layer.stride * c_in, 1))

    def source(self, index: int) -> tuple[_Layer, Tensor, Tensor, Tensor, Tensor]:
        """A layer, and where its kernels find its convolution, where each sequence of that begins, its statistics."""
        if index < 0:
            return self.input, self.x, self.input.cu_seqlens, self.input.taps, self.input.parameters
        layer, statistics = self.layers[index], self.statistics[index]
        if layer.taps.shape[0]:
            return layer, self.x, self.input.cu_seqlens, layer.taps, statistics
        return layer, self.conv_outs[index], layer.cu_seqlens, layer.taps, statistics

    def epilogue(self, index: int, out: Tensor, *, first_row: int = 0, packed: bool = False) -> None:
        """Activations of a layer into `out`: grid rows from `first_row` on, or all of them packed."""
        layer, source, begins, taps, statistics = self.source(index)
        grid, rows = (layer.cu_seqlens, layer.total) if packed else (layer.grid, len(out))
        torch.ops.fastssl_native.strided_conv_epilogue_fwd(
            source, begins, taps, layer.parameters, statistics, layer.cu_seqlens, grid,
            first_row, rows, out, packed, layer.stride, layer.norm, layer.eps, layer.activation,
        )  # fmt: skip

    def new_grad(self, index: int) -> Tensor | None:  # (halo + rows, C_out)
        """Room for the gradient of a layer's convolution on its grid, after as many zero rows as a window overlaps."""
        layer = self.layers[index]
        if layer.taps.shape[0]:
            return None
        grad = self.x.new_empty(layer.halo + layer.rows, layer.weight.shape[0])
        grad[: grad.shape[0] if layer.norm == "group" else layer.halo].zero_()
        return grad

    def new_sums(self, index: int, has_bias: bool) -> Tensor | None:  # (B or 1, K + 3, C_out)
        """Room for the sums over frames that the gradients of a layer's parameters are made of."""
        layer = self.layers[index]
        if not layer.taps.shape[0] and layer.norm == "none" and not has_bias:
            return None
        sequences = len(layer.grid) - 1 if layer.norm == "group" else 1
        return torch.zeros(sequences, layer.taps.shape[0] + 3, layer.weight.shape[0], dtype=torch.float64)

    def epilogue_backward(
        self, index: int, grads: _Gradients, grad: Tensor | None, sums: Tensor | None, first_row: int, rows: int
    ) -> None:
        """From the gradient of a layer's output to that of its convolution, on some grid rows; adds to `sums`."""
        layer, source, begins, taps, statistics = self.source(index)
        if grad is not None and index >= 0:
            grad = grad[layer.halo + first_row : layer.halo + first_row + rows]
        if layer.norm == "group" and not taps.shape[0]:
            torch.ops.fastssl_native.strided_conv_group_bwd(
                grads.first, grads.second, grads.phases, grads.packed, source, layer.parameters, statistics,
                layer.cu_seqlens, layer.grid, grad, sums, layer.eps, layer.activation,
            )  # fmt: skip
            return
        torch.ops.fastssl_native.strided_conv_epilogue_bwd(
            grads.first, grads.second, grads.phases, grads.packed, source, begins, taps, layer.parameters, statistics,
            layer.cu_seqlens, layer.grid, first_row, rows, grad, index < 0, sums,
            layer.stride, layer.norm, layer.eps, layer.activation,
        )  # fmt: skip

    def products_backward(
        self, index: int, grad: Tensor, grad_below: Tensor | None, sums_below: Tensor | None, goes_on: bool
    ) -> Tensor:  # (C_out, C_in, K)
        """Gradient of a layer's weight, and where it goes on that of the convolution (or the input) below."""
        layer = self.layers[index]
        c_out, kernel, c_in = layer.weight.shape
        grad_weight = torch.zeros(c_out, kernel * c_in, dtype=layer.parameters.dtype)
        taps, longer = divmod(kernel, layer.stride)
        # Input frame u * stride + p, of phase p, is seen by output frames u, u - 1, ...: one more in the first phases.
        matrix_first = _phases(layer.weight, 0, longer, taps + 1, layer.stride)
        matrix_second = _phases(layer.weight, longer, layer.stride - longer, taps, layer.stride)
        # Group norm needs all gradients before it gives one.
        whole = index > 0 and self.layers[index - 1].norm == "group" and grad_below is not None
        for start, stop in self.blocks(index, whole=whole):
            windows = self.windows(index, start, stop).contiguous()
            grad_weight += tn(grad[layer.halo + start : layer.halo + stop], windows)
            if goes_on:
                first = _product(grad, matrix_first, layer.halo + start - taps, stop - start, c_out)
                second = _product(grad, matrix_second, layer.halo + start - taps + 1, stop - start, c_out)
                grads = _Gradients(first, second, layer.stride, False)
                first_row, rows = start * layer.stride, (stop - start) * layer.stride
                self.epilogue_backward(index - 1, grads, grad_below, sums_below, first_row, rows)
        return grad_weight.view(c_out, kernel, c_in).permute(0, 2, 1).to(layer.weight.dtype).contiguous()

    def first_statistics(self) -> tuple[Tensor, Tensor, Tensor]:  # (2, B, C), (B, K), (B, K, K)
        """Mean and rstd of the first layer's convolution, and the mean and covariance of the waveform's windows."""
        layer = self.layers[0]
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.fastssl_native.strided_conv_first_statistics(
            self.x, layer.taps, layer.parameters, self.input.cu_seqlens, layer.cu_seqlens, layer.stride, layer.eps
        )
        return found

    def first_grad_weight(self, sums: Tensor) -> Tensor:  # (C_out, 1, K)
        """Gradient of the first layer's weight; turns its sums for group norm into those of the other layers."""
        layer = self.layers[0]
        kernel = layer.taps.shape[0]
        if layer.norm == "group":
            _, mean, covariance = self.first_statistics()
            taps, rstd, scale = layer.taps.double(), self.statistics[0][1].double(), layer.parameters[1].double()
            grad_shift = sums[:, kernel].clone()  # (B, C)
            centred = sums[:, :kernel] - mean[:, :, None] * grad_shift[:, None]  # (B, K, C)
            grad_scale = rstd * (taps * centred).sum(1)
            slope = (grad_scale * rstd)[:, None] * (covariance @ taps)
            grad_taps = ((rstd * scale)[:, None] * (centred - slope)).sum(0)
            sums[:, kernel:] = torch.stack([torch.zeros_like(grad_shift), grad_scale, grad_shift], 1)
        else:
            grad_taps = sums[0, :kernel]
        return grad_taps.t()[:, None].to(layer.weight.dtype).contiguous()


def _phases(weight: Tensor, first: int, phases: int, taps: int, stride: int) -> Tensor:  # (taps * C_out, phases * C_in)
    """The weights by which `taps` successive output gradients make the gradients of some phases of the input."""
    tap = torch.arange(taps - 1, -1, -1)[:, None] * stride + torch.arange(first, first + phases)
    return weight[:, tap].permute(1, 0, 2, 3).reshape(taps * weight.shape[0], phases * weight.shape[2])


def _product(grad: Tensor, matrix: Tensor, first_row: int, rows: int, c_out: int) -> Tensor:
    """Successive rows of `grad` next to each other, times the matrix of some phases."""
    if matrix.numel() == 0:
        return grad.new_empty(0, 0)
    view = grad.as_strided((rows, matrix.shape[0]), (c_out, 1), first_row * c_out)
    return nn(view, matrix)


def _grids(cu_seqlens: Sequence[Tensor], kernels: Sequence[int], strides: Sequence[int]) -> list[Tensor]:
    """Where each sequence begins on the grid of the input and of each layer's output: L + 1 of (B + 1,).

    A sequence has the rows that its frames need, and one less than the windows that see an input frame are apart more:
    the gradient of the input of a layer is a product over so many rows of zeros.
    """
    step, needed = 1, torch.zeros_like(cu_seqlens[0][1:])
    for begins, kernel, stride in zip(cu_seqlens[:0:-1], kernels[::-1], strides[::-1], strict=True):
        frames = begins.diff() + -(-kernel // stride) - 1
        needed = torch.maximum(needed, (frames + step - 1) // step)
        step *= stride
    last = torch.nn.functional.pad(needed.cumsum(0, dtype=torch.int32), (1, 0))
    grids = [last]
    for stride in strides[::-1]:
        grids.insert(0, grids[0] * stride)
    return grids


def strided_conv_fwd(
    x: Tensor,  # (N, C_in)
    weights: Sequence[Tensor],  # (C_out, C_in, K)
    biases: Sequence[Tensor | None],  # (C_out,)
    norm_weights: Sequence[Tensor | None],  # (C_out,)
    norm_biases: Sequence[Tensor | None],  # (C_out,)
    cu_seqlens: Sequence[Tensor],  # (B + 1,)
    totals: Sequence[int],
    max_lengths: Sequence[int],
    strides: Sequence[int],
    norms: Sequence[str],
    eps: Sequence[float],
    activations: Sequence[str],
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # (N_out, C_out)
    """`fastssl_native::strided_conv_fwd` on the CPU."""
    stack = _Stack(
        x, weights, biases, norm_weights, norm_biases, cu_seqlens, totals, strides, norms, eps, activations,
        first_from_waveform=x.shape[1] == 1,
    )  # fmt: skip
    for index, layer in enumerate(stack.layers):
        if layer.taps.shape[0]:
            if layer.norm == "group":
                stack.statistics[index] = stack.first_statistics()[0]
            continue
        stack.conv_outs[index] = stack.convolve(index)
        if index > 0 and not save:
            stack.conv_outs[index - 1] = x.new_empty(0, weights[index - 1].shape[0])
        if layer.norm == "group":
            stack.statistics[index] = torch.ops.fastssl_native.strided_conv_group_statistics(
                stack.conv_outs[index], layer.parameters, layer.cu_seqlens, layer.eps
            )
    out = x.new_empty(totals[-1], weights[-1].shape[0])
    stack.epilogue(len(weights) - 1, out, packed=True)
    if not save:
        stack.conv_outs[-1] = x.new_empty(0, weights[-1].shape[0])
    return out, stack.conv_outs, stack.statistics


def strided_conv_bwd(
    grad_out: Tensor,  # (N_out, C_out)
    x: Tensor,  # (N, C_in)
    weights: Sequence[Tensor],  # (C_out, C_in, K)
    biases: Sequence[Tensor | None],  # (C_out,)
    norm_weights: Sequence[Tensor | None],  # (C_out,)
    norm_biases: Sequence[Tensor | None],  # (C_out,)
    conv_outs: Sequence[Tensor],  # (N_l, C_l)
    statistics: Sequence[Tensor],  # (2, B, C_l)
    cu_seqlens: Sequence[Tensor],  # (B + 1,)
    totals: Sequence[int],
    max_lengths: Sequence[int],
    strides: Sequence[int],
    norms: Sequence[str],
    eps: Sequence[float],
    activations: Sequence[str],
    needs_grad_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """`fastssl_native::strided_conv_bwd` on the CPU."""
    stack = _Stack(
        x, weights, biases, norm_weights, norm_biases, cu_seqlens, totals, strides, norms, eps, activations,
        first_from_waveform=x.shape[1] == 1 and not needs_grad_x,
    )  # fmt: skip
    stack.conv_outs, stack.statistics = list(conv_outs), list(statistics)
    if x.shape[1] == 1 and needs_grad_x:
        stack.conv_outs[0] = stack.convolve(0)
    sums = [stack.new_sums(index, bias is not None) for index, bias in enumerate(biases)]
    grad_weights = []
    grad_x = x.new_zeros(x.shape if needs_grad_x else (0, x.shape[1]))

    last = len(weights) - 1
    grads = _Gradients(grad_out, grad_out.new_empty(0, 0), 1, True)
    grad = stack.new_grad(last)
    stack.epilogue_backward(last, grads, grad, sums[last], 0, stack.layers[last].rows)
    for index in range(last, -1, -1):
        if index == 0 and sums[0] is not None and stack.first_from_waveform:
            grad_weights.append(stack.first_grad_weight(sums[0]))
            continue
        assert grad is not None
        grad_below = stack.new_grad(index - 1) if index else grad_x
        sums_below = sums[index - 1] if index else None
        grad_weights.append(stack.products_backward(index, grad, grad_below, sums_below, index > 0 or needs_grad_x))
        grad = grad_below

    def gradients(parameters: Sequence[Tensor | None], row: int) -> list[Tensor]:
        return [
            x.new_empty(0) if parameter is None or total is None else total[:, row].sum(0).to(parameter.dtype)
            for parameter, total in zip(parameters, sums, strict=True)
        ]

    return grad_x, grad_weights[::-1], gradients(biases, -3), gradients(norm_weights, -2), gradients(norm_biases, -1)
