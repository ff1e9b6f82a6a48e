"""Bounds on the fields of a config: declared on the field, and checked when the config is made."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

_HOLDS: dict[str, Callable[[Any, Any], bool]] = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
    "one of": lambda value, choices: value in choices,
}


class Declared(NamedTuple):
    """A field of a config as its class declares it."""

    name: str
    hint: Any
    bounds: Mapping[str, Any]  # "at least", "above", "at most", "below" or "one of" -> the limit, or the choices


def bounded(
    default: T,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
) -> T:
    """A field of a config dataclass with bounds, which `check_bounds` checks.

    Args:
        default: The field's default.
        least: The smallest value allowed; of a list, for every entry.
        above: Values must be greater than this one.
        most: The largest value allowed.
        below: Values must be less than this one.
        choices: The texts allowed.
    """
    bounds = {"at least": least, "above": above, "at most": most, "below": below, "one of": choices}
    return field(default=default, metadata={word: limit for word, limit in bounds.items() if limit is not None})


def declared(config: type[Any]) -> tuple[Declared, ...]:
    """The fields of a config class; a field that is declared again with a new default keeps its bounds."""
    hints = get_type_hints(config)
    found = []
    for name in (each.name for each in fields(config)):
        versions = (getattr(base, "__dataclass_fields__", {}).get(name) for base in config.__mro__)
        bounds: Mapping[str, Any] = next((version.metadata for version in versions if version and version.metadata), {})
        found.append(Declared(name, hints[name], bounds))
    return tuple(found)


def check_bounds(config: Any, prefix: str = "") -> None:
    """Check the type and the bounds of every field; floats must be finite.

    Args:
        config: The config to check.
        prefix: Goes before the names of fields in errors, such as "data.".

    Raises:
        ValueError: A value is not of its field's type, or out of its bounds; names the field.
    """
    for name, hint, bounds in declared(type(config)):
        value = getattr(config, name)
        if not _is_of(value, hint):
            raise ValueError(f"{prefix}{name}: must be {_describe(hint)}, got {value!r}")
        null = ", or null" if type(None) in get_args(hint) else ""
        for entry in value if isinstance(value, tuple) else (value,):
            if isinstance(entry, float) and not math.isfinite(entry):
                raise ValueError(f"{prefix}{name}: must be finite, got {entry}")
            if entry is None or (isinstance(entry, str) and "one of" not in bounds):
                continue
            if not all(_HOLDS[word](entry, limit) for word, limit in bounds.items()):
                wanted = " and ".join(f"{word} {_show(limit)}" for word, limit in bounds.items())
                raise ValueError(f"{prefix}{name}: must be {wanted}{null}, got {entry!r}")


def _is_of(value: object, hint: Any) -> bool:
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return value in arguments
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple) or (arguments[-1] is not ... and len(value) != len(arguments)):
            return False
        return all(_is_of(entry, arguments[0]) for entry in value)
    if is_dataclass(hint):
        return isinstance(value, hint)  # type: ignore[arg-type]
    if arguments:  # of a union
        return any(_is_of(value, argument) for argument in arguments)
    return type(value) in ((int, float) if hint is float else (hint,))


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {_show(get_args(hint))}"
    if get_origin(hint) is tuple:
        return f"a list of type {get_args(hint)[0].__name__}"
    return f"of type {getattr(hint, '__name__', hint)}"


def _show(limit: Any) -> str:
    return ", ".join(limit) if isinstance(limit, tuple) else str(limit)
