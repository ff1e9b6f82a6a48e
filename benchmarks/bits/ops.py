"""Record outputs and gradients of every op with every backend: `python -m benchmarks.bits.ops RESULTS MATCH`."""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before fastssl is imported; no GPU is used

import torch
from torch import Tensor

from benchmarks.bits.record import Record, drawing, with_gradients
from fastssl import Layout, ops

Inputs = dict[str, Tensor]
LAYOUTS = {
    "odd": (37, 23, 41),
    "one long": (150, 3, 2, 1, 5, 4),
    "one frame": (1,),
    "empty sequences": (0, 17, 0, 30),
    "empty batch": (),
}
#: Layouts for Triton's interpreter, which takes seconds for work that a kernel does at once.
INTERPRETED_LAYOUTS = {"small": (19, 1, 0, 12)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
BACKENDS = ("reference", "native", "torch", None)

NORMS: dict[str, dict[str, Any]] = {
    "no norm": {"norm": "none"},
    "no norm, no activation": {"norm": "none", "activation": "none"},
    "group norm": {"norm": "group"},
    "layer norm": {"norm": "layer", "eps": 1e-3},
}
ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {"biased": False, "gated": False},
    "scale": {"biased": False, "gated": False, "scale": 0.3},
    "dropout": {"biased": False, "gated": False, "dropout_p": 0.1, "seed": torch.tensor(3)},
    "dropout, drawn seed": {"biased": False, "gated": False, "dropout_p": 0.1},
    "bias": {"biased": True, "gated": False},
    "bias, gate, dropout": {"biased": True, "gated": True, "dropout_p": 0.1, "seed": torch.tensor(3)},
}
DROPOUT: dict[str, dict[str, Any]] = {
    "no dropout": {},
    "dropout": {"dropout_p": 0.1, "seed": torch.tensor(3), "offset": 5},
    "drawn seed": {"dropout_p": 0.1},
}


class Case(NamedTuple):
    """An op with fixed options.

    Args:
        make: Returns the inputs for N frames, in fp64.
        call: Calls the op with inputs, layout and backend.
        keep: Names of inputs that stay in fp32, whatever the dtype of the others.
    """

    make: Callable[[int], Inputs]
    call: Callable[[Inputs, Layout, str | None], Any]
    keep: tuple[str, ...] = ()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def conv_inputs(n: int, channels: int, kernel: int) -> Inputs:
    """Return inputs of a convolution from `channels` to 8 channels, with the parameters of a norm."""
    return {
        "x": randn(n, channels),
        "weight": randn(8, channels, kernel),
        "bias": randn(8),
        "norm_weight": randn(8, seed=1),
        "norm_bias": randn(8, seed=2),
    }


def strided_conv(inputs: Inputs, layout: Layout, backend: str | None, **options: Any) -> Any:
    if options.get("norm", "none") == "none":
        inputs = {name: x for name, x in inputs.items() if not name.startswith("norm")}
    options |= inputs
    return ops.strided_conv(layout=layout, backend=backend, **options)


def stack_inputs(n: int) -> Inputs:
    first = conv_inputs(n, 1, 10)
    others = {f"{name}_{i}": x for i in (1, 2) for name, x in conv_inputs(n, 8, 3).items() if name != "x"}
    return first | others


def stack(inputs: Inputs, layout: Layout, backend: str | None, *, norm: str) -> Any:
    layers = []
    for suffix, stride in (("", 5), ("_1", 2), ("_2", 2)):
        names = ("bias", "norm_weight", "norm_bias") if norm == "layer" or not suffix else ()
        tensors: dict[str, Any] = {name: inputs[name + suffix] for name in names}
        layer_norm: Any = norm if names else "none"
        layers.append(ops.StridedConvLayer(inputs["weight" + suffix], stride, norm=layer_norm, **tensors))
    return ops.strided_conv_stack(inputs["x"], layers, layout, backend=backend)


def attention_inputs(n: int, width: int = 32) -> Inputs:
    """Return inputs of attention; q, k and v are in one tensor, as a fused projection returns them."""
    return {"qkv": randn(n, 3, 2, width), "distance_bias": randn(2, 9), "gate": randn(n, 2)}


def attention(inputs: Inputs, layout: Layout, backend: str | None, *, biased: bool, gated: bool, **options: Any) -> Any:
    q, k, v = inputs["qkv"].unbind(1)
    extra = {"distance_bias": biased, "gate": gated}
    given: dict[str, Any] = {name: inputs[name] for name, wanted in extra.items() if wanted}
    return ops.varlen_attention(q, k, v, layout, backend=backend, **given, **options)


def norm_inputs(n: int) -> Inputs:
    return {"x": randn(n, 24), "residual": randn(n, 24, seed=1), "weight": randn(24), "bias": randn(24, seed=1)}


def gelu_inputs(n: int) -> Inputs:
    return {"x": randn(n, 24), "bias": randn(24)}


def code_inputs(n: int) -> Inputs:
    return {"logits": randn(n, 2, 12), "codevectors": randn(2, 12, 8), "noise": randn(n, 2, 12, seed=1)}


def pair_inputs(n: int) -> Inputs:
    return {"context": randn(n, 24), "targets": randn(n, 24, seed=1)}


def fire_inputs(n: int) -> Inputs:
    return {"x": randn(n, 24), "weights": randn(n).abs() * 0.4}


