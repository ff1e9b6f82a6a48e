"""The native CPU implementation of `strided_conv`: matrix products on blocks of frames that stay in cache.

The frames of a layer are stored on a *grid*: each sequence is followed by enough zero rows that the next one begins at
a multiple of all later strides. One product can then compute frames of many sequences, and no window overlaps two of
them. The time spent in Python does not depend on the number of sequences.

Each block passes through as many layers as possible before the next block starts, so activations and gradients exist
for one block at a time. Values for the backward pass are stored packed, without the grid's zero rows. README.md has the
derivation.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl.kernels.gemm import nt
from fastssl.kernels.strided_conv.plan import LayerPlan, halo, plan_layers

#: Signatures of the compiled kernels that this module calls, by name.
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

# Size of a block's windows, in values (measured: larger blocks do not fit in cache, smaller ones need more calls).
_BLOCK_NUMBERS = 3 << 19
_FEWEST_ROWS = 16  # lower limit of the rows of a block


#: Stride, norm, eps and activation of an epilogue that changes nothing.
_NO_EPILOGUE = (1, "none", 0.0, "none")


class _Gradients(NamedTuple):
    """Gradients of a layer's output, split by phase: row u * phases + p has phase p.

    Row u of `first` contains the gradients of the low phases side by side, and row u of `second` those of the other
    phases.
    """

    first: Tensor  # (U, phases_first * C)
    second: Tensor  # (U, phases_second * C)
    phases: int  # stride of the layer above, 1 for the last layer
    packed: bool  # whether `first` is the whole gradient, packed, and `second` is empty


class Layer:
    """A layer on its grid, with its convolution's output up to grid row `done`.

    The input of a stack is represented as a layer without a convolution, whose epilogue changes nothing. A layer's
    epilogue is its bias, norm and activation.
    """

    def __init__(
        self,
        plan: LayerPlan,
        grid: Tensor,  # (B + 1,)
        x: Tensor,  # (N, C_in)
        conv_out: Tensor,  # (N_out, C_out) or (0, C_out)
        statistics: Tensor,  # (2, B, C_out)
        *,
        from_input: bool,
        whole: bool = False,
    ) -> None:
        """Set up a layer for one call.

        Args:
            plan: Description of the layer.
            grid: (B + 1,) grid row where each sequence of the layer's output begins.
            x: (N, C_in) input of the stack.
            conv_out: (N_out, C_out) output of the convolution if the forward pass kept it. If it is empty,
                `_Stack.convolve` computes it.
            statistics: (2, B, C_out) mean and 1 / standard deviation for group norm, zero until they are computed.
            from_input: Whether the kernels compute this layer's frames from `x` each time, so that none are stored.
            whole: Whether all rows form one block.
        """
        accumulation = torch.promote_types(x.dtype, torch.float32)
        self.plan, self.grid, self.rows, self.statistics = plan, grid, int(grid[-1]), statistics
        self.block = self.rows if whole else min(self.rows, max(_FEWEST_ROWS, _BLOCK_NUMBERS // max(1, plan.window)))
        self.matrix = plan.weight.permute(0, 2, 1).reshape(plan.channels, plan.window)
        # (K, C_out) if the kernels compute the convolution themselves, otherwise (0, C_out)
        self.taps = plan.weight[:, 0, : plan.kernel if from_input else 0].t().to(accumulation).contiguous()
        self.parameters = _identity(plan.channels, accumulation)
        for row, given in zip(self.parameters, plan.parameters[1:], strict=True):
            if given is not None:
                row.copy_(given)
        is_computed = from_input or len(conv_out) == plan.total
        self.conv_out = conv_out if is_computed else x.new_empty(plan.total, plan.channels)
        self.source, self.begins = (x, plan.cu_in) if from_input else (self.conv_out, plan.cu_out)
        self.done = self.rows if is_computed else 0  # number of grid rows whose convolution is computed

    @property
    def from_waveform(self) -> bool:
        """Whether the kernels compute the convolution themselves each time they need its output."""
        return self.taps.shape[0] > 0

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The arguments `source` to `grid` of the epilogue kernels, in the order of `PARTS`."""
        plan = self.plan
        return self.source, self.begins, self.taps, self.parameters, self.statistics, plan.cu_out, self.grid

    @property
    def epilogue(self) -> tuple[int, str, float, str]:
        """The arguments `stride` to `activation` of the epilogue kernels, in the order of `PARTS`."""
        return self.plan.stride, self.plan.norm, self.plan.eps, self.plan.activation

    def has(self, rows: int) -> bool:
        """Return whether the epilogue of the first `rows` grid rows can run; group norm needs all rows first."""
        return self.done >= (self.rows if self.plan.norm == "group" else min(rows, self.rows))

    def store(self, product: Tensor, start: int) -> None:  # (rows, C_out)
        """Store the convolution's output for grid rows from `start`, packed; compute statistics after the last row."""
        identity = _identity(self.plan.channels, self.parameters.dtype)
        operands = product, None, self.taps, identity, identity, self.plan.cu_out, self.grid
        torch.ops.fastssl_native.strided_conv_epilogue_fwd(
            *operands, start, len(product), self.conv_out, True, 1, 1, *_NO_EPILOGUE
        )
        self.done = start + len(product)
        if self.plan.norm == "group" and self.done == self.rows:
            self.statistics = torch.ops.fastssl_native.strided_conv_group_statistics(
                self.conv_out, self.parameters, self.plan.cu_out, self.plan.eps
            )

    def backward(
        self,
        grads: _Gradients,
        start: int,
        stop: int,
        out: Tensor | None,  # (stop - start, C) or packed (N, C)
        packed: bool,
        sums: Tensor | None,  # (B or 1, K + 3, C)
    ) -> None:
        """Run the epilogue's backward on grid rows `start` to `stop` - 1.

        Args:
            grads: Gradient of the layer's output.
            start: First grid row.
            stop: Grid row after the last.
            out: Receives the gradient of the convolution's output; None if it is not needed.
            packed: Whether `out` is packed, rather than the rows of the block.
            sums: Sums over frames for the gradients of the parameters; this block is added. None if not needed.
        """
        torch.ops.fastssl_native.strided_conv_epilogue_bwd(
            *grads, *self.operands, start, stop - start, out, packed, sums, *self.epilogue
        )

    def first_statistics(self) -> tuple[Tensor, Tensor, Tensor]:  # (2, B, C), (B, K), (B, K, K)
        """Compute group norm statistics of a layer that is computed from the waveform.

        Returns:
            Mean and 1 / standard deviation of the layer's output, and mean and covariance of the waveform's windows.
        """
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.fastssl_native.strided_conv_first_statistics(
            self.source, self.taps, self.parameters, self.begins, self.plan.cu_out, self.plan.stride, self.plan.eps
        )
        return found

    def phases(self, first: int, count: int, taps: int) -> Tensor:  # (count * C_in, taps * C_out)
        """Return the matrix that turns `taps` successive output gradients into input gradients of some phases.

        Args:
            first: First phase.
            count: Number of phases.
            taps: Number of output frames that contribute to an input frame of these phases.
        """
        weight = self.matrix.view(self.plan.channels, self.plan.kernel, -1)  # (C_out, K, C_in)
        tap = torch.arange(taps - 1, -1, -1, device="cpu") * self.plan.stride
        tap = tap + torch.arange(first, first + count, device="cpu")[:, None]
        return weight[:, tap].permute(1, 3, 2, 0).reshape(count * weight.shape[2], taps * self.plan.channels)


