"""Check the kernels of some ops, and print what was found as JSON.

This needs a process in which Triton does not use its interpreter:

    TRITON_INTERPRET=0 python -m tests.emulation.ptx varlen_attention --dtypes bfloat16 float32
"""

import argparse
import json
import os
from collections.abc import Sequence

import torch


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="+")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--architectures", nargs="*", type=int, default=[], help="also compile the launches for these")
    options = parser.parse_args(arguments)
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "unset TRITON_INTERPRET: its interpreter compiles nothing"
    from tests.emulation.ptx.checks import kernels_of, launched, outcomes
    from tests.emulation.ptx.launch import compile_again, emulated, use_triton_on_the_cpu
    from tests.emulation.ptx.subjects import SUBJECTS

    use_triton_on_the_cpu()
    found = {}
    for op in options.ops:
        with emulated() as emulator:
            results = [each for dtype in options.dtypes for each in outcomes(SUBJECTS[op], getattr(torch, dtype))]
        found[op] = {
            "outcomes": results,
            "not launched": sorted(kernels_of(op) - launched(emulator)),
            "seconds": emulator.seconds,
            "compiled": [each for number in options.architectures for each in compile_again(emulator, op, number)],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
