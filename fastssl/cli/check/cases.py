"""What `fastssl check` computes: each op as a base encoder calls it, and the same work in padded PyTorch."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import ops
from fastssl.kernels.strided_conv.plan import StridedConvLayer
from fastssl.packing import Layout, Packed

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

_WIDTH, _HEADS, _INNER = 768, 12, 3072  # of a base encoder
_CHANNELS, _KERNELS, _STRIDES = 512, (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)  # of its front end
_DROPOUT_P = 0.1
#: Lengths in frames that kernels can get wrong: nothing, one frame, one more than a block.
AWKWARD_LENGTHS = (0, 1, 37, 0, 257, 129)
#: Lengths in frames of ordinary utterances, 2 to 14 s.
SPEECH_LENGTHS = (700, 520, 310, 110)


class Case(NamedTuple):
    """One call of an op.

    Attributes:
        op: Name of the op.
        what: What distinguishes the case from others of the op; "" if nothing does.
        inputs: Tensors by name, floating ones in fp32.
        run: Calls the op by a backend.
        plain_inputs: Tensors for `plain`, floating ones in fp32.
        plain: Does the same work as PyTorch users do: with padding, and with PyTorch's own dropout.
        unsupported: Names of the backends that do not support the case.
        only_16_bit: Names of the backends that support only 16-bit floats.
    """

    op: str
    what: str
    inputs: Inputs
    run: Callable[[Inputs, str], Outputs]
    plain_inputs: Inputs
    plain: Callable[[Inputs], Outputs]
    unsupported: tuple[str, ...] = ()
    only_16_bit: tuple[str, ...] = ()

    def supports(self, backend: str, dtype: torch.dtype) -> bool:
        """Return whether a backend supports the case with floating inputs of a dtype."""
        return backend not in self.unsupported and (backend not in self.only_16_bit or dtype.itemsize == 2)


def cases(lengths: Sequence[int]) -> Iterator[Case]:
    """Yield the cases of all ops, on the CPU.

    Args:
        lengths: Number of frames of each sequence, at 50 frames per second.
    """
    draw = _Draw()
    yield _strided_conv(draw, lengths, "group")
    yield _strided_conv(draw, lengths, "layer")
    yield _positional_conv(draw, lengths)
    yield _varlen_attention(draw, lengths, dropout_p=0.0)
    yield _varlen_attention(draw, lengths, dropout_p=_DROPOUT_P)
    yield _biased_attention(draw, lengths)
    yield _dropout_add_layer_norm(draw, sum(lengths))
    yield _bias_gelu_dropout(draw, sum(lengths))
    yield _gumbel_quantize(draw, sum(lengths) // 2)
    yield _contrastive_loss(draw, [length // 2 for length in lengths])
    yield _integrate_and_fire(draw, lengths)


class _Draw:
    """Draws the same numbers in every process."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * scale

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def integers(self, least: int, end: int, *shape: int) -> Tensor:
        return torch.randint(least, end, shape, generator=self.generator)


def _layout(lengths: Sequence[int], like: Tensor) -> Layout:
    return Layout.from_lengths(lengths, device=like.device)


def _padded(x: Tensor, lengths: Sequence[int]) -> Tensor:  # (N, ...) -> (B, T, ...)
    return Packed(x, _layout(lengths, x)).to_padded()


def _strided_conv(draw: _Draw, frames: Sequence[int], norm: Literal["group", "layer"]) -> Case:
    """The seven layers of a front end; with group norm, only the first has a norm."""
    samples = [320 * count + 80 if count else 0 for count in frames]
    inputs = {"x": draw.normal(sum(samples), 1)}
    channels = [1, *(_CHANNELS,) * len(_KERNELS)]
    for index, kernel in enumerate(_KERNELS):
        fan_in = channels[index] * kernel
        inputs[f"weight{index}"] = draw.normal(_CHANNELS, channels[index], kernel, scale=math.sqrt(2 / fan_in))
        if norm == "layer":
            inputs[f"bias{index}"] = draw.normal(_CHANNELS, scale=0.1)
        if index == 0 or norm == "layer":
            inputs[f"norm_weight{index}"] = 1 + draw.normal(_CHANNELS, scale=0.1)
            inputs[f"norm_bias{index}"] = draw.normal(_CHANNELS, scale=0.1)

    def run(given: Inputs, backend: str) -> Outputs:
        layers = [
            StridedConvLayer(
                given[f"weight{index}"],
                stride,
                bias=given.get(f"bias{index}"),
                norm=norm if f"norm_weight{index}" in given else "none",
                norm_weight=given.get(f"norm_weight{index}"),
                norm_bias=given.get(f"norm_bias{index}"),
            )
            for index, stride in enumerate(_STRIDES)
        ]
        return ops.strided_conv_stack(given["x"], layers, _layout(samples, given["x"]), backend=backend)[:1]

    def plain(given: Inputs) -> Outputs:
        x = given["x"]
        for index, stride in enumerate(_STRIDES):
            x = F.conv1d(x, given[f"weight{index}"], given.get(f"bias{index}"), stride=stride)
            scale_and_shift = given.get(f"norm_weight{index}"), given.get(f"norm_bias{index}")
            if scale_and_shift[0] is not None and norm == "group":
                x = F.group_norm(x, _CHANNELS, *scale_and_shift)
            elif norm == "layer":
                x = F.layer_norm(x.transpose(1, 2), (_CHANNELS,), *scale_and_shift).transpose(1, 2)
            x = F.gelu(x)
        return (x,)

    what = f"seven layers, {norm} norm"
    padded = _padded(inputs["x"], samples).transpose(1, 2)
    return Case("strided_conv", what, inputs, run, inputs | {"x": padded}, plain)


