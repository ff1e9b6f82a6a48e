"""Run a case in a child process, and tell right results, named errors, wrong results, crashes and hangs apart."""

import json
import os
import random
import selectors
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import fastssl

_PACKAGE = Path(fastssl.__file__).parent
#: Largest resident memory of a process that handles one file, in MB.
_LIMIT_MB = 1500


class WrongResultError(Exception):
    """A result that is wrong, although nothing was reported."""


class Outcome(NamedTuple):
    """What became of a case.

    Args:
        kind: "right", "named" (an error or a `Problem` that names its file), "unnamed" (any other exception), "wrong",
            "crash" (ended by a signal), "hang", or "memory" (above the limit).
        text: The message, or the last line of the traceback.
        peak_mb: Largest resident memory of the child process, in MB.
    """

    kind: str
    text: str
    peak_mb: float


def run_case(case: Callable[[], str | None], *, name: str, seconds: float = 30.0) -> Outcome:
    """Run a case in a fork of this process.

    Args:
        case: Returns None if its results are right, or the message by which a fault was named. It raises
            `WrongResultError` if they are wrong.
        name: Text that the message of an error must contain, such as the name of the damaged file.
        seconds: Time after which the case counts as a hang.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, json.dumps(_judge(case, name)).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    text, hung = _read(reading, seconds)
    if hung:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    peak_mb = usage.ru_maxrss / 1024
    if hung:
        return Outcome("hang", f"after {seconds:g} s", peak_mb)
    if status != 0 or not text:
        return Outcome("crash", f"status {status}", peak_mb)
    kind, message = json.loads(text)
    return Outcome("memory" if peak_mb > _LIMIT_MB else kind, message, peak_mb)


def _judge(case: Callable[[], str | None], name: str) -> tuple[str, str]:
    from fastssl.data.audio import AudioError

    try:
        message = case()
    except WrongResultError as error:
        return "wrong", str(error)
    except (AudioError, ValueError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        ours = Path(frame.f_code.co_filename).is_relative_to(_PACKAGE)
        # Callers put the name in front of an AudioError.
        if ours and (isinstance(error, AudioError) or name in str(error)):
            return "named", str(error)
        return "unnamed", traceback.format_exc(limit=-4)
    except BaseException:
        return "unnamed", traceback.format_exc(limit=-4)
    if message is None:
        return "right", ""
    return ("named" if name in message else "unnamed"), message


def _read(pipe: int, seconds: float) -> tuple[bytes, bool]:
    """Read until the other end is closed; the second value says whether the time was over first."""
    deadline, text = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            if not (part := os.read(pipe, 1 << 16)):
                os.close(pipe)
                return text, False
            text += part
    os.close(pipe)
    return text, True


def check_all(outcomes: Iterable[tuple[Any, Outcome]]) -> Counter[str]:
    """Print what became of the cases, and fail if any was neither right nor named.

    Args:
        outcomes: Pairs of what identifies a case, such as its seed and damage, and its outcome.
    """
    kinds: Counter[str] = Counter()
    bad, peak_mb = [], 0.0
    for case, outcome in outcomes:
        kinds[outcome.kind] += 1
        peak_mb = max(peak_mb, outcome.peak_mb)
        if outcome.kind not in ("right", "named"):
            bad.append(f"{case}: {outcome.kind}: {outcome.text}")
    print(f"{kinds.total()} cases: {dict(kinds)}, peak {peak_mb:.0f} MB")
    assert not bad, f"{len(bad)} of {kinds.total()}:\n" + "\n".join(bad[:20])
    assert kinds["right"], "no case was right: the check cannot tell good from bad"
    return kinds


def generator(seed: int, case: int) -> random.Random:
    """Return the random numbers of one case, which do not depend on how many cases there are."""
    return random.Random(f"{seed}/{case}")