def _identity(channels: int, dtype: torch.dtype) -> Tensor:  # (3, C)
    """Return a bias, norm weight and norm bias that change nothing."""
    parameters = torch.zeros(3, channels, dtype=dtype, device="cpu")
    parameters[1] = 1
    return parameters


class _Stack:
    """The input and the layers of one call."""

    def __init__(
        self,
        x: Tensor,  # (N, C_in)
        plans: Sequence[LayerPlan],
        conv_outs: Sequence[Tensor],  # (N_l, C_l) or (0, C_l)
        statistics: Sequence[Tensor],  # (2, B, C_l)
        *,
        from_waveform: bool,
    ) -> None:
        input_grid, *layer_grids = grids(
            [plan.cu_out for plan in plans], [(plan.kernel, plan.stride) for plan in plans]
        )
        begins, no_weight = plans[0].cu_in, x.new_empty(x.shape[1], 1, 0)
        no_plan = LayerPlan(False, begins, begins, no_weight, None, None, None, len(x), *_NO_EPILOGUE)
        self.input = Layer(no_plan, input_grid, x, x, x.new_empty(0), from_input=True, whole=True)
        self.layers: list[Layer] = []
        whole = False
        for plan, grid, conv_out, kept in zip(plans, layer_grids, conv_outs, statistics, strict=True):
            from_input = from_waveform and not plan.is_kept
            # The backward of group norm needs all gradients of a sequence before it can compute the first.
            whole = whole or (plan.norm == "group" and not from_input)
            self.layers.append(Layer(plan, grid, x, conv_out, kept, from_input=from_input, whole=whole))
        self.room = x.new_empty(max(layer.block * layer.plan.window for layer in self.layers))

    def convolve(self) -> None:
        """Compute all missing convolutions: each step runs the next block of the highest layer with enough input."""
        index = len(self.layers) - 1
        while index >= 0:
            layer, plan = self.layers[index], self.layers[index].plan
            start, stop = layer.done, min(layer.done + layer.block, layer.rows)
            if start < stop and self.below(index).has((stop - 1) * plan.stride + plan.kernel):
                layer.store(nt(self.windows(index, start, stop), layer.matrix), start)
                index = min(index + 1, len(self.layers) - 1)
            else:
                index -= 1

    def below(self, index: int) -> Layer:
        """Return the layer that layer `index` reads its input from."""
        return self.layers[index - 1] if index > 0 else self.input

    def windows(self, index: int, start: int, stop: int) -> Tensor:  # (stop - start, K * C_in)
        """Return the input's windows for output rows `start` to `stop` - 1 of a layer; valid until the next call."""
        below, plan = self.below(index), self.layers[index].plan
        out = self.room[: (stop - start) * plan.window].view(stop - start, -1)
        first_row, rows = start * plan.stride, (stop - start - 1) * plan.stride + plan.kernel
        torch.ops.fastssl_native.strided_conv_epilogue_fwd(
            *below.operands, first_row, rows, out, False, plan.kernel, plan.stride, *below.epilogue
        )
        return out


