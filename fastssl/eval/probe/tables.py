"""Tables of labelled recordings: read them, divide them into parts, form folds."""

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastssl.data.rules import RULES
from fastssl.names import encoded, is_utf8, shown

_LONGEST_LINE = 2**24  # characters; a longer one is not a row, but a file of another kind
#: Pronunciations of the English digits in ARPAbet; they turn digit strings into phone strings.
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
    """A recording and its labels.

    Args:
        path: Path of the audio file.
        labels: Values of the other columns, by column name.
    """

    path: Path
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table of labelled recordings.

    Args:
        name: Name for messages: the file that the table was read from.
        rows: Rows in the order of the file.
        rules: Version of the rules by which the recordings are decoded (`fastssl/data/rules.py`).
    """

    name: str
    rows: tuple[Row, ...]
    rules: int = RULES

    def column(self, name: str) -> list[str]:
        """Return one label of every row.

        Args:
            name: Name of the column. If a table has "digits" but no "phones", "phones" is derived from "digits".

        Returns:
            Labels in the order of the rows.

        Raises:
            ValueError: The table has no such column, or the column is empty in a row.
        """
        values = []
        for row in self.rows:
            value = row.labels.get(name)
            if value is None and name == "phones" and "digits" in row.labels:
                value = phones_of_digits(row.labels["digits"], where=f"{self.name}: {shown(row.path.name)}")
            if value is None:
                raise ValueError(f"{self.name}: no column {name!r}; choose one of {', '.join(row.labels)}")
            if not value.strip():
                raise ValueError(
                    f"{self.name}: column {name!r} of {shown(row.path.name)} is empty; fill it or remove the row"
                )
            values.append(value)
        return values


def read_table(path: str | Path, *, rules: int = RULES) -> Table:
    """Read a table with a header from a tab-separated file, or from a comma-separated one if its name ends with .csv.

    Column `path` contains the paths of the recordings, absolute or relative to the table's folder; the other columns
    are labels.

    Args:
        path: Path of the table, UTF-8 text; only the paths in it may contain other bytes.
        rules: Version of the rules by which to decode the recordings.

    Raises:
        ValueError: The file does not exist or is not UTF-8, it has no column `path` or no rows, a row does not have as
            many fields as the header, or a recording is listed twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"table: no such file: {path}")
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    try:
        # A path may contain any byte; labels must be UTF-8.
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as opened:
            lines = iter(lambda: opened.readline(_LONGEST_LINE), "")
            # Strict, because otherwise a quote without its pair hides the rows up to the next quote.
            reader = csv.reader(lines, delimiter=separator, strict=True)
            header, *records = [record for record in reader if record]
    except csv.Error as error:
        raise ValueError(
            f"{path}: is not a table: {error} (up to line {reader.line_num}); save it as UTF-8, put line breaks in "
            "quotes, and a cell that begins with a quote too, with each of its quotes doubled"
        ) from None
    except ValueError:
        raise ValueError(f"{path}: is empty; the first line must contain the names of the columns") from None
    paths = {header.index("path")} if "path" in header else set()
    for number, record in enumerate([header, *records], 1):
        if not all(is_utf8(value) for column, value in enumerate(record) if column not in paths):
            raise ValueError(f"{path}: row {number} is not UTF-8 text; save the table as UTF-8")
        if any("\n" in value or "\r" in value for column, value in enumerate(record) if column not in paths):
            raise ValueError(
                f"{path}: row {number} has a line break in a label, or a quote that is closed in a later line; put a "
                "cell that begins with a quote in quotes, with each of its quotes doubled"
            )
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ValueError(f"{path}: has two columns {shown(twice)!r}; give each a name of its own")
    if "path" not in header:
        separated = "commas" if separator == "," else "tabs"
        raise ValueError(
            f"{path}: no column 'path' among {', '.join(header)}; separate columns by {separated} and name one 'path'"
        )
    if not records:
        raise ValueError(f"{path}: has no rows; add one line for each recording below the header")
    rows: dict[Path, Row] = {}
    for number, record in enumerate(records, 2):
        if len(record) != len(header):
            raise ValueError(f"{path}: row {number} has {len(record)} fields, but the header has {len(header)}")
        labels = dict(zip(header, record, strict=True))
        file = path.parent / labels.pop("path")
        if file in rows:
            raise ValueError(f"{path}: {shown(file)} is listed twice; remove one of its rows")
        rows[file] = Row(file, labels)
    return Table(str(path), tuple(rows.values()), rules)


