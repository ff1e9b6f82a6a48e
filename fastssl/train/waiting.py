"""What one process of a run makes and the others wait for."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

#: A failure that has stood so long is this attempt's: the first process takes an earlier one's away when it starts.
_FAILED_FOR_S = 30.0


def by_first_process(make: Callable[[], None], *, first: bool, done: Callable[[], bool], folder: Path) -> None:
    """Make something in the first process; in the others wait until it is done, or has failed.

    Torchrun ends the others where the first fails, and Lightning starts them only after this, but srun waits.

    Args:
        make: Makes it.
        first: Whether this process does.
        done: Whether it is there.
        folder: Of what is made; beside it a failure is noted.

    Raises:
        ValueError: The first process failed.
    """
    failed = folder.with_name(f"{folder.name}.failed")
    if first:
        failed.unlink(missing_ok=True)
        try:
            make()
        except BaseException as error:
            with suppress(OSError):  # on a full disk the error itself matters more
                failed.write_text(f"{str(error) or type(error).__name__}\n")
            raise
        return
    seen_s: float | None = None
    while not done():
        if not failed.is_file():
            seen_s = None
        elif seen_s is None:
            seen_s = time.monotonic()
        elif time.monotonic() - seen_s > _FAILED_FOR_S:
            raise ValueError(f"the process that makes {folder} failed: {failed.read_text().strip()}")
        time.sleep(0.5)