def codes(inputs: Inputs, _: Layout, backend: str | None, *, temperature: float, noise: str) -> Any:
    rows = len(inputs["logits"])
    extra: dict[str, Any] = {}
    if noise == "given":
        extra["noise"] = inputs["noise"].detach()
    elif noise == "seeds":
        extra["seeds"] = torch.arange(rows) * 7919
    return ops.gumbel_quantize(
        inputs["logits"], inputs["codevectors"], temperature=temperature, backend=backend, **extra
    )


def contrast(inputs: Inputs, _: Layout, backend: str | None, *, dtype: torch.dtype, temperature: float) -> Any:
    n = len(inputs["context"])
    negatives = torch.randint(-1, max(n, 1), (n, 11), generator=torch.Generator().manual_seed(1), dtype=dtype)
    return ops.contrastive_loss(
        inputs["context"], inputs["targets"], negatives, temperature=temperature, backend=backend
    )


def positional_inputs(n: int, taps: int) -> Inputs:
    return {"x": randn(n, 8), "weight": randn(8, 4, taps), "bias": randn(8)}


def positional_conv(inputs: Inputs, layout: Layout, backend: str | None) -> Any:
    return ops.positional_conv(inputs["x"], inputs["weight"], layout, bias=inputs["bias"], backend=backend)


def add_norm(inputs: Inputs, _: Layout, backend: str | None, **options: Any) -> Any:
    return ops.dropout_add_layer_norm(
        inputs["x"], inputs["residual"], weight=inputs["weight"], bias=inputs["bias"], backend=backend, **options
    )


def bias_gelu(inputs: Inputs, _: Layout, backend: str | None, *, biased: bool, **options: Any) -> Any:
    return ops.bias_gelu_dropout(inputs["x"], inputs["bias"] if biased else None, backend=backend, **options)


def fire(inputs: Inputs, layout: Layout, backend: str | None, *, threshold: float) -> Any:
    return ops.integrate_and_fire(inputs["x"], inputs["weights"], layout, threshold=threshold, backend=backend)


def cases() -> Iterator[tuple[str, str, Case]]:
    """Yield all cases as (name of the op, description of the options, case)."""
    for channels, kernel, stride in ((1, 10, 5), (6, 3, 2)):
        for words, norm in NORMS.items():
            make = partial(conv_inputs, channels=channels, kernel=kernel)
            yield (
                "strided_conv",
                f"{channels} channels, {words}",
                Case(make, partial(strided_conv, stride=stride, **norm)),
            )
    for kind in ("group", "layer"):
        yield "strided_conv_stack", kind, Case(stack_inputs, partial(stack, norm=kind))
    for taps in (5, 6):
        yield "positional_conv", f"{taps} taps", Case(partial(positional_inputs, taps=taps), positional_conv)
    for words, given in ATTENTION.items():
        yield "varlen_attention", words, Case(attention_inputs, partial(attention, **given))
    wide = partial(attention_inputs, width=64)
    yield "varlen_attention", "width 64", Case(wide, partial(attention, biased=False, gated=False))
    for words, dropout in DROPOUT.items():
        for prenorm in (False, True):
            call = partial(add_norm, prenorm=prenorm, **dropout)
            name = f"{words}{', prenorm' * prenorm}"
            yield "dropout_add_layer_norm", name, Case(norm_inputs, call)
            yield "dropout_add_layer_norm", f"{name}, fp32 norm", Case(norm_inputs, call, ("weight", "bias"))
        for biased in (False, True):
            name = f"{words}{', no bias' * (not biased)}"
            yield "bias_gelu_dropout", name, Case(gelu_inputs, partial(bias_gelu, biased=biased, **dropout))
    for noise, temperature in (("given", 1.5), ("seeds", 0.5), ("none", 1.0)):
        yield (
            "gumbel_quantize",
            f"noise {noise}",
            Case(code_inputs, partial(codes, temperature=temperature, noise=noise)),
        )
    for dtype, temperature in ((torch.int64, 0.1), (torch.int32, 0.3)):
        yield "contrastive_loss", str(dtype), Case(pair_inputs, partial(contrast, dtype=dtype, temperature=temperature))
    for threshold in (1.0, 0.7):
        yield "integrate_and_fire", f"threshold {threshold}", Case(fire_inputs, partial(fire, threshold=threshold))


def run(case: Case, lengths: tuple[int, ...], dtype: torch.dtype, backend: str | None) -> dict[str, Any]:
    """Return outputs and gradients of one call, with dropout under a fixed seed."""
    torch.manual_seed(0)
    leaves = {
        name: x.to(torch.float32 if name in case.keep else dtype).requires_grad_()
        for name, x in case.make(sum(lengths)).items()
    }
    layout = Layout.from_lengths(lengths)
    return with_gradients(lambda: case.call(leaves, layout, backend), leaves)


def main() -> None:
    torch.set_num_threads(2)
    record = Record(sys.argv[2])
    for op, words, case in cases():
        for backend in BACKENDS:
            for dtype, layout in ((d, lay) for d in DTYPES for lay in LAYOUTS):
                name = f"{op}, {backend or 'default'}/{words}, {dtype}, {layout}"
                record.attempt(name, partial(run, case, LAYOUTS[layout], DTYPES[dtype], backend))
        with torch.autocast("cpu", torch.bfloat16):
            name = f"{op}, default/{words}, autocast"
            record.attempt(name, partial(run, case, LAYOUTS["odd"], torch.float32, None))
        for layout, lengths in INTERPRETED_LAYOUTS.items():
            name = f"{op}, triton/{words}, fp32, {layout}"
            record.attempt(name, partial(run, case, lengths, torch.float32, "triton"))
    record.save(sys.argv[1])


if __name__ == "__main__":
    with drawing():
        main()
