"""The native CPU kernels of `strided_conv`: matrix products on blocks of frames that stay in cache.

The frames of a layer lie on a *grid*: as packed, but with so many zero rows after each sequence that every sequence
begins at a multiple of all later strides. Hence one product serves frames of many sequences, no window reaches from a
sequence into the next one, and the time spent in Python does not depend on the number of sequences.

A block goes through the layers as deep as it can before the next one begins, so activations and gradients exist for one
block at a time; what is kept for the backward is packed, and compiled kernels unfold it. README.md has the derivation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.kernels.gemm import nt

#: The compiled kernels that this module calls: name -> signature.
PARTS = {
    "strided_conv_epilogue_fwd": (
        "(Tensor source, Tensor? source_begins, Tensor taps, Tensor parameters, Tensor statistics, Tensor cu_seqlens,"
        " Tensor grid, int first_row, int rows, Tensor(a!) out, bool out_is_packed, int out_kernel, int out_stride,"
        " int stride, str norm, float eps, str activation) -> ()"
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
    "strided_conv_transpose": "(Tensor x, Tensor(a!) out) -> ()",
    "strided_conv_group_statistics": "(Tensor conv_out, Tensor parameters, Tensor cu_seqlens, float eps) -> Tensor",
    "strided_conv_first_statistics": (
        "(Tensor x, Tensor taps, Tensor parameters, Tensor cu_seqlens_in, Tensor cu_seqlens, int stride, float eps)"
        " -> (Tensor, Tensor, Tensor)"
    ),
}

# A block's windows have about this many numbers (measured: larger ones leave the cache, smaller ones cost calls).
_BLOCK_NUMBERS = 3 << 19
_FEWEST_ROWS = 16


class _Layer(NamedTuple):
    """One layer, as the kernels take it; the input is an identity before the first."""

    matrix: Tensor  # (C_out, K * C_in)
    taps: Tensor  # (K, C_out) in the accumulation type where the kernels compute the convolution, else (0, C_out)
    parameters: Tensor  # (3, C_out) bias, norm_weight, norm_bias in the accumulation type
    cu_seqlens: Tensor  # (B + 1,) of its output
    grid: Tensor  # (B + 1,) of its output
    rows: int  # of the grid
    block: int  # rows that are computed at a time
    total: int  # frames of its output
    kernel: int
    stride: int
    norm: str
    eps: float
    activation: str

    @property
    def channels(self) -> int:
        return self.parameters.shape[1]

    @property
    def from_waveform(self) -> bool:
        """Whether the kernels compute the convolution wherever they need it."""
        return self.taps.shape[0] > 0

    @property
    def halo(self) -> int:
        """How many output frames before frame t see an input frame that frame t sees too."""
        return -(-self.kernel // self.stride) - 1


class _Gradients(NamedTuple):
    """Gradients of a layer's output: row u * phases + p is in `first` for the low p, in `second` for the others."""

    first: Tensor  # (U, phases_first * C)
    second: Tensor  # (U, phases_second * C)
    phases: int
    packed: bool  # `first` is all of the packed gradient


