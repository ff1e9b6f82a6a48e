"""The process that `fastssl check` starts, on a pretended GPU: what it finds wrong is a failure of the kernel.

python -m tests.emulation.fake_cuda.check_worker cuda bfloat16 0
"""

import sys
from collections.abc import Sequence

from tests.emulation.fake_cuda import pretend


def _main(arguments: Sequence[str]) -> int:
    pretend.pretend()
    from fastssl.cli.check import measure, worker
    from tests.emulation.fake_cuda.mode import FakeCuda

    measure._BUDGET_S = 0.0
    with FakeCuda() as mode:
        status = worker.main(arguments)
    if mode.record.problems:
        sys.exit("\n".join(mode.record.problems))
    return status


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
