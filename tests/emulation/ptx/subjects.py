"""One batch for each op with Triton kernels: small, but it launches all of them, and uses most of their branches.

Lengths include 0 and 1. Widths are no powers of two, so blocks are masked.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastssl import ops
from fastssl.packing import Layout
from tests.ops.common import normal
from tests.ops.standard import Inputs
from tests.ops.test_contrastive_loss import draw

Call = Callable[[Inputs, Layout, str], Tensor]
_SEED = torch.tensor(-4242424242424242)
#: Lengths of the batches; the longest sequence has more than one block in each kernel.
_LENGTHS = (37, 0, 1, 70)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A batch of an op.

    Attributes:
        op: Name of the op.
        lengths: Lengths of the sequences.
        make: Makes inputs in fp32 from lengths.
        calls: Name of an output -> function that computes it.
        packed: Names of the inputs with a row per frame. The results for the first sequence must not depend on others;
            with dropout, those for later sequences do, because the mask depends on their place.
        constants: Names of floating inputs without a gradient.
    """

    op: str
    lengths: tuple[int, ...]
    make: Callable[[Sequence[int]], Inputs]
    calls: dict[str, Call]
    packed: Collection[str]
    constants: Collection[str] = ()


def _bias_gelu_dropout(lengths: Sequence[int]) -> Inputs:
    return normal(x=(sum(lengths), 72), bias=(72,)) | {"seed": _SEED}


def _gelu(randomness: int) -> Call:
    def call(inputs: Inputs, layout: Layout, backend: str) -> Tensor:
        given: dict[str, Any] = {**inputs, "randomness": randomness, "backend": backend}
        return ops.bias_gelu_dropout(**given, dropout_p=0.3, offset=2**32 - 30)

    return call


def _dropout_add_layer_norm(lengths: Sequence[int]) -> Inputs:
    frames = (sum(lengths), 72)
    return normal(x=frames, residual=frames, weight=(72,), bias=(72,)) | {"seed": _SEED}


def _norm(prenorm: bool) -> Call:
    def call(inputs: Inputs, layout: Layout, backend: str) -> Tensor:
        out: Any = ops.dropout_add_layer_norm(
            **inputs, dropout_p=0.3, offset=2**32 - 30, prenorm=prenorm, backend=backend
        )  # type: ignore[call-overload]
        return torch.cat(out, 1) if prenorm else out

    return call


def _contrastive_loss(lengths: Sequence[int]) -> Inputs:
    return draw(lengths, 24, 11, 0.1, 9)


def _loss(inputs: Inputs, layout: Layout, backend: str) -> Tensor:
    context, targets, negatives = inputs.values()
    return ops.contrastive_loss(context, targets, negatives, backend=backend)[0]


def _gumbel_quantize(lengths: Sequence[int]) -> Inputs:
    inputs = normal(logits=(sum(lengths), 2, 20), codevectors=(2, 20, 12))
    return inputs | {"seeds": torch.arange(sum(lengths)) * 7919 - 2**62}


def _quantize(output: str) -> Call:
    def call(inputs: Inputs, layout: Layout, backend: str) -> Tensor:
        found = ops.gumbel_quantize(**inputs, temperature=1.7, backend=backend)
        # Include the values, so that both inputs have a gradient.
        out: Tensor = getattr(found, output)
        return out + 0 * found.values.sum()

    return call


def _strided_conv(lengths: Sequence[int]) -> Inputs:
    shapes: dict[str, tuple[int, ...]] = {"x": (sum(lengths), 1)}
    for index, (c_in, c_out, kernel) in enumerate(((1, 20, 10), (20, 24, 3), (24, 12, 2))):
        shapes |= {f"weight_{index}": (c_out, c_in, kernel), f"norm_weight_{index}": (c_out,)}
        shapes |= {f"norm_bias_{index}": (c_out,)} if index < 2 else {}
    return normal(**shapes)


def _convolve(inputs: Inputs, layout: Layout, backend: str) -> Tensor:
    """Run three layers on a waveform: group norm from windows, group norm from frames, and no norm."""
    norms: tuple[tuple[int, Literal["group", "none"]], ...] = ((5, "group"), (2, "group"), (2, "none"))
    layers = [
        ops.StridedConvLayer(
            inputs[f"weight_{index}"] / inputs[f"weight_{index}"][0].numel() ** 0.5,
            stride,
            None if norm == "group" else inputs[f"norm_weight_{index}"],
            norm,
            inputs[f"norm_weight_{index}"] if norm == "group" else None,
            inputs.get(f"norm_bias_{index}"),
        )
        for index, (stride, norm) in enumerate(norms)
    ]
    # Only without a gradient of the waveform do the kernels recompute the first layer from windows in the backward.
    return ops.strided_conv_stack(inputs["x"].detach(), layers, layout, backend=backend)[0]


def _varlen_attention(lengths: Sequence[int]) -> Inputs:
    frames = (sum(lengths), 2, 24)
    inputs = normal(q=frames, k=frames, v=frames, distance_bias=(2, 81), gate=frames[:2])
    return inputs | {"seed": _SEED}


def _attend(inputs: Inputs, layout: Layout, backend: str) -> Tensor:
    given: dict[str, Any] = {**inputs, "layout": layout, "backend": backend}
    return ops.varlen_attention(**given, dropout_p=0.2)


SUBJECTS = {
    subject.op: subject
    for subject in (
        Subject(
            op="bias_gelu_dropout",
            lengths=_LENGTHS,
            make=_bias_gelu_dropout,
            calls={f"out, version {version}": _gelu(version) for version in (2, 1)},
            packed=("x",),
        ),
        Subject(
            op="contrastive_loss",
            lengths=(9, 0, 1, 40),
            make=_contrastive_loss,
            calls={"loss": _loss},
            packed=("context", "targets", "negatives"),
        ),
        Subject(
            op="dropout_add_layer_norm",
            lengths=_LENGTHS,
            make=_dropout_add_layer_norm,
            calls={"out": _norm(False), "out and sum": _norm(True)},
            packed=("x", "residual"),
        ),
        Subject(
            op="gumbel_quantize",
            lengths=_LENGTHS,
            make=_gumbel_quantize,
            calls={output: _quantize(output) for output in ("values", "probability_sums")},
            packed=("logits", "seeds"),
        ),
        Subject(
            op="strided_conv",
            lengths=(2700, 0, 1, 40, 290),
            make=_strided_conv,
            calls={"out": _convolve},
            packed=("x",),
            constants=("x",),
        ),
        Subject(
            op="varlen_attention",
            lengths=_LENGTHS,
            make=_varlen_attention,
            calls={"out": _attend},
            packed=("q", "k", "v", "gate"),
        ),
    )
}
