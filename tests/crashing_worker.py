"""Stand in for the process of `fastssl check`: the kernel 1 crashes, 2 fails, 3 is wrong, 5 fails, 6 hangs.

With the dtype "unavailable", all but the last are left out. After the failure of kernel 5, the process ends as PyTorch
does after a wrong access to memory.
"""

import json
import os
import signal
import sys
import time


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


for number in range(int(sys.argv[3]), 8):
    say(number=number, op="some_op", case="", backend=f"kernel{number}")
    if sys.argv[2] == "unavailable" and number < 7:
        say(number=number, left_out=True)
        continue
    if number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number in (2, 5):
        say(number=number, failure="RuntimeError: no such instruction")
        if number == 5:
            os.abort()
        sys.exit(3)
    if number == 6:
        time.sleep(60)
    error = {3: 7.5}.get(number, 0.25)
    say(number=number, error=error, worst="output 0", ms=2.0, plain_ms=4.0)