def grids(begins: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return where sequences begin on the grids of the input and of each layer's output: L + 1 tensors (B + 1,).

    A sequence has rows for its frames and at least `halo` more rows, which hold zeros. The gradient of the input needs
    these zeros as gradients of output frames after the last one.

    Args:
        begins: L tensors (B + 1,), where each sequence of each layer's output begins in a packed batch.
        shapes: Kernel and stride of each layer.
    """
    # Number of grid rows of the input, and of each layer's output, that correspond to one row of the last output.
    steps = list(accumulate((stride for _, stride in reversed(shapes)), mul, initial=1))[::-1]
    halos = torch.tensor([[halo(kernel, stride)] for kernel, stride in shapes], device="cpu")
    rows = torch.stack(list(begins)).diff() + halos
    step = torch.tensor(steps[1:], device="cpu")[:, None]
    needed = ((rows + step - 1) // step).amax(0)
    last = torch.nn.functional.pad(needed.cumsum(0, dtype=torch.int32), (1, 0))
    return [last * rows_above for rows_above in steps]


class _LayerGradients:
    """Gradients of one layer: of its convolution's output for some rows, and of its parameters for all rows so far."""

    def __init__(self, layer: Layer, rows: int, *, goes_below: bool) -> None:
        """Set up the gradients of a layer.

        Args:
            layer: The layer.
            rows: Largest number of rows that `receive` gets at a time.
            goes_below: Whether the input of the layer needs a gradient.
        """
        plan = layer.plan
        self.layer = layer
        self.matrix = torch.zeros_like(layer.matrix, dtype=layer.parameters.dtype)
        # Sums over frames that give the gradients of the parameters: (B or 1, K + 3, C), see the kernels.
        self.sums: Tensor | None = None
        if layer.from_waveform or plan.norm != "none" or plan.bias is not None:
            shape = plan.batch if plan.norm == "group" else 1, layer.taps.shape[0] + 3, plan.channels
            self.sums = torch.zeros(shape, dtype=torch.float64, device="cpu")
        # The gradient: `halo` rows before `start`, then rows `start` to `stop` - 1. `descend` continues at row `next`.
        self.grad = layer.source.new_zeros(0 if layer.from_waveform else plan.halo + rows, plan.channels)
        self.start = self.next = self.stop = 0
        # Input frame u * stride + p has phase p. It is in the windows of output frames u, u - 1, and so on. There are
        # `taps` + 1 of these frames if p < low, otherwise `taps`.
        taps, low = divmod(plan.kernel, plan.stride)
        self.low = layer.phases(0, low if goes_below else 0, taps + 1)
        self.high = layer.phases(low, plan.stride - low if goes_below else 0, taps)

    def receive(self, grads: _Gradients, start: int, stop: int) -> None:
        """Run the epilogue's backward on the gradient of the layer's output for grid rows `start` to `stop` - 1."""
        layer, plan = self.layer, self.layer.plan
        if layer.from_waveform:
            layer.backward(grads, start, stop, None, False, self.sums)
            return
        self.grad[: plan.halo] = self.grad[self.stop - self.start :][: plan.halo].clone()
        self.start, self.next, self.stop = start, start, stop
        grad = self.grad[plan.halo :][: stop - start]
        if plan.norm == "group":
            _, _, _, *operands = layer.operands
            torch.ops.fastssl_native.strided_conv_group_bwd(
                *grads, layer.conv_out, *operands, grad, self.sums, plan.eps, plan.activation
            )
        else:
            layer.backward(grads, start, stop, grad, False, self.sums)

    def parameters(self) -> list[Tensor]:
        """Return the gradients of weight, bias, norm weight and norm bias; (0,) for a parameter that is None."""
        weight, *vectors = self.layer.plan.parameters
        c_out, c_in, kernel = weight.shape
        grad_weight = self.matrix.to(weight.dtype).view(c_out, kernel, c_in).permute(0, 2, 1).contiguous()
        return [grad_weight] + [
            weight.new_empty(0) if vector is None or self.sums is None else self.sums[:, row].sum(0).to(vector.dtype)
            for row, vector in zip((-3, -2, -1), vectors, strict=True)
        ]


class _Backward:
    """The gradients of one call. A block of gradients passes down to the first layer before the next block starts."""

    def __init__(self, stack: _Stack, *, needs_grad_x: bool) -> None:
        self.stack, x = stack, stack.input.source
        self.grad_x = x.new_zeros(x.shape if needs_grad_x else (0, x.shape[1]))
        self.lowest = 0 if needs_grad_x else 1  # lowest layer whose input needs a gradient
        above = [layer.block * layer.plan.stride for layer in stack.layers[1:]]
        self.layers = [
            _LayerGradients(layer, rows, goes_below=index >= self.lowest)
            for index, (layer, rows) in enumerate(zip(stack.layers, [*above, stack.layers[-1].block], strict=True))
        ]
        self.transposed = x.new_empty(max(layer.block * layer.plan.channels for layer in stack.layers))
        self.overlapping = x.new_empty(
            max(layer.block * layer.plan.channels * (layer.plan.halo + 1) for layer in stack.layers)
        )

    def run(self, grad_out: Tensor) -> None:
        """Compute all gradients: each step runs the next block of the lowest layer that has rows left."""
        last, grads = self.layers[-1], _Gradients(grad_out, grad_out.new_empty(0, 0), 1, True)
        rows, block = last.layer.rows, last.layer.block
        for start in range(0, rows, max(1, block)):
            last.receive(grads, start, min(start + block, rows))
            index = len(self.layers) - 1
            while index < len(self.layers):
                if self.layers[index].next < self.layers[index].stop:
                    self.descend(index)
                    index = max(index - 1, 0)
                else:
                    index += 1

    def descend(self, index: int) -> None:
        """Compute what the next block of a layer's gradient contributes to the gradients of its weight and input."""
        here = self.layers[index]
        plan, first, last = here.layer.plan, here.next, min(here.next + here.layer.block, here.stop)
        here.next, rows, position = last, last - first, plan.halo + first - here.start
        transposed = self.transposed[: rows * plan.channels].view(plan.channels, rows)
        torch.ops.fastssl_native.strided_conv_transpose(here.grad[position : position + rows], transposed)
        here.matrix += nt(transposed, self.stack.windows(index, first, last).t())
        if index < self.lowest:
            return
        low, high = (self.product(here.grad, position, rows, phases) for phases in (here.low, here.high))
        grads, start, stop = _Gradients(low, high, plan.stride, False), first * plan.stride, last * plan.stride
        if index > 0:
            self.layers[index - 1].receive(grads, start, stop)
        else:
            self.stack.input.backward(grads, start, stop, self.grad_x, True, None)

    def product(self, grad: Tensor, position: int, rows: int, phases: Tensor) -> Tensor:
        """Return gradients of the input for some phases: windows of successive rows of the gradient times `phases`.

        Args:
            grad: (rows, C) gradient of the convolution's output, with `halo` rows in front.
            position: First row of the block in `grad`.
            rows: Number of rows of the block.
            phases: Matrix from `Layer.phases`.
        """
        channels, width = grad.shape[1], phases.shape[1]
        if phases.numel() == 0:
            return grad.new_empty(0, 0)
        first = (position + 1) * channels - width
        windows = grad.as_strided((rows, width), (channels, 1), first)
        if width > channels:  # rows overlap, so copy them here: the library would allocate memory for a copy
            windows = self.overlapping[: rows * width].view(rows, width).copy_(windows)
        return nt(windows, phases)

    def first_grad_matrix(self) -> Tensor:  # (C, K)
        """Return the first layer's weight gradient; for group norm, also write the other gradients into the sums."""
        layer, sums = self.layers[0].layer, self.layers[0].sums
        kernel = layer.plan.kernel
        assert sums is not None
        if layer.plan.norm != "group":
            return sums[0, :kernel].t()
        _, mean, covariance = layer.first_statistics()
        taps, rstd, scale = layer.taps.double(), layer.statistics[1].double(), layer.parameters[1].double()
        grad_shift = sums[:, kernel].clone()  # (B, C)
        centred = sums[:, :kernel] - mean[:, :, None] * grad_shift[:, None]  # (B, K, C)
        grad_scale = rstd * (taps * centred).sum(1)
        slope = (grad_scale * rstd)[:, None] * (covariance @ taps)
        sums[:, kernel:] = torch.stack([torch.zeros_like(grad_shift), grad_scale, grad_shift], 1)
        return ((rstd * scale)[:, None] * (centred - slope)).sum(0).t()


def strided_conv_fwd(
    x: Tensor,  # (N, C_in)
    save: bool,
    *lists: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # (N_out, C_out)
    """Return the output, the kept convolution outputs and the group norm statistics."""
    plans = plan_layers(*lists)
    nothing = [x.new_empty(0, plan.channels) for plan in plans]
    stack = _Stack(x, plans, nothing, [plan.new_statistics(x) for plan in plans], from_waveform=True)
    first, last = stack.layers[0], stack.layers[-1]
    if first.from_waveform and first.plan.norm == "group":
        first.statistics = first.first_statistics()[0]
    stack.convolve()
    out = x.new_empty(last.plan.total, last.plan.channels)
    packed = *last.operands[:-1], last.plan.cu_out
    torch.ops.fastssl_native.strided_conv_epilogue_fwd(*packed, 0, len(out), out, True, 1, 1, *last.epilogue)
    conv_outs = [layer.conv_out for layer in stack.layers] if save else nothing
    return out, conv_outs, [layer.statistics for layer in stack.layers]


def strided_conv_bwd(
    grad_out: Tensor,  # (N_out, C_out)
    x: Tensor,  # (N, C_in)
    conv_outs: Sequence[Tensor],  # (N_l, C_l)
    statistics: Sequence[Tensor],  # (2, B, C_l)
    needs_grad_x: bool,
    *lists: Any,
) -> tuple[Tensor | list[Tensor], ...]:
    """Return the gradients of `x` and of each kind of parameter."""
    stack = _Stack(x, plan_layers(*lists), conv_outs, statistics, from_waveform=not needs_grad_x)
    stack.convolve()  # the forward pass keeps no output of a first layer that it computes from the waveform
    backward = _Backward(stack, needs_grad_x=needs_grad_x)
    backward.run(grad_out)
    if stack.layers[0].from_waveform:
        backward.layers[0].matrix = backward.first_grad_matrix()
    return backward.grad_x, *map(list, zip(*(layer.parameters() for layer in backward.layers), strict=True))
