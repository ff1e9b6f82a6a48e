"""Tables of recordings with labels: reading them, dividing them into parts, and folds."""

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Pronunciations of the English digits in ARPAbet, from which phone strings of digit strings follow.
DIGIT_PHONES = {
    "0": "Z IH R OW",
    "1": "W AH N",
    "2": "T UW",
    "3": "TH R IY",
    "4": "F AO R",
    "5": "F AY V",
    "6": "S IH K S",
    "7": "S EH V AH N",
    "8": "EY T",
    "9": "N AY N",
}


@dataclass(frozen=True)
class Row:
    """A recording and what is known of it.

    Args:
        path: The file.
        labels: What stands in the other columns, by name.
    """

    path: Path
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """Labelled recordings.

    Args:
        name: For messages: the file it was read from.
        rows: In the order of the file.
    """

    name: str
    rows: tuple[Row, ...]

    def column(self, name: str) -> list[str]:
        """A label of every row; "phones" follows from "digits" where there is no such column.

        Raises:
            ValueError: There is no such column, or a row has nothing in it.
        """
        values = []
        for row in self.rows:
            value = row.labels.get(name)
            if value is None and name == "phones" and "digits" in row.labels:
                value = phones_of_digits(row.labels["digits"], where=f"{self.name}: {row.path.name}")
            if value is None:
                raise ValueError(f"{self.name}: no column {name!r}; there are {', '.join(row.labels)}")
            if not value.strip():
                raise ValueError(f"{self.name}: {row.path.name} has nothing in column {name!r}")
            values.append(value)
        return values


def read_table(path: str | Path) -> Table:
    """Read a table with a header: tab-separated, or comma-separated where the name ends with .csv.

    Column `path` names the recordings, absolute or from the folder of the table; the other columns are labels.

    Raises:
        ValueError: There is no such file, no column `path`, no row, a row of another length, or a recording twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"table: there is no file {path}")
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            header, *records = [record for record in csv.reader(lines, delimiter=separator) if record]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text: {error}") from None
    except ValueError:
        raise ValueError(f"{path}: is empty; a table begins with the names of its columns") from None
    if "path" not in header:
        separated = "commas" if separator == "," else "tabs"
        raise ValueError(f"{path}: no column 'path'; separated by {separated} there are {', '.join(header)}")
    if not records:
        raise ValueError(f"{path}: has no rows")
    rows: dict[Path, Row] = {}
    for number, record in enumerate(records, 2):
        if len(record) != len(header):
            raise ValueError(f"{path}: row {number} has {len(record)} fields, the header {len(header)}")
        labels = dict(zip(header, record, strict=True))
        file = path.parent / labels.pop("path")
        if file in rows:
            raise ValueError(f"{path}: {file} is there twice")
        rows[file] = Row(file, labels)
    return Table(str(path), tuple(rows.values()))


def split_table(table: Table) -> tuple[Table, Table, Table]:
    """Training, development and test, about 70, 15 and 15 of 100 rows each, by a hash of the path.

    Recordings that share material (a speaker's session, the same words cut anew) may come to lie on both sides.
    """
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row in table.rows:
        share = int.from_bytes(hashlib.blake2b(row.path.name.encode(), digest_size=8).digest(), "big") / 2**64
        parts[0 if share < 0.7 else 1 if share < 0.85 else 2].append(row)
    names = ("training", "development", "test")
    train, dev, test = (
        Table(f"{table.name} ({name} rows)", tuple(rows)) for name, rows in zip(names, parts, strict=True)
    )
    return train, dev, test


def phones_of_digits(digits: str, *, where: str) -> str:
    """Phones of a string of English digits, separated by blanks.

    Raises:
        ValueError: A character is no digit; `where` names the row.
    """
    foreign = sorted(set(digits.replace(" ", "")) - DIGIT_PHONES.keys())
    if foreign:
        raise ValueError(f"{where} has {foreign[0]!r} in column 'digits', which is no digit")
    return " ".join(DIGIT_PHONES[digit] for digit in digits.replace(" ", ""))


class Symbols:
    """The symbols of CTC targets, numbered from 1; 0 is the blank.

    Args:
        labels: Of the training part.
        separated: Whether symbols are separated by blanks ("S IH K S") or are single characters ("6174"); None looks
            whether any label has a blank.
    """

    def __init__(self, labels: Iterable[str], *, separated: bool | None = None) -> None:
        labels = list(labels)
        self.separated = any(" " in label.strip() for label in labels) if separated is None else separated
        self.names = sorted({name for label in labels for name in self._split(label)})
        self._numbers = {name: number for number, name in enumerate(self.names, 1)}

    def encode(self, label: str, *, where: str) -> list[int]:
        """Numbers of the symbols of a label.

        Raises:
            ValueError: A symbol is not in the training part; `where` names the row.
        """
        split = self._split(label)
        for name in split:
            if name not in self._numbers:
                raise ValueError(f"{where} has {name!r} in its label, which the training part has not")
        return [self._numbers[name] for name in split]

    def _split(self, label: str) -> list[str]:
        return label.split() if self.separated else list(label.strip())


def fold_values(values: Sequence[str], size: int) -> list[list[str]]:
    """Groups of values to hold out together, in the order of the alphabet; what is left over joins the last group.

    Raises:
        ValueError: There are not two groups.
    """
    distinct = sorted(set(values))
    if size < 1 or len(distinct) < 2 * size:
        raise ValueError(f"fold_size: {size} of {len(distinct)} values ({', '.join(distinct)}) does not make two folds")
    groups = [distinct[first : first + size] for first in range(0, len(distinct), size)]
    if len(groups[-1]) < size:
        groups[-2:] = [groups[-2] + groups[-1]]
    return groups
