"""Read settings in YAML that others may have written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fastssl.reading import MOST_LEVELS, printable, read_text

#: Most values in a file; the settings of a run have about 100.
_MOST_VALUES = 10_000


def read_yaml(path: Path, *, parse: Callable[[str], Any] = yaml.safe_load) -> dict[str, Any]:
    """Read the settings in a YAML file: plain values by name, without aliases.

    A few lines of aliases, each for a list of others, can stand for billions of values.

    Args:
        path: File to read.
        parse: Function that parses the text; it must not import or run what the text names.

    Returns:
        Settings by name; empty for an empty file.

    Raises:
        ValueError: The file cannot be read, is not valid YAML, has an alias or too many values, or is not a mapping.
    """
    text = read_text(path)
    try:
        _check(text)
        values = parse(text)
    except Exception as error:  # a tag such as !!timestamp may raise any error
        reason = " ".join(printable(error).replace("\\n", " ").split())
        raise ValueError(f"{path}: is not valid YAML: {reason}; correct the file") from None
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path}: must contain settings by name, got a {type(values).__name__}")
    return values


def _check(text: str) -> None:
    levels = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            line = 1 + event.start_mark.line  # type: ignore[union-attr]
            raise ValueError(f"line {line} has an alias (*{event.anchor}); write the value there")
        levels += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if levels > MOST_LEVELS:
            raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
        if count > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES} values")
