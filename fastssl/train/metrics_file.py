"""metrics.csv: one row per report, appended as it happens, and continued by a resumed run."""

import csv
from collections.abc import Sequence
from pathlib import Path


class MetricsFile:
    """A CSV file with fixed columns, the first of which is the update.

    Lightning's CSV logger deletes the file of the run that it resumes.

    Args:
        path: The file.
        columns: Names; a value that a row does not have is left empty. A file that is continued keeps others.
        resume_at: Rows of later updates are dropped: the run will write them again. None begins a new file.
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
        """Write a row, on the disk when this returns."""
        self._write(self.path, "a", [row], header=False)

    def _write(self, path: Path, mode: str, rows: list[dict[str, float]], *, header: bool) -> None:
        with path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if header:
                writer.writeheader()
            for row in rows:
                writer.writerow({name: f"{value:.9g}" for name, value in row.items()})


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv; empty cells, and a last row that a kill cut short, are left out."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    complete = [row for row in rows if None not in row.values()]
    return [{name: float(value) for name, value in row.items() if value} for row in complete]
