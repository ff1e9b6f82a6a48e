"""Check that a settings file, which may be untrusted, contains only plain values of known options."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastssl.reading import brief, printable


def check_settings(path: Path, values: Mapping[str, Any], groups: Mapping[str, type[Any]]) -> None:
    """Check that all settings are plain values of known options.

    Otherwise, the command line's parser would import the module that a `class_path` names. It would also treat a string
    in place of a group as a class to import or another file to open.

    Args:
        path: The file, for error messages.
        values: Its settings.
        groups: For each group of options, its name -> the dataclass whose fields are the options.

    Raises:
        ValueError: A group is not a mapping or has an unknown option, or a value is neither a scalar nor a list of
            scalars.
    """
    for name, value in values.items():
        if name in groups:
            _check_group(path, name, value, groups[name])
        elif "." in str(name):
            raise ValueError(f"{path}: {printable(name)}: write options inside their group, not with a dot")
        elif not str(name).isprintable():  # the parser would print it
            raise ValueError(f"{path}: there is no option {printable(name)}; remove it")
        else:
            _check_value(path, str(name), value)


def check_arguments(arguments: Sequence[str], groups: Mapping[str, type[Any]]) -> None:
    """Check that no argument sets a whole group of options, because the parser would treat it as a file or a class.

    Args:
        arguments: The command's arguments, as typed.
        groups: As in `check_settings`.

    Raises:
        ValueError: An argument is `--GROUP` without an option of the group.
    """
    inside = {f"{name}.{option}" for name, config in groups.items() for option in groups_inside(config)}
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and name in groups.keys() | inside:
            raise ValueError(f"--{name}: is a group of options; set one (--{name}.OPTION), or use --config FILE")


def groups_inside(config: type[Any]) -> dict[str, type[Any]]:
    """Return the options of a group that are groups themselves, with their dataclasses.

    Args:
        config: Dataclass of the group.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}


def _check_group(path: Path, name: str, values: object, config: type[Any]) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: {name}: expected options by name, got {brief(values)}")
    known = [field.name for field in dataclasses.fields(config)]
    inside = groups_inside(config)
    for option, value in values.items():
        if option not in known:
            raise ValueError(f"{path}: {name} has no option {brief(option)}; choose from {', '.join(known)}")
        if option in inside:
            _check_group(path, f"{name}.{option}", value, inside[option])
        else:
            _check_value(path, f"{name}.{option}", value)


def _check_value(path: Path, name: str, value: object) -> None:
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str | int | float | None) for part in parts):
        raise ValueError(
            f"{path}: {printable(name)}: expected a number, text, true, false, null or a list of them, "
            f"got {brief(value)}"
        )
