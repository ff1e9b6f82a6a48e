"""The process that runs kernels for `fastssl check`: a crash ends this process, not the command.

    python -m fastssl.cli.check.worker cuda bfloat16 0

It prints a line of JSON before and after each kernel.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from fastssl.cli.check.cases import AWKWARD_LENGTHS, SPEECH_LENGTHS, Case, cases
from fastssl.cli.check.measure import agreement, badness, milliseconds
from fastssl.kernels.dispatch import BACKENDS

_LONGEST = 300  # characters of an error message


class _Unit(NamedTuple):
    """One kernel and one case: `awkward` has awkward lengths, `speech` is also timed."""

    awkward: Case
    speech: Case
    backend: str


def _units(device: torch.device) -> Iterator[_Unit]:
    speech = SPEECH_LENGTHS * 6 if device.type == "cuda" else tuple(length // 8 for length in SPEECH_LENGTHS)
    for awkward, ordinary in zip(cases(AWKWARD_LENGTHS), cases(speech), strict=True):
        for backend in BACKENDS[awkward.op][device.type]:
            # On the CPU, only tests run Triton, in its interpreter.
            if backend != "reference" and (backend, device.type) != ("triton", "cpu"):
                yield _Unit(awkward, ordinary, backend)


def main(arguments: Sequence[str]) -> int:
    """Run all kernels from a given number on, until one raises an error.

    Args:
        arguments: Device, dtype, and the number of kernels to skip.

    Returns:
        0 after the last kernel, 3 after an error of a kernel, which may leave the device unusable for this process.
    """
    device, dtype, first = torch.device(arguments[0]), getattr(torch, arguments[1]), int(arguments[2])
    for number, (awkward, speech, backend) in enumerate(_units(device)):
        if number < first or not speech.supports(backend, dtype):
            continue
        _say(number=number, op=speech.op, case=speech.what, backend=backend)
        try:
            found = [agreement(case, backend, dtype, device) for case in (awkward, speech)]
            ours_ms, plain_ms = milliseconds(speech, backend, dtype, device)
        except Exception as error:  # whatever a kernel raises is a result
            text = " ".join(str(error).split())
            _say(number=number, failure=f"{type(error).__name__}: {text}"[:_LONGEST])
            return 3
        worst = max(found, key=badness)
        relative = None if math.isnan(worst.error) else worst.error  # JSON has no NaN
        _say(number=number, error=relative, worst=worst.worst, ms=ours_ms, plain_ms=plain_ms)
    return 0


def _say(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
