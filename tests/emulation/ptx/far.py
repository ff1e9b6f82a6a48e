"""Tensors with more than 2^31 elements, of which only the last sequence is computed: 32-bit offsets would overflow.

Memory that is never touched costs none, so gigabytes of addresses suffice.

    TRITON_INTERPRET=0 python -m tests.emulation.ptx.far     # prints JSON
"""

import json
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from fastssl import ops
from fastssl.kernels.varlen_attention import reference
from fastssl.packing import Layout
from tests.emulation.ptx.faults import Fault, broken
from tests.emulation.ptx.lanes import Grid
from tests.emulation.ptx.launch import emulated, use_triton_on_the_cpu
from tests.ops.common import assert_as_good_as, normal

_ELEMENTS = 2**31 + 2**20
_ROWS = 50  # of the last sequence
_LONGEST = 2**12
_SEED = torch.tensor(-4242424242424242)


def _last_programs(grid: Grid) -> list[int]:
    """Return the numbers of the last four programs along the first axis, which counts blocks of rows."""
    blocks = range(max(0, grid[0] - 4), grid[0])
    return [block + grid[0] * other for other in range(grid[1] * grid[2]) for block in blocks]


def _far(end: Tensor) -> Tensor:
    """Return a tensor of more than 2^31 elements that ends with `end`."""
    # With a multiple of 64 rows before it, the last sequence begins with a block of the kernels, and of Philox. The one
    # before it has 64 rows, because some of the last programs compute it.
    before = -(-_ELEMENTS // end[0].numel() // _LONGEST) * _LONGEST + 64
    x = torch.empty(before + len(end), *end.shape[1:], dtype=end.dtype)
    x[before:] = end
    return x


def _lengths(x: Tensor) -> list[int]:
    """Return lengths of sequences, because offsets inside a sequence may have 32 bits; the last has `_ROWS` rows."""
    before = len(x) - _ROWS
    return [_LONGEST] * (before // _LONGEST) + [before % _LONGEST, _ROWS]


def _bias_gelu_dropout() -> None:
    inputs = normal(x=(_ROWS, 72), bias=(72,))
    end, bias = inputs["x"].bfloat16(), inputs["bias"]
    x = _far(end)
    found = ops.bias_gelu_dropout(x, bias, dropout_p=0.3, seed=_SEED, offset=7, backend="triton")
    offset = 7 + (len(x) - _ROWS) * 72 // 8

    def expected(dtype: torch.dtype) -> Tensor:
        return ops.bias_gelu_dropout(
            end.to(dtype), bias.to(dtype), dropout_p=0.3, seed=_SEED, offset=offset, backend="reference"
        )

    assert_as_good_as(found[-_ROWS:], expected(torch.bfloat16), expected(torch.float64), "out")


def _dropout_add_layer_norm() -> None:
    inputs = normal(x=(_ROWS, 72), residual=(_ROWS, 72), weight=(72,), bias=(72,))
    ends = [inputs[name].bfloat16() for name in ("x", "residual")]
    x, residual = map(_far, ends)
    weight, bias = inputs["weight"], inputs["bias"]
    found = ops.dropout_add_layer_norm(
        x, residual, weight=weight, bias=bias, dropout_p=0.3, seed=_SEED, offset=7, backend="triton"
    )
    offset = 7 + (len(x) - _ROWS) * 72 // 8

    def expected(dtype: torch.dtype) -> Tensor:
        x, residual = (end.to(dtype) for end in ends)
        return ops.dropout_add_layer_norm(
            x,
            residual,
            weight=weight.to(dtype),
            bias=bias.to(dtype),
            dropout_p=0.3,
            seed=_SEED,
            offset=offset,
            backend="reference",
        )

    assert_as_good_as(found[-_ROWS:], expected(torch.bfloat16), expected(torch.float64), "out")


def _strided_conv() -> None:
    inputs = normal(x=(_ROWS, 24), weight=(24, 24, 3))
    end, weight = inputs["x"].bfloat16(), inputs["weight"].bfloat16()
    x = _far(end)
    layout = Layout.from_lengths(_lengths(x))
    # With stride 1, the output has almost as many elements as the input.
    found, _ = ops.strided_conv(x, weight, layout, stride=1, backend="triton")
    small = Layout.from_lengths((_ROWS,))

    def expected(dtype: torch.dtype) -> Tensor:
        return ops.strided_conv(end.to(dtype), weight.to(dtype), small, stride=1, backend="reference")[0]

    assert_as_good_as(found[-(_ROWS - 2) :], expected(torch.bfloat16), expected(torch.float64), "out")


def _varlen_attention() -> None:
    from fastssl.kernels.varlen_attention.triton_kernel import varlen_attention_bwd, varlen_attention_fwd

    shape = (_ROWS, 2, 24)
    ends = {name: x.bfloat16() for name, x in normal(q=shape, k=shape, v=shape, grad=shape).items()}
    q, k, v, grad = map(_far, ends.values())
    settings = (Layout.from_lengths(_lengths(q)).cu_seqlens, _LONGEST, 0.3, 0.0, 2, None, None, None)
    out, logsumexp = varlen_attention_fwd(q, k, v, *settings)
    grads = varlen_attention_bwd(grad, q, k, v, out, logsumexp, *settings)[:3]

    def expected(dtype: torch.dtype) -> list[Tensor]:
        q, k, v, grad = (end.to(dtype).requires_grad_() for end in ends.values())
        layout = Layout.from_lengths((_ROWS,))
        out = reference.varlen_attention(
            q, k, v, layout, scale=0.3, dropout_p=0.0, randomness=2, seed=None, distance_bias=None, gate=None
        )
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach())]

    pairs = zip(("out", "grad_q", "grad_k", "grad_v"), expected(torch.bfloat16), expected(torch.float64), strict=True)
    for found, (name, plain, exact) in zip((out, *grads), pairs, strict=True):
        assert_as_good_as(found[-_ROWS:], plain, exact, name)


