"""Faults put into the kernels on purpose: the checks must find each of them.

TRITON_INTERPRET=0 python -m tests.emulation.ptx.faults varlen_attention     # prints JSON
"""

import argparse
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from tests.emulation.ptx.checks import Outcome, outcomes
from tests.emulation.ptx.launch import emulated, use_triton_on_the_cpu
from tests.emulation.ptx.subjects import SUBJECTS

_LEAVES = "threads leave"
_WRONG = "off by"
_OTHER_BITS = "AssertionError"


class Fault(NamedTuple):
    """One change of the source.

    Attributes:
        op: The op.
        function: "module.function" in the op's folder. For `op.contiguous`, the change is that it does nothing.
        old: Text in the source of the function.
        new: What replaces it.
        symptom: Pattern of the error that must be found.
    """

    op: str
    function: str
    old: str
    new: str
    symptom: str


_ATTENTION, _CONV, _GELU, _NORM = "varlen_attention", "strided_conv", "bias_gelu_dropout", "dropout_add_layer_norm"
_LOSS, _GUMBEL = "contrastive_loss", "gumbel_quantize"
FAULTS = (
    # A mask is missing, or wrong by one.
    Fault(_GELU, "triton_kernel._forward_kernel", "x_ptr + index, mask=inside, other=0", "x_ptr + index", _LEAVES),
    Fault(_GELU, "triton_kernel._backward_kernel", "mask=in_width)", "mask=columns <= WIDTH)", _LEAVES),
    Fault(_NORM, "triton_kernel._forward_kernel", "tl.store(mean_ptr + row, mean, mask=row < rows)",
          "tl.store(mean_ptr + row, mean)", _LEAVES),
    Fault(_LOSS, "triton_kernel._candidates", "(places > 0) & (places <= K)", "places > 0", _LEAVES),
    Fault(_GUMBEL, "triton_kernel._forward_kernel", "mask = there[:, None] & (width < E)[None, :]",
          "mask = there[:, None] & (width < BLOCK_E)[None, :]", _LEAVES),
    Fault(_CONV, "triton_kernel._weight_grad_kernel", "mask=valid & (m < C_OUT)", "mask=(m < C_OUT)", _LEAVES),
    Fault(_CONV, "triton_kernel._forward_kernel", "frames = tl.minimum(rows, left - 1)", "frames = rows", _LEAVES),
    Fault(_ATTENTION, "triton_tiles.load_rows", "mask = (rows < length)[:, None]",
          "mask = (rows < length + 1)[:, None]", _LEAVES),
    # A masked element has the wrong value.
    Fault(_NORM, "triton_kernel._backward_kernel", "grad_out_ptr + index, mask=inside, other=0",
          "grad_out_ptr + index, mask=inside, other=1", _WRONG),
    Fault(_GUMBEL, "triton_kernel._load_logits", 'plain, float("-inf")', "plain, 0.0", _LEAVES),
    Fault(_ATTENTION, "triton_kernel._add_to_grad_q", "(keys < end)[None, :]", "(keys <= end)[None, :]", _WRONG),
    Fault(_ATTENTION, "triton_kernel._attend", "(keys < end)[None, :]", "(keys <= end)[None, :]", _WRONG),
    Fault(_CONV, "triton_rows._activate_backward_kernel", "left, CHUNK), BLOCK_T", "left, CHUNK) - 1, BLOCK_T", _WRONG),
    # The last block of keys is counted twice.
    Fault(_ATTENTION, "triton_kernel._forward_kernel", "range(0, last, BLOCK_N)", "range(0, length, BLOCK_N)",
          f"{_LEAVES}|{_WRONG}"),
    # A stride is wrong.
    Fault(_ATTENTION, "triton_kernel._forward_kernel", "stride = heads * E", "stride = BLOCK_E * heads",
          f"{_LEAVES}|{_WRONG}"),
    Fault(_ATTENTION, "triton_kernel._backward_q_kernel", ".to(tl.int64) * heads + head",
          ".to(tl.int64) + head * total", f"{_LEAVES}|{_WRONG}"),
    Fault(_CONV, "triton_kernel._forward_kernel", "columns[None, :] * WINDOW + k[:, None]",
          "columns[None, :] + k[:, None] * C_OUT", f"{_LEAVES}|{_WRONG}"),
    Fault(_GUMBEL, "triton_kernel._backward_logits_kernel", "(group * V + codes)[None, :] * E",
          "(codes * G + group)[None, :] * E", _WRONG),
    # Something depends on other sequences, or was never written.
    Fault(_ATTENTION, "triton_tiles.block_of", "(tile - begin // BLOCK - sequence) * BLOCK",
          "(tile - begin // BLOCK - sequence) * BLOCK - begin % 2", f"{_WRONG}|different numbers"),
    Fault(_ATTENTION, "triton_kernel._backward_q_kernel", "tl.store(delta_ptr + per_row, delta, mask=rows < length)",
          "pass", _WRONG),
    Fault(_ATTENTION, "triton_kernel._backward_q_kernel",
          "tl.store(states_ptr + per_row, states.to(tl.int32, bitcast=True), mask=rows < length)", "pass", _WRONG),
    Fault(_LOSS, "triton_kernel._measure_rows_kernel",
          "tl.store(hash_ptr + rows, hashes, mask=rows < frames)", "pass", _WRONG),
    Fault(_CONV, "triton_statistics._frame_moments_kernel",
          "tl.store(moments_ptr + C, tl.sum(squares, 0), mask=channels < C)", "pass", _WRONG),
    Fault(_NORM, "triton_kernel._backward_kernel",
          "tl.store(partial_bias_ptr + place, grad_bias, mask=in_width)", "pass", _WRONG),
    # Two weights that share a hash get the same draw.
    Fault(_ATTENTION, "triton_tiles.is_kept", "draws * 0x10001, draws)", "draws, draws)", _WRONG),
    # Arguments are not made contiguous.
    *(Fault(op, "op.contiguous", "", "", f"{_OTHER_BITS}|between its elements|{_LEAVES}") for op in sorted(SUBJECTS)),
)  # fmt: skip