class _Stack:
    """The layers of one call, and the output of each convolution as far as it is computed."""

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
        from_waveform: bool,
    ) -> None:
        self.x = x
        accumulation = torch.promote_types(x.dtype, torch.float32)
        grids = _grids(cu_seqlens, [weight.shape[2] for weight in weights], strides)
        self.layers: list[_Layer] = []
        whole = False
        for index, weight in enumerate(weights):
            c_out, c_in, kernel = weight.shape
            parameters = torch.zeros(3, c_out, dtype=accumulation)
            parameters[1] = 1
            for row, given in zip(parameters, (biases[index], norm_weights[index], norm_biases[index]), strict=True):
                if given is not None:
                    row.copy_(given)
            rows, computed = int(grids[index + 1][-1]), index == 0 and from_waveform
            # The backward of group norm takes all gradients of a sequence before it gives one.
            whole = whole or (norms[index] == "group" and not computed)
            block = rows if whole else max(_FEWEST_ROWS, _BLOCK_NUMBERS // max(1, c_in * kernel))
            self.layers.append(
                _Layer(
                    weight.permute(0, 2, 1).reshape(c_out, kernel * c_in),
                    weight[:, 0, : kernel if computed else 0].t().to(accumulation).contiguous(),
                    parameters,
                    cu_seqlens[index + 1],
                    grids[index + 1],
                    rows,
                    min(block, rows),
                    totals[index],
                    kernel,
                    strides[index],
                    norms[index],
                    eps[index],
                    activations[index],
                )
            )
        identity = parameters.new_tensor([0.0, 1.0, 0.0])[:, None].expand(3, x.shape[1]).contiguous()
        no_taps, rows = identity[:0], int(grids[0][-1])
        self.input = _Layer(
            no_taps, no_taps, identity, cu_seqlens[0], grids[0], rows, rows, len(x), 1, 1, "none", 0.0, "none"
        )
        sequences = len(cu_seqlens[0]) - 1
        self.statistics = [
            layer.parameters.new_zeros((2, sequences, layer.channels) if layer.norm == "group" else 0)
            for layer in self.layers
        ]
        self.conv_outs = [
            x.new_empty(0 if layer.from_waveform else layer.total, layer.channels) for layer in self.layers
        ]
        self.done = [0] * len(weights)  # grid rows of `conv_outs` that are computed
        self.room = x.new_empty(max(layer.block * layer.matrix.shape[1] for layer in self.layers))

    def convolve(self, index: int, rows: int) -> None:
        """Compute the convolution of a layer up to a grid row, and those below as far as it needs them."""
        layer = self.layers[index]
        if layer.norm == "group":
            rows = layer.rows
        while self.done[index] < min(rows, layer.rows):
            start = self.done[index]
            stop = min(start + layer.block, layer.rows)
            product = nt(self.windows(index, start, stop), layer.matrix)
            identity = torch.zeros_like(layer.parameters)
            identity[1] = 1
            torch.ops.fastssl_native.strided_conv_epilogue_fwd(
                product, None, layer.taps, identity, identity, layer.cu_seqlens, layer.grid, start, stop - start,
                self.conv_outs[index], True, 1, 1, 1, "none", 0.0, "none",
            )  # fmt: skip
            self.done[index] = stop
            if layer.norm == "group" and stop == layer.rows:
                self.statistics[index] = torch.ops.fastssl_native.strided_conv_group_statistics(
                    self.conv_outs[index], layer.parameters, layer.cu_seqlens, layer.eps
                )

    def windows(self, index: int, start: int, stop: int) -> Tensor:  # (stop - start, K * C_in)
        """What output rows `start` to `stop` of a layer see; valid until the next call."""
        layer = self.layers[index]
        out = self.room[: (stop - start) * layer.matrix.shape[1]].view(stop - start, -1)
        first_row, rows = start * layer.stride, (stop - start - 1) * layer.stride + layer.kernel
        self.epilogue(index - 1, first_row, rows, out, layer.kernel, layer.stride)
        return out

    def epilogue(self, index: int, first_row: int, rows: int, out: Tensor, kernel: int, stride: int) -> None:
        """Activations of a layer, or the input, on grid rows, as windows of so many frames."""
        layer, source, begins, statistics = self.source(index, first_row + rows)
        torch.ops.fastssl_native.strided_conv_epilogue_fwd(
            source, begins, layer.taps, layer.parameters, statistics, layer.cu_seqlens, layer.grid, first_row, rows,
            out, False, kernel, stride, layer.stride, layer.norm, layer.eps, layer.activation,
        )  # fmt: skip

    def source(self, index: int, rows: int) -> tuple[_Layer, Tensor, Tensor, Tensor]:
        """A layer, its convolution up to a grid row, where each sequence of that begins, and its statistics."""
        if index < 0:
            return self.input, self.x, self.input.cu_seqlens, self.input.parameters
        layer = self.layers[index]
        if layer.from_waveform:
            return layer, self.x, self.input.cu_seqlens, self.statistics[index]
        self.convolve(index, rows)
        return layer, self.conv_outs[index], layer.cu_seqlens, self.statistics[index]

    def first_statistics(self) -> tuple[Tensor, Tensor, Tensor]:  # (2, B, C), (B, K), (B, K, K)
        """Mean and rstd of the first layer's convolution, and the mean and covariance of the waveform's windows."""
        layer = self.layers[0]
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.fastssl_native.strided_conv_first_statistics(
            self.x, layer.taps, layer.parameters, self.input.cu_seqlens, layer.cu_seqlens, layer.stride, layer.eps
        )
        return found


def _grids(cu_seqlens: Sequence[Tensor], kernels: Sequence[int], strides: Sequence[int]) -> list[Tensor]:
    """Where each sequence begins on the grid of the input and of each layer's output: L + 1 of (B + 1,).

    A sequence has rows for its frames and for a layer's `halo` more, over which the gradient of the input is a product
    with zeros.
    """
    step, needed = 1, torch.zeros_like(cu_seqlens[0][1:])
    for begins, kernel, stride in zip(cu_seqlens[:0:-1], kernels[::-1], strides[::-1], strict=True):
        rows = begins.diff() + -(-kernel // stride) - 1
        needed = torch.maximum(needed, (rows + step - 1) // step)
        step *= stride
    grids = [torch.nn.functional.pad(needed.cumsum(0, dtype=torch.int32), (1, 0))]
    for stride in strides[::-1]:
        grids.insert(0, grids[0] * stride)
    return grids


class _Backward:
    """The gradients of one call. A block of gradients goes down to the first layer before the next one begins."""

    def __init__(self, stack: _Stack, has_bias: Sequence[bool], needs_grad_x: bool) -> None:
        self.stack = stack
        layers, x = stack.layers, stack.x
        self.grad_x = x.new_zeros(x.shape if needs_grad_x else (0, x.shape[1]))
        self.lowest = 1 if layers[0].from_waveform else 0  # layer that has products
        self.stop = 0 if needs_grad_x else 1  # layer below which no gradient is needed
        self.grad_matrices = [torch.zeros_like(layer.matrix, dtype=layer.parameters.dtype) for layer in layers]
        # Sums over frames that the gradients of parameters are made of: (B or 1, K + 3, C), see the kernels.
        self.sums: list[Tensor | None] = [
            torch.zeros(
                stack.statistics[index].shape[1] if layer.norm == "group" else 1,
                layer.taps.shape[0] + 3,
                layer.channels,
                dtype=torch.float64,
            )
            if layer.from_waveform or layer.norm != "none" or has_bias[index]
            else None
            for index, layer in enumerate(layers)
        ]
        # Gradients of a convolution's output: the block at hand, after the last rows of the block before.
        self.grads, self.phases = [], []
        for index, layer in enumerate(layers):
            above = layers[index + 1] if index + 1 < len(layers) else None
            rows = layer.block if above is None else above.block * above.stride
            self.grads.append(x.new_zeros(0 if layer.from_waveform else layer.halo + rows, layer.channels))
            # Input frame u * stride + p, of phase p, is seen by output frames u, u - 1, ...: one more if p is low.
            taps, low = divmod(layer.kernel, layer.stride)
            needed = index >= self.stop
            self.phases.append(
                (
                    _phases(layer, 0, low if needed else 0, taps + 1),
                    _phases(layer, low, layer.stride - low if needed else 0, taps),
                )
            )
        self.transposed = x.new_empty(max(layer.block * layer.channels for layer in layers))
        self.overlapping = x.new_empty(max(layer.block * layer.channels * (layer.halo + 1) for layer in layers))

    def run(self, grad_out: Tensor) -> None:
        """Everything, from the gradient of the packed output."""
        last = len(self.stack.layers) - 1
        grads = _Gradients(grad_out, grad_out.new_empty(0, 0), 1, True)
        layer = self.stack.layers[last]
        for start in range(0, layer.rows, max(1, layer.block)):
            stop = min(start + layer.block, layer.rows)
            self.epilogue(last, grads, start, stop)
            self.descend(last, start, stop)

    def descend(self, index: int, start: int, stop: int) -> None:
        """Go on from the gradient of a convolution on grid rows that has just been computed."""
        if index < self.lowest:
            return
        layer, grad, (low, high) = self.stack.layers[index], self.grads[index], self.phases[index]
        for first in range(start, stop, layer.block):
            last = min(first + layer.block, stop)
            rows, position = last - first, layer.halo + first - start
            transposed = self.transposed[: rows * layer.channels].view(layer.channels, rows)
            torch.ops.fastssl_native.strided_conv_transpose(grad[position : position + rows], transposed)
            windows = self.stack.windows(index, first, last)
            self.grad_matrices[index] += nt(transposed, windows.t())
            if index >= self.stop:
                grads = _Gradients(
                    self.product(grad, position, rows, low),
                    self.product(grad, position, rows, high),
                    layer.stride,
                    False,
                )
                self.epilogue(index - 1, grads, first * layer.stride, last * layer.stride)
                del grads  # before the blocks below need room
                self.descend(index - 1, first * layer.stride, last * layer.stride)
        grad[: layer.halo] = grad[stop - start : stop - start + layer.halo].clone()

    def product(self, grad: Tensor, position: int, rows: int, phases: Tensor) -> Tensor:
        """Gradients of the layer below in some phases: successive rows of the gradient times the weights."""
        channels, width = grad.shape[1], phases.shape[1]
        if phases.numel() == 0:
            return grad.new_empty(0, 0)
        first = (position + 1) * channels - width
        windows = grad.as_strided((rows, width), (channels, 1), first)
        if width > channels:  # the library would copy rows that overlap, into memory of its own
            windows = self.overlapping[: rows * width].view(rows, width).copy_(windows)
        return nt(windows, phases)

    def epilogue(self, index: int, grads: _Gradients, first_row: int, last_row: int) -> None:
        """From the gradient of a layer's output to that of its convolution, on grid rows; adds up the sums."""
        layer, source, begins, statistics = self.stack.source(index, last_row)
        if index < 0:
            grad, sums = self.grad_x, None
        else:
            grad, sums = self.grads[index][layer.halo : layer.halo + last_row - first_row], self.sums[index]
        if layer.norm == "group" and not layer.from_waveform:
            torch.ops.fastssl_native.strided_conv_group_bwd(
                grads.first, grads.second, grads.phases, grads.packed, source, layer.parameters, statistics,
                layer.cu_seqlens, layer.grid, grad, sums, layer.eps, layer.activation,
            )  # fmt: skip
            return
        torch.ops.fastssl_native.strided_conv_epilogue_bwd(
            grads.first, grads.second, grads.phases, grads.packed, source, begins, layer.taps, layer.parameters,
            statistics, layer.cu_seqlens, layer.grid, first_row, last_row - first_row,
            None if layer.from_waveform else grad, index < 0, sums,
            layer.stride, layer.norm, layer.eps, layer.activation,
        )  # fmt: skip

    def first_grad_matrix(self) -> Tensor:  # (C, K)
        """Gradient of the first layer's taps; turns its sums for group norm into those of the other layers."""
        layer, sums = self.stack.layers[0], self.sums[0]
        assert sums is not None
        if layer.norm != "group":
            return sums[0, : layer.kernel].t()
        _, mean, covariance = self.stack.first_statistics()
        taps, rstd, scale = layer.taps.double(), self.stack.statistics[0][1].double(), layer.parameters[1].double()
        grad_shift = sums[:, layer.kernel].clone()  # (B, C)
        centred = sums[:, : layer.kernel] - mean[:, :, None] * grad_shift[:, None]  # (B, K, C)
        grad_scale = rstd * (taps * centred).sum(1)
        slope = (grad_scale * rstd)[:, None] * (covariance @ taps)
        sums[:, layer.kernel :] = torch.stack([torch.zeros_like(grad_shift), grad_scale, grad_shift], 1)
        return ((rstd * scale)[:, None] * (centred - slope)).sum(0).t()


def _phases(layer: _Layer, first: int, phases: int, taps: int) -> Tensor:  # (phases * C_in, taps * C_out)
    """The weights by which `taps` successive output gradients make the gradients of some phases of the input."""
    weight = layer.matrix.view(len(layer.matrix), layer.kernel, -1)  # (C_out, K, C_in)
    tap = torch.arange(taps - 1, -1, -1) * layer.stride + torch.arange(first, first + phases)[:, None]
    return weight[:, tap].permute(1, 3, 2, 0).reshape(phases * weight.shape[2], taps * weight.shape[0])


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
        from_waveform=x.shape[1] == 1,
    )  # fmt: skip
    if stack.layers[0].from_waveform and norms[0] == "group":
        stack.statistics[0] = stack.first_statistics()[0]
    layer, source, begins, statistics = stack.source(len(weights) - 1, stack.layers[-1].rows)
    out = x.new_empty(totals[-1], layer.channels)
    torch.ops.fastssl_native.strided_conv_epilogue_fwd(
        source, begins, layer.taps, layer.parameters, statistics, layer.cu_seqlens, layer.cu_seqlens, 0, totals[-1],
        out, True, 1, 1, layer.stride, layer.norm, layer.eps, layer.activation,
    )  # fmt: skip
    return (
        out,
        stack.conv_outs if save else [x.new_empty(0, layer.channels) for layer in stack.layers],
        stack.statistics,
    )


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
        from_waveform=x.shape[1] == 1 and not needs_grad_x,
    )  # fmt: skip
    for index, layer in enumerate(stack.layers):
        # The forward keeps nothing of a first layer that it computes from the waveform: it is computed again.
        if not (index == 0 and x.shape[1] == 1 and needs_grad_x):
            stack.conv_outs[index], stack.done[index] = conv_outs[index], layer.rows
        stack.statistics[index] = statistics[index]
    backward = _Backward(stack, [bias is not None for bias in biases], needs_grad_x)
    backward.run(grad_out)
    if stack.layers[0].from_waveform:
        backward.grad_matrices[0] = backward.first_grad_matrix()
    grad_weights = [
        matrix.to(weight.dtype).view(weight.shape[0], weight.shape[2], weight.shape[1]).permute(0, 2, 1).contiguous()
        for matrix, weight in zip(backward.grad_matrices, weights, strict=True)
    ]

    def gradients(parameters: Sequence[Tensor | None], row: int) -> list[Tensor]:
        return [
            x.new_empty(0) if parameter is None or sums is None else sums[:, row].sum(0).to(parameter.dtype)
            for parameter, sums in zip(parameters, backward.sums, strict=True)
        ]

    return backward.grad_x, grad_weights, gradients(biases, -3), gradients(norm_weights, -2), gradients(norm_biases, -1)
