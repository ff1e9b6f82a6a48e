"""The process that runs kernels for `fastssl check`: a crash ends this process, not the command.

    python -m fastssl.cli.check.worker cuda bfloat16 0

It prints a line of JSON before and after each kernel.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

import torch

from fastssl.cli.check.cases import AWKWARD_LENGTHS, SPEECH_LENGTHS, Case, cases
from fastssl.cli.check.measure import agreement, badness, milliseconds
from fastssl.kernels.dispatch import BACKENDS, UnavailableBackendError

_LONGEST = 300  # characters of an error message


class _Unit(NamedTuple):
    """One kernel and one case: with awkward lengths, with those of speech, and with a batch large enough to be timed.

    That batch is not compared with the reference in fp64, which would take more memory than many GPUs have.
    """

    awkward: Case
    speech: Case
    timed: Case
    backend: str


def _units(device: torch.device) -> Iterator[_Unit]:
    on_gpu = device.type == "cuda"
    speech = SPEECH_LENGTHS if on_gpu else tuple(length // 8 for length in SPEECH_LENGTHS)
    for several in zip(cases(AWKWARD_LENGTHS), cases(speech), cases(speech * 6 if on_gpu else speech), strict=True):
        for backend in BACKENDS[several[0].op][device.type]:
            # On the CPU, only tests run Triton, in its interpreter.
            if backend != "reference" and (backend, device.type) != ("triton", "cpu"):
                yield _Unit(*several, backend)


def main(arguments: Sequence[str], reports: TextIO | None = None) -> int:
    """Run all kernels from a given number on, until one raises an error.

    Args:
        arguments: Device, dtype, and the number of kernels to skip.
        reports: Where to write the lines; standard output by default.

    Returns:
        0 after the last kernel, 3 after an error of a kernel, which may leave the device unusable for this process.
    """
    device, dtype, first = torch.device(arguments[0]), getattr(torch, arguments[1]), int(arguments[2])
    for number, (awkward, speech, timed, backend) in enumerate(_units(device)):
        if number < first or not speech.supports(backend, dtype):
            continue
        _say(reports, number=number, op=speech.op, case=speech.what, backend=backend)
        try:
            found = [agreement(case, backend, dtype, device) for case in (awkward, speech)]
            ours_ms, plain_ms = milliseconds(timed, backend, dtype, device)
        except UnavailableBackendError:  # such as PyTorch's attention on an older GPU
            _say(reports, number=number, left_out=True)
            continue
        except Exception as error:  # whatever a kernel raises is a result
            text = " ".join(str(error).split())
            _say(reports, number=number, failure=f"{type(error).__name__}: {text}"[:_LONGEST])
            return 3
        worst = max(found, key=badness)
        relative = worst.error if math.isfinite(worst.error) else None  # JSON has neither NaN nor infinity
        _say(reports, number=number, error=relative, worst=worst.worst, ms=ours_ms, plain_ms=plain_ms)
    return 0


def _say(reports: TextIO | None, **values: object) -> None:
    print(json.dumps(values), file=reports, flush=True)


def own_output() -> TextIO:
    """Return standard output for this process's reports; from now on, all others write to standard error instead.

    Triton prints a kernel's whole code there if the assembler refuses it.
    """
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return own


if __name__ == "__main__":
    status = main(sys.argv[1:], own_output())
    # Not `sys.exit`: after a kernel's wrong access to memory, PyTorch may abort while it frees what it has on the GPU.
    os._exit(status)