@contextmanager
def broken(fault: Fault) -> Iterator[None]:
    """Put a fault into the source."""
    module_name, name = fault.function.split(".")
    module: Any = importlib.import_module(f"fastssl.kernels.{fault.op}.{module_name}")
    original = getattr(module, name)
    if module_name == "op":
        setattr(module, name, tuple)
        try:
            yield
        finally:
            setattr(module, name, original)
        return
    source: str = original.src
    assert source.count(fault.old) > 0, f"{fault.function} of {fault.op} does not contain {fault.old!r}"
    original._unsafe_update_src(source.replace(fault.old, fault.new))
    _forget_hashes(fault.op)
    try:
        yield
    finally:
        original._unsafe_update_src(source)
        _forget_hashes(fault.op)


def _forget_hashes(op: str) -> None:
    """Let Triton compile all kernels of an op again, because any may call a function that has changed."""
    from triton.runtime.jit import JITFunction

    package: Any = importlib.import_module(f"fastssl.kernels.{op}")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("triton"):
            for value in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values():
                if isinstance(value, JITFunction):
                    value.hash = None


def symptoms(fault: Fault) -> list[str]:
    """Run the checks with a fault; return the errors."""
    with broken(fault), emulated():
        found: list[Outcome] = outcomes(
            SUBJECTS[fault.op], torch.bfloat16, first_only=fault.function != "op.contiguous"
        )
    return [each.error for each in found if each.error is not None]


def missed(op: str, every: Callable[[Fault], bool] = lambda fault: True) -> list[str]:
    """Return the faults of an op that show no symptom, or another one than expected."""
    left = []
    for fault in FAULTS:
        if fault.op == op and every(fault):
            errors = symptoms(fault)
            if not any(re.search(fault.symptom, error) for error in errors):
                left.append(f"{fault.function}: {fault.old!r} -> {fault.new!r}: {errors or 'not found'}")
    return left


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=sorted(SUBJECTS))
    parser.add_argument("--first-only", action="store_true", help="only the first fault of the op")
    options = parser.parse_args(arguments)
    use_triton_on_the_cpu()
    first = next(fault for fault in FAULTS if fault.op == options.op)
    print(json.dumps(missed(options.op, lambda fault: fault is first or not options.first_only)))


if __name__ == "__main__":
    _main()
