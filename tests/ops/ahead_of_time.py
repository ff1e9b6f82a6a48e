"""Compile Triton kernels for GPUs that this machine need not have, and read each kernel's cost from the compiler.

Each kernel module has `ahead_of_time_cases()`, a dict from labels to calls of its host functions on CPU tensors of the
right shapes. This module records the launches of such a call instead of running them, and compiles each with exactly
the types, alignments, constants and options of the launch. Calls are recorded with exact fp32 products and with TF32.
Launches that would compile the same code are compiled once. A process that uses Triton's interpreter cannot use its
compiler, so compilation needs a process of its own:

    python -m tests.ops.ahead_of_time varlen_attention strided_conv --architectures 86 90    # prints a table
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from fastssl.kernels.precision import Precision, fp32_precision

#: Compute capability of a supported GPU -> the most bytes of shared memory per block.
SHARED_BYTES = {
    80: 163 * 1024,  # A100
    86: 99 * 1024,  # A10, RTX 3090
    89: 99 * 1024,  # L4, RTX 4090
    90: 227 * 1024,  # H100, H200
    100: 227 * 1024,  # B200
    120: 99 * 1024,  # RTX 5090
}
#: The same for sm_75, which the kernels do not support: Triton uses no tensor cores there.
TURING, TURING_SHARED_BYTES = 75, 64 * 1024


class Compiled(NamedTuple):
    """The compiler's figures for one launch: bytes per block for `shared`, bytes per thread for `stack` and `local`.

    `products` names the tensor-core instruction and the type of its operands, "" if the code has none.
    """

    op: str
    label: str
    kernel: str
    architecture: int
    num_warps: int
    num_stages: int
    registers: int
    shared: int
    stack: int
    local: int
    products: str

    @property
    def spilled(self) -> int:
        """Bytes of memory per thread for values that did not fit into registers."""
        return self.stack + self.local

    @property
    def fits(self) -> bool:
        """Whether a block of this architecture has as much shared memory as the launch needs."""
        return self.shared <= (SHARED_BYTES | {TURING: TURING_SHARED_BYTES})[self.architecture]


class Launch(NamedTuple):
    """A call of a Triton kernel with its arguments, constants and options."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@lru_cache
def compiled(
    ops: tuple[str, ...], architectures: tuple[int, ...], *, case: str | None = None, one_per_kernel: bool = False
) -> list[Compiled]:
    """Compile the cases of some ops in a separate process.

    Args:
        ops: Folders in fastssl/kernels with a triton_kernel.py that has `ahead_of_time_cases`.
        architectures: Compute capabilities, such as 90 for sm_90.
        case: Label of the only case to compile; None compiles all.
        one_per_kernel: Compile only the first launch of each kernel.
    """
    command = ["tests.ops.ahead_of_time", *ops, "--json"]
    command += ["--architectures", *(str(architecture) for architecture in architectures)]
    command += [] if case is None else ["--case", case]
    rows = json.loads(in_compiling_process(command + ["--one-per-kernel"] * one_per_kernel))
    return [Compiled(*row) for row in rows]


def in_compiling_process(command: Sequence[str]) -> str:
    """Run a module with arguments in a process without Triton's interpreter; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", *command], env=environment, check=False, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def launches_of(op: str) -> Iterator[tuple[str, Launch]]:
    """Yield the launches of all cases of an op with the label of the case; labels end with ", TF32" under TF32."""
    cases = importlib.import_module(f"fastssl.kernels.{op}.triton_kernel").ahead_of_time_cases()
    precisions: dict[Precision, str] = {"ieee": "", "tf32": ", TF32"}
    for precision, suffix in precisions.items():
        for label, call in cases.items():
            for launch in _record(call, precision):
                yield label + suffix, launch


def _record(call: Callable[[], object], precision: Precision) -> list[Launch]:
    """Return the launches that a call makes, without running them."""
    from triton.runtime.jit import JITFunction

    launches = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, args, options))

    original, JITFunction.run = JITFunction.run, run
    try:
        with fp32_precision(convolutions=precision, matrix_products=precision):
            call()
    finally:
        JITFunction.run = original
    return launches


class Prepared(NamedTuple):
    """Arguments of `triton.compile`, and what Triton makes of the arguments of a launch."""

    source: Any
    target: Any
    options: dict[str, Any]
    bound: dict[str, Any]  # argument -> value
    signature: dict[str, str]  # argument -> type, "constexpr" if it is compiled into the kernel

    @property
    def key(self) -> tuple[str, str]:
        """A key that is the same for launches with the same code."""
        return self.source.hash(), repr(sorted(self.options.items(), key=lambda item: item[0]))

    def compile(self) -> Any:
        """Return Triton's compiled kernel, with the text of each stage in `asm`."""
        import triton

        return triton.compile(self.source, target=self.target, options=self.options)