def _positional_conv(draw: _Draw, lengths: Sequence[int]) -> Case:
    kernel, groups = 128, 16
    inputs = {
        "x": draw.normal(sum(lengths), _WIDTH),
        "weight": draw.normal(_WIDTH, _WIDTH // groups, kernel, scale=(kernel * _WIDTH / groups) ** -0.5),
        "bias": draw.normal(_WIDTH, scale=0.1),
    }

    def run(given: Inputs, backend: str) -> Outputs:
        layout = _layout(lengths, given["x"])
        return (ops.positional_conv(given["x"], given["weight"], layout, bias=given["bias"], backend=backend),)

    def plain(given: Inputs) -> Outputs:
        return (F.conv1d(given["x"], given["weight"], given["bias"], padding=kernel // 2, groups=groups)[..., :-1],)

    padded = _padded(inputs["x"], lengths).transpose(1, 2)
    return Case("positional_conv", "", inputs, run, inputs | {"x": padded}, plain)


def _queries_keys_values(draw: _Draw, lengths: Sequence[int]) -> Inputs:
    return {name: draw.normal(sum(lengths), _HEADS, _WIDTH // _HEADS) for name in ("q", "k", "v")}


def _heads_first(inputs: Inputs, lengths: Sequence[int]) -> Inputs:
    """Return queries, keys and values padded, (B, H, T, E), and the mask of the frames that are no padding."""
    padded = {name: _padded(inputs[name], lengths).transpose(1, 2) for name in ("q", "k", "v")}
    layout = _layout(lengths, inputs["q"])
    return padded | {"valid": layout.valid(layout.max_length)[:, None, None]}


def _varlen_attention(draw: _Draw, lengths: Sequence[int], *, dropout_p: float) -> Case:
    inputs = _queries_keys_values(draw, lengths) | {"seed": torch.tensor(1)}

    def run(given: Inputs, backend: str) -> Outputs:
        q, k, v, seed = given.values()
        layout = _layout(lengths, q)
        return (ops.varlen_attention(q, k, v, layout, dropout_p=dropout_p, seed=seed, backend=backend),)

    def plain(given: Inputs) -> Outputs:
        q, k, v, valid = given.values()
        return (F.scaled_dot_product_attention(q, k, v, attn_mask=valid, dropout_p=dropout_p),)

    what = f"dropout {dropout_p}" if dropout_p else ""
    # PyTorch's own kernel has no dropout with a reproducible mask.
    unsupported = ("torch",) if dropout_p else ()
    padded = _heads_first(inputs, lengths)
    return Case("varlen_attention", what, inputs, run, padded, plain, unsupported, only_16_bit=("torch",))


def _biased_attention(draw: _Draw, lengths: Sequence[int]) -> Case:
    """WavLM's attention; PyTorch takes its bias as a dense matrix."""
    reach = 800
    bias = {"distance_bias": draw.normal(_HEADS, 2 * reach + 1), "gate": draw.uniform(sum(lengths), _HEADS)}
    inputs = _queries_keys_values(draw, lengths) | bias

    def run(given: Inputs, backend: str) -> Outputs:
        q, k, v, distance_bias, gate = given.values()
        layout = _layout(lengths, q)
        return (ops.varlen_attention(q, k, v, layout, distance_bias=distance_bias, gate=gate, backend=backend),)

    def plain(given: Inputs) -> Outputs:
        q, k, v, valid, distance_bias, gate = given.values()
        positions = torch.arange(q.shape[2], device=q.device)
        distances = (positions - positions.unsqueeze(1)).clamp(-reach, reach) + reach
        dense = (distance_bias[:, distances] * gate).masked_fill(~valid, -torch.inf)
        return (F.scaled_dot_product_attention(q, k, v, attn_mask=dense),)

    gate = _padded(bias["gate"], lengths).transpose(1, 2).unsqueeze(3)
    padded = _heads_first(inputs, lengths) | bias | {"gate": gate}
    return Case("varlen_attention", "distance bias", inputs, run, padded, plain, unsupported=("torch",))


def _dropout_add_layer_norm(draw: _Draw, rows: int) -> Case:
    inputs = {
        "x": draw.normal(rows, _WIDTH),
        "residual": draw.normal(rows, _WIDTH),
        "weight": 1 + draw.normal(_WIDTH, scale=0.1),
        "bias": draw.normal(_WIDTH, scale=0.1),
        "seed": torch.tensor(1),
    }

    def run(given: Inputs, backend: str) -> Outputs:
        x, residual, weight, bias, seed = given.values()
        return ops.dropout_add_layer_norm(
            x, residual, weight=weight, bias=bias, dropout_p=_DROPOUT_P, seed=seed, prenorm=True, backend=backend
        )

    def plain(given: Inputs) -> Outputs:
        x, residual, weight, bias, _ = given.values()
        total = residual + F.dropout(x, _DROPOUT_P)
        return F.layer_norm(total, (_WIDTH,), weight, bias), total

    return Case("dropout_add_layer_norm", "", inputs, run, inputs, plain)


def _bias_gelu_dropout(draw: _Draw, rows: int) -> Case:
    inputs = {"x": draw.normal(rows, _INNER), "bias": draw.normal(_INNER, scale=0.1), "seed": torch.tensor(1)}

    def run(given: Inputs, backend: str) -> Outputs:
        x, bias, seed = given.values()
        return (ops.bias_gelu_dropout(x, bias, dropout_p=_DROPOUT_P, seed=seed, backend=backend),)

    def plain(given: Inputs) -> Outputs:
        return (F.dropout(F.gelu(given["x"] + given["bias"]), _DROPOUT_P),)

    return Case("bias_gelu_dropout", "", inputs, run, inputs, plain)


def _gumbel_quantize(draw: _Draw, rows: int) -> Case:
    groups, codes, width = 2, 320, 128
    inputs = {
        "logits": draw.normal(rows, groups, codes),
        "codevectors": draw.normal(groups, codes, width),
        "seeds": draw.integers(0, 2**62, rows),
    }

    def run(given: Inputs, backend: str) -> Outputs:
        logits, codevectors, seeds = given.values()
        found = ops.gumbel_quantize(logits, codevectors, seeds=seeds, temperature=2.0, backend=backend)
        return found.values, found.probability_sums

    def plain(given: Inputs) -> Outputs:
        logits, codevectors, _ = given.values()
        chosen = F.gumbel_softmax(logits, tau=2.0, hard=True)
        values = (chosen.transpose(0, 1) @ codevectors).transpose(0, 1).flatten(1)
        return values, logits.softmax(-1).sum(0)

    return Case("gumbel_quantize", "", inputs, run, inputs, plain)


def _contrastive_loss(draw: _Draw, masked: Sequence[int]) -> Case:
    width, negatives = 256, 100
    rows = [
        draw.integers(first, end, end - first, negatives)
        for first, end in pairwise(accumulate(masked, initial=0))
        if end > first
    ]
    inputs = {
        "context": draw.normal(sum(masked), width),
        "targets": draw.normal(sum(masked), width),
        "negatives": torch.cat(rows),
    }

    def run(given: Inputs, backend: str) -> Outputs:
        return (ops.contrastive_loss(*given.values(), backend=backend)[0],)

    def plain(given: Inputs) -> Outputs:  # as Transformers does, but without padding
        context, targets, rows = given.values()
        gathered = targets[rows]
        similar = F.cosine_similarity(context.unsqueeze(1), torch.cat([targets.unsqueeze(1), gathered], 1), dim=-1)
        same = F.pad((gathered == targets.unsqueeze(1)).all(-1), (1, 0))
        logits = (similar / 0.1).masked_fill(same, -torch.inf)
        return (F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long), reduction="none"),)

    return Case("contrastive_loss", "", inputs, run, inputs, plain)


def _integrate_and_fire(draw: _Draw, lengths: Sequence[int]) -> Case:
    inputs = {"x": draw.normal(sum(lengths), _WIDTH), "weights": draw.uniform(sum(lengths)) * 0.5}

    def run(given: Inputs, backend: str) -> Outputs:
        x, weights = given.values()
        return ops.integrate_and_fire(x, weights, _layout(lengths, x), backend=backend)[:1]

    def plain(given: Inputs) -> Outputs:  # a product with a dense (B, S, T) matrix
        x, weights = given.values()
        after = weights.float().cumsum(1)
        before = F.pad(after[:, :-1], (1, 0))
        slots = torch.arange(max(lengths) // 2, device=x.device).unsqueeze(1)
        overlap = torch.minimum(after.unsqueeze(1), slots + 1) - torch.maximum(before.unsqueeze(1), slots)
        return (overlap.clamp(min=0).to(x.dtype) @ x,)

    padded = {name: _padded(x, lengths) for name, x in inputs.items()}
    return Case("integrate_and_fire", "", inputs, run, padded, plain)
