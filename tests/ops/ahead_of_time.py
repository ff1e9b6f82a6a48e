"""Compiles Triton kernels for GPUs that are not there, and reads from the compiler what each costs.

A kernel module has `ahead_of_time_cases()`: label -> a call of its host functions, on CPU tensors of the right shapes.
Here every launch of such a call is recorded instead of run, and compiled with exactly the types, alignments, constants
and options it would have been launched with. Triton's interpreter excludes its compiler, hence a process of its own:

    python -m tests.ops.ahead_of_time varlen_attention --architectures 80 90 100     # a table
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

#: compute capability -> bytes of shared memory that a block can have
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Compiled(NamedTuple):
    """What the compiler says of one launch. Sizes in bytes, per block for `shared` and per thread for the others."""

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
    """Compile the cases of some ops in a process of its own.

    Args:
        ops: Folders in fastssl/kernels with a triton_kernel.py that has `ahead_of_time_cases`.
        architectures: Compute capabilities, 90 for sm_90.
        only_first: Leave out all cases of an op but the first.
    """
    command = [sys.executable, "-m", "tests.ops.ahead_of_time", *ops, "--json"]
    command += ["--architectures", *(str(architecture) for architecture in architectures)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        command + ["--only-first"] * only_first, env=environment, check=False, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return [Compiled(*row) for row in json.loads(process.stdout)]


class _Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


def _record(call: Callable[[], object]) -> list[_Launch]:
    """The launches of a call, none of which is run."""
    from triton.runtime.jit import JITFunction

    launches = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(_Launch(kernel, args, options))

    original, JITFunction.run = JITFunction.run, run
    try:
        call()
    finally:
        JITFunction.run = original
    return launches


def _compile(launch: _Launch, architecture: int) -> dict[str, int]:
    """What JITFunction.run does up to the launch, for a GPU of our choice."""
    import triton
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
    binary = triton.compile(source, target=target, options=parsed.__dict__)
    return {
        "num_warps": binary.metadata.num_warps,
        "num_stages": binary.metadata.num_stages,
        "registers": 0,
        "shared": binary.metadata.shared,
        "stack": 0,
        "local": 0,
    } | _resource_usage(binary.asm["cubin"])


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers and spills. Without a GPU they are not in Triton's metadata."""
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    # One line per function, " REG:96 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:432 ...", of which a kernel has one.
    (usage,) = (line for line in report.splitlines() if "REG:" in line)
    fields = dict(field.split(":") for field in usage.split())
    return {"registers": int(fields["REG"]), "stack": int(fields["STACK"]), "local": int(fields["LOCAL"])}


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="+")
    parser.add_argument("--architectures", nargs="+", type=int, default=[90])
    parser.add_argument("--only-first", action="store_true", help="leave out all cases of an op but the first")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = []
    for op in options.ops:
        cases = importlib.import_module(f"fastssl.kernels.{op}.triton_kernel").ahead_of_time_cases()
        for label, call in list(cases.items())[: 1 if options.only_first else None]:
            for launch in _record(call):
                for architecture in options.architectures:
                    usage = _compile(launch, architecture)
                    rows.append(Compiled(op, label, launch.kernel.__name__, architecture, **usage))
                    if not options.json:
                        print(*(f"{name}={value}" for name, value in rows[-1]._asdict().items()), flush=True)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    _main()
