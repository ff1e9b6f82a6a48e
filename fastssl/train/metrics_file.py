"""A run's metrics.csv: each report appends a row immediately, and a resumed run continues the file."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastssl.files import append_text, write_text
from fastssl.reading import check_file, complete_lines


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
        self._kept = [row for row in rows if row["update"] == resume_at]
        write_text(path, self._lines([dict(zip(self.columns, self.columns, strict=True)), *map(_formatted, rows)]))

    def has(self, row: Iterable[str], update: int) -> bool:
        """Return whether a continued file has a row of an update with the values of these columns.

        Args:
            row: Names of the columns.
            update: Update that the row belongs to.
        """
        return any(kept["update"] == update and kept.keys() >= set(row) for kept in self._kept)

    def append(self, row: dict[str, float]) -> None:
        """Append a row, and close the file again.

        Args:
            row: Values by column, with at least `update`; cells of other missing columns stay empty.

        Raises:
            WriteError: The system refused to write.
        """
        append_text(self.path, self._lines([_formatted(row)]))

    def _lines(self, rows: list[dict[str, str]]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerows(rows)
        return text.getvalue()


def _formatted(row: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.9g}" for name, value in row.items()}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of metrics.csv, each as a dictionary of values by column.

    Empty cells are left out. A last row that is incomplete because the run was killed is skipped.

    Args:
        path: The file.

    Raises:
        ValueError: The file cannot be read, or a line is damaged; the message names it.
    """
    check_file(path)
    columns: list[str] = []
    rows = []
    for number, line in complete_lines(path):
        try:
            (cells,) = csv.reader([line.decode("utf-8-sig")])  # spreadsheets write a mark before the first line
            row = {name: float(cell) for name, cell in zip(columns, cells, strict=True) if cell} if columns else {}
        except (ValueError, csv.Error):
            cells, row = [], {}
        if "update" not in (row if columns else cells):
            expected = "a number or nothing per column; delete it" if columns else "names of columns; restore it"
            raise ValueError(f"{path}: line {number} is damaged, expected {expected}")
        if columns:
            rows.append(row)
        else:
            columns = cells
    return rows
