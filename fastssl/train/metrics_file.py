"""A run's metrics.csv: each report appends a row immediately, and a resumed run continues the file."""

import csv
from collections.abc import Sequence
from pathlib import Path


class MetricsFile:
    """A CSV file with fixed columns, the first of which is `update`.

    Lightning's CSV logger cannot be used, because it deletes the file when a run is resumed.

    Args:
        path: File to write; its folder must exist.
        columns: Names of the columns. If an existing file is continued, its additional columns are kept.
        resume_at: Continue an existing file after this update, and drop the rows of later updates, which the run will
            write again. None begins a new file.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, resume_at: int | None = None) -> None:
        self.path = path
        self.columns = list(columns)
        rows = []
        if resume_at is not None and path.exists():
            rows = [row for row in read_metrics(path) if row["update"] <= resume_at]
            self.columns = list(dict.fromkeys([*self.columns, *(name for row in rows for name in row)]))
        temporary = path.with_suffix(".tmp")
        self._write(temporary, "w", rows, header=True)
        temporary.replace(path)

    def append(self, row: dict[str, float]) -> None:
        """Append a row, and close the file again.

        Args:
            row: Values by column, with at least `update`; cells of other missing columns stay empty.
        """
        self._write(self.path, "a", [row], header=False)

    def _write(self, path: Path, mode: str, rows: list[dict[str, float]], *, header: bool) -> None:
        with path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if header:
                writer.writeheader()
            for row in rows:
                writer.writerow({name: f"{value:.9g}" for name, value in row.items()})


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of metrics.csv, each as a dictionary of values by column.

    Empty cells are left out. A last row that is incomplete because the run was killed is skipped.

    Args:
        path: The file.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    complete = [row for row in rows if None not in row.values()]
    return [{name: float(value) for name, value in row.items() if value} for row in complete]
