"""Run a command and record its processor time and peak memory, even if the study that started it has ended meanwhile.

    python -m benchmarks.studies.accounted USED.json COMMAND...

Adds the processor seconds to those in USED.json, and keeps the higher peak of resident memory. A study cannot start the
command directly: a process inherits the peak of its parent, and a study may hold gigabytes of features.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run the command, write USED.json, and exit with the status of the command."""
    used, *command = sys.argv[1:]
    # Pass inherited file descriptors on: one of them holds the lock of the run's folder.
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