def split_table(table: Table) -> tuple[Table, Table, Table]:
    """Divide a table into training, development and test parts of about 70, 15 and 15 % of its rows.

    A hash of the file name decides which part a row goes to. Recordings that share material (one session of a speaker,
    or overlapping cuts of the same audio) may end up in different parts.

    Args:
        table: Table to divide.

    Returns:
        Training, development and test tables; any of them may be empty if the table is small.
    """
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row in table.rows:
        share = int.from_bytes(hashlib.blake2b(encoded(row.path.name), digest_size=8).digest(), "big") / 2**64
        parts[0 if share < 0.7 else 1 if share < 0.85 else 2].append(row)
    names = ("training", "development", "test")
    train, dev, test = (
        Table(f"{table.name} ({name} rows)", tuple(rows), table.rules) for name, rows in zip(names, parts, strict=True)
    )
    return train, dev, test


def phones_of_digits(digits: str, *, where: str) -> str:
    """Return the phones of a string of English digits, separated by spaces.

    Args:
        digits: Digits 0 to 9; spaces are ignored.
        where: Table and row, as the prefix of an error message.

    Raises:
        ValueError: A character is not a digit.
    """
    foreign = sorted(set(digits.replace(" ", "")) - DIGIT_PHONES.keys())
    if foreign:
        raise ValueError(f"{where} has {foreign[0]!r} in column 'digits'; expected only digits and spaces")
    return " ".join(DIGIT_PHONES[digit] for digit in digits.replace(" ", ""))


class Symbols:
    """The symbols of CTC targets, numbered from 1; number 0 is CTC's blank.

    Args:
        labels: Labels of the training part, whose symbols are collected.
        separated: Whether symbols are separated by spaces ("S IH K S") or are single characters ("6174"). None means
            separated if any label contains a space.
    """

    def __init__(self, labels: Iterable[str], *, separated: bool | None = None) -> None:
        labels = list(labels)
        self.separated = any(" " in label.strip() for label in labels) if separated is None else separated
        self.names = sorted({name for label in labels for name in self._split(label)})
        self._numbers = {name: number for number, name in enumerate(self.names, 1)}

    def encode(self, label: str, *, where: str) -> list[int]:
        """Return the numbers of a label's symbols.

        Args:
            label: Label to encode.
            where: Table and row, as the prefix of an error message.

        Raises:
            ValueError: A symbol does not occur in the training part.
        """
        split = self._split(label)
        for name in split:
            if name not in self._numbers:
                raise ValueError(f"{where} has {name!r} in its label, which does not occur in the training part")
        return [self._numbers[name] for name in split]

    def _split(self, label: str) -> list[str]:
        return label.split() if self.separated else list(label.strip())


def fold_values(values: Sequence[str], size: int) -> list[list[str]]:
    """Group the distinct values of a column, in alphabetical order, into folds that are held out together.

    Args:
        values: Values of the column; may repeat.
        size: Number of distinct values per fold; values left over join the last fold.

    Raises:
        ValueError: The values do not make at least two folds, or `size` is less than 1.
    """
    distinct = sorted(set(values))
    if size < 1 or len(distinct) < 2 * size:
        raise ValueError(
            f"fold_size: must be from 1 to half the number of values ({len(distinct)}: {', '.join(distinct)}), so that "
            f"there are at least two folds; got {size}"
        )
    groups = [distinct[first : first + size] for first in range(0, len(distinct), size)]
    if len(groups[-1]) < size:
        groups[-2:] = [groups[-2] + groups[-1]]
    return groups