def prepare(launch: Launch, architecture: int) -> Prepared:
    """Prepare to compile for any GPU, with the same steps as Triton's `JITFunction.run` takes before a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = launch.kernel, GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, launch.options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return Prepared(source, target, dict(parsed.__dict__), bound, signature)


def cuobjdump(cubin: bytes, *options: str) -> str:
    """Return what the cuobjdump of Triton prints about a compiled kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def figures(binary: Any) -> dict[str, Any]:
    """Return the figures of a compiled kernel, by their names in `Compiled`."""
    # Triton's metadata contains registers and spills only on a machine with a GPU. The report has one line per
    # function, " REG:96 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:432 ...", and one function.
    (usage,) = (line for line in cuobjdump(binary.asm["cubin"], "-res-usage").splitlines() if "REG:" in line)
    fields = dict(field.split(":") for field in usage.split())
    return {
        "num_warps": binary.metadata.num_warps,
        "num_stages": binary.metadata.num_stages,
        "registers": int(fields["REG"]),
        "shared": binary.metadata.shared,
        "stack": int(fields["STACK"]),
        "local": int(fields["LOCAL"]),
        "products": _products(binary.asm["ptx"]),
    }


def _products(ptx: str) -> str:
    """Return the tensor-core instruction of a kernel and the type of its operands, such as "wgmma bf16"."""
    found = {
        f"{instruction} {(re.findall(r'bf16|f16|tf32|f64', suffix) or ['?'])[0]}"
        for instruction, suffix in re.findall(r"\b(mma|wgmma|tcgen05)\.(?:sync|mma_async|mma)\.(\S+)", ptx)
    }
    return " + ".join(sorted(found))


def compile_ops(
    ops: Sequence[str], architectures: Sequence[int], *, case: str | None = None, one_per_kernel: bool = False
) -> Iterator[Compiled]:
    """Yield the figures of every launch of some ops that differs from those before it; arguments as in `compiled`."""
    for architecture in architectures:
        for op in ops:
            seen: set[object] = set()
            for label, launch in launches_of(op):
                if case not in (None, label):
                    continue
                prepared = prepare(launch, architecture)
                key = launch.kernel.__name__ if one_per_kernel else prepared.key
                if key not in seen:
                    seen.add(key)
                    yield Compiled(op, label, launch.kernel.__name__, architecture, **figures(prepared.compile()))


def _as_line(row: Compiled) -> str:
    return (
        f"{row.op:24}{row.label:72}{row.kernel:36}sm_{row.architecture:<4}{row.num_warps:5}{row.num_stages:7}"
        f"{row.registers:10}{row.shared:8}{row.spilled:8}  {row.products:14}{'' if row.fits else 'DOES NOT FIT'}"
    )


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="+")
    parser.add_argument("--architectures", nargs="+", type=int, default=list(SHARED_BYTES))
    parser.add_argument("--case", help="label of the only case to compile")
    parser.add_argument("--one-per-kernel", action="store_true", help="compile only the first launch of each kernel")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = compile_ops(options.ops, options.architectures, case=options.case, one_per_kernel=options.one_per_kernel)
    if options.json:
        print(json.dumps(list(rows)))
        return
    print(f"{'op':24}{'case':72}{'kernel':36}{'GPU':7}warps stages registers  shared spilled  products")
    for row in rows:
        print(_as_line(row), flush=True)


if __name__ == "__main__":
    _main()
