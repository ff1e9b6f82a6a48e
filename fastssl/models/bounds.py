"""Bounds on the fields of config dataclasses: `bounded` declares them, and `check_bounds` checks a config."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from fastssl.reading import brief

T = TypeVar("T")

#: Largest integer and longest list in any config. Larger ones come from damaged files, and overflow later.
_LARGEST, _LONGEST = 1 << 32, 1024

_HOLDS: dict[str, Callable[[Any, Any], bool]] = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
    "one of": lambda value, choices: value in choices,
}


class Declared(NamedTuple):
    """A field of a config dataclass.

    Attributes:
        name: Name of the field.
        hint: Type of the field.
        bounds: Each limit by its kind: "at least", "above", "at most", "below" or "ceiling" with a number, "one of"
            with the allowed strings. Empty if the field has no bounds.
    """

    name: str
    hint: Any
    bounds: Mapping[str, Any]


def bounded(
    default: T,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    ceiling: int | None = None,
    choices: Sequence[str] | None = None,
) -> T:
    """Declare a field of a config dataclass with bounds, which `check_bounds` checks.

    If the value is a list, the bounds apply to each entry.

    Args:
        default: Default of the field.
        least: Smallest value allowed.
        above: The value must be greater than this.
        most: Largest value allowed.
        below: The value must be less than this.
        ceiling: A value above this comes from a damaged file, because no model has one; only errors about it name it.
        choices: Allowed strings.

    Returns:
        The result of `dataclasses.field`; type checkers see a value of the same type as `default`.
    """
    bounds: dict[str, Any] = {"at least": least, "above": above, "at most": most, "below": below}
    bounds |= {"ceiling": ceiling, "one of": choices}
    return field(default=default, metadata={word: limit for word, limit in bounds.items() if limit is not None})


def declared(config: type[Any]) -> tuple[Declared, ...]:
    """List the fields of a config class. A subclass that only changes a field's default keeps the field's bounds.

    Args:
        config: A dataclass whose fields may be declared with `bounded`.

    Returns:
        The fields in the order of `dataclasses.fields`.
    """
    hints = get_type_hints(config)
    found = []
    for name in (each.name for each in fields(config)):
        versions = (getattr(base, "__dataclass_fields__", {}).get(name) for base in config.__mro__)
        bounds: Mapping[str, Any] = next((version.metadata for version in versions if version and version.metadata), {})
        found.append(Declared(name, hints[name], bounds))
    return tuple(found)


def check_bounds(config: Any, prefix: str = "") -> None:
    """Check the type and the bounds of every field, and that no number is infinite or larger than any config needs.

    Args:
        config: The config to check, an instance of a dataclass.
        prefix: Text before the field's name in error messages, such as "data.".

    Raises:
        ValueError: A value has the wrong type, is out of bounds, or is NaN or infinite. The message names the field.
    """
    for name, hint, bounds in declared(type(config)):
        value = getattr(config, name)
        if not _is_of(value, hint):
            raise ValueError(f"{prefix}{name}: must be {_describe(hint)}, got {brief(value)}")
        if isinstance(value, tuple) and len(value) > _LONGEST:
            raise ValueError(f"{prefix}{name}: must have at most {_LONGEST} entries, got {len(value)}")
        null = ", or null" if type(None) in get_args(hint) else ""
        for entry in value if isinstance(value, tuple) else (value,):
            if isinstance(entry, float) and not math.isfinite(entry):
                raise ValueError(f"{prefix}{name}: must be finite, got {entry}")
            if entry is None or (isinstance(entry, str) and "one of" not in bounds):
                continue
            shown = {word: limit for word, limit in bounds.items() if word != "ceiling"}
            if not all(_HOLDS[word](entry, limit) for word, limit in shown.items()):
                wanted = " and ".join(f"{word} {_show(limit)}" for word, limit in shown.items())
                raise ValueError(f"{prefix}{name}: must be {wanted}{null}, got {brief(entry)}")
            ceiling = bounds.get("ceiling", _LARGEST)
            if isinstance(entry, int) and abs(entry) > ceiling:
                raise ValueError(f"{prefix}{name}: must be at most {ceiling}, got {brief(entry)}")


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
    if arguments:  # a union, such as `int | None`
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
