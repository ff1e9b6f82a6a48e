"""Compile Triton kernels for GPUs that this machine need not have, and read each kernel's cost from the compiler.

Each kernel module has `ahead_of_time_cases()`, a dict from labels to calls of its host functions on CPU tensors of the
right shapes. This module records the launches of such a call instead of running them, and compiles each with exactly
the types, alignments, constants and options of the launch. A process that uses Triton's interpreter cannot use its
compiler, so compilation needs a process of its own:

    python -m tests.ops.ahead_of_time varlen_attention --architectures 80 90 100     # prints a table
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

#: Compute capability -> the most bytes of shared memory per block.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Compiled(NamedTuple):
    """The compiler's figures for one launch: bytes per block for `shared`, bytes per thread for `stack` and `local`."""

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


@lru_cache
def compiled(ops: tuple[str, ...], architectures: tuple[int, ...], *, only_first: bool) -> list[Compiled]:
    """Compile the cases of some ops in a separate process.

    Args:
        ops: Folders in fastssl/kernels with a triton_kernel.py that has `ahead_of_time_cases`.
        architectures: Compute capabilities, such as 90 for sm_90.
        only_first: Compile only the first case of each op.
    """
    command = [sys.executable, "-m", "tests.ops.ahead_of_time", *ops, "--json"]
    command += ["--architectures", *(str(architecture) for architecture in architectures)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        command + ["--only-first"] * only_first, env=environment, check=False, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return [Compiled(*row) for row in json.loads(process.stdout)]


class Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


def _record(call: Callable[[], object]) -> list[Launch]:
    """Return the launches that a call makes, without running them."""
    from triton.runtime.jit import JITFunction

    launches = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, args, options))

    original, JITFunction.run = JITFunction.run, run
    try:
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
    return Prepared(source, target, parsed.__dict__, bound, signature)


def compile_launch(launch: Launch, architecture: int) -> dict[str, int]:
    """Compile for any GPU; return the compiler's figures."""
    import triton

    prepared = prepare(launch, architecture)
    binary = triton.compile(prepared.source, target=prepared.target, options=prepared.options)
    return {
        "num_warps": binary.metadata.num_warps,
        "num_stages": binary.metadata.num_stages,
        "registers": 0,
        "shared": binary.metadata.shared,
        "stack": 0,
        "local": 0,
    } | _resource_usage(binary.asm["cubin"])


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Return registers and spills, which Triton's metadata contains only on a machine with a GPU."""
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    # The report has one line per function, " REG:96 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:432 ...", and one function.
    (usage,) = (line for line in report.splitlines() if "REG:" in line)
    fields = dict(field.split(":") for field in usage.split())
    return {"registers": int(fields["REG"]), "stack": int(fields["STACK"]), "local": int(fields["LOCAL"])}


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="+")
    parser.add_argument("--architectures", nargs="+", type=int, default=[90])
    parser.add_argument("--only-first", action="store_true", help="compile only the first case of each op")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = []
    for op in options.ops:
        cases = importlib.import_module(f"fastssl.kernels.{op}.triton_kernel").ahead_of_time_cases()
        for label, call in list(cases.items())[: 1 if options.only_first else None]:
            for launch in _record(call):
                for architecture in options.architectures:
                    usage = compile_launch(launch, architecture)
                    rows.append(Compiled(op, label, launch.kernel.__name__, architecture, **usage))
                    if not options.json:
                        print(*(f"{name}={value}" for name, value in rows[-1]._asdict().items()), flush=True)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    _main()
