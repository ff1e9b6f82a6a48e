"""Run a command and write what it took, also when whoever asked for it is gone meanwhile.

    python -m benchmarks.studies.accounted USED.json COMMAND...

Adds processor seconds to those in USED.json, and keeps the highest resident memory. A process inherits the peak of the
one that starts it, so a study that has gigabytes of features in memory cannot start the command itself.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run it; ends with its status."""
    used, *command = sys.argv[1:]
    # A lock that was inherited is handed on.
    process = subprocess.Popen(command, close_fds=False)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    path = Path(used)
    before = json.loads(path.read_text()) if path.is_file() else {"cpu_s": 0.0, "peak_mb": 0.0}
    after = {
        "cpu_s": before["cpu_s"] + usage.ru_utime + usage.ru_stime,
        "peak_mb": max(before["peak_mb"], usage.ru_maxrss / 1024),
    }
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(after))
    partial.replace(path)
    sys.exit(process.returncode if process.returncode >= 0 else 128 - process.returncode)


if __name__ == "__main__":
    main()