CASES: dict[str, Callable[[], None]] = {
    "bias_gelu_dropout": _bias_gelu_dropout,
    "dropout_add_layer_norm": _dropout_add_layer_norm,
    "strided_conv": _strided_conv,
    "varlen_attention": _varlen_attention,
}
#: Offsets that would be computed in 32 bits.
FAULTS = (
    Fault("bias_gelu_dropout", "triton_kernel._forward_kernel", ".to(tl.int64)", "", ""),
    Fault("dropout_add_layer_norm", "triton_kernel._forward_kernel", ".to(tl.int64)", "", ""),
    Fault("strided_conv", "triton_kernel._forward_kernel", "+ first).to(tl.int64) * C_OUT", "+ first) * C_OUT", ""),
    Fault("strided_conv", "triton_kernel._forward_kernel", "sequence).to(tl.int64) + first.to(tl.int64)",
          "sequence) + first", ""),
    *(
        Fault("varlen_attention", f"triton_kernel.{name}", "begin.to(tl.int64) * stride", "begin * stride", "")
        for name in ("_forward_kernel", "_backward_q_kernel", "_backward_kv_kernel")
    ),
)  # fmt: skip


def error_of(op: str, fault: Fault | None = None) -> str | None:
    """Run a case, with a fault if there is one; return the error."""
    with broken(fault) if fault else nullcontext(), emulated(poison=False) as emulator:
        emulator.programs_of = _last_programs
        try:
            CASES[op]()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


def _main() -> None:
    use_triton_on_the_cpu()
    found = {op: error_of(op) for op in CASES}
    missed = [f"{fault.op}: {fault.function}: {fault.old}" for fault in FAULTS if error_of(fault.op, fault) is None]
    print(json.dumps({"errors": {op: error for op, error in found.items() if error}, "missed": missed}))


if __name__ == "__main__":
    _main()
