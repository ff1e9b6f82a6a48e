"""Stand in for the process of `fastssl check`: the kernel number 1 crashes, 2 raises an error, 3 is wrong."""

import json
import os
import signal
import sys


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


for number in range(int(sys.argv[3]), 5):
    say(number=number, op="some_op", case="", backend=f"kernel{number}")
    if number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 2:
        say(number=number, failure="RuntimeError: no such instruction")
        sys.exit(3)
    error = {3: 7.5}.get(number, 0.25)
    say(number=number, error=error, worst="output 0", ms=2.0, plain_ms=4.0)
