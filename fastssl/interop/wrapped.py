"""Run an accelerated method inside what others have put in its place on the module itself.

`Accelerator.prepare` (autocast, fp8), Accelerate's device hooks, `functools.partial` and many scripts store a `forward`
on a module, which hides the one of its class. Such a wrapper refers to the method that it wraps: in a closure, in an
attribute, or in an attribute of the module. Here, wrappers are built again with another method in that place. The given
ones never change, because a copy of the module may share them.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

#: Attribute of an accelerated module that had methods of its own: their names -> (what was there, what is there now).
REPLACED = "_fastssl_replaced"
#: Where Accelerate keeps the method that its `forward` calls, or the one that it puts back.
KEPT_BY_ACCELERATE = ("_old_forward", "_original_forward")
_DEEPEST = 30


def chain(function: Any) -> list[Any]:
    """Return a function and the functions that it wraps, by `__wrapped__`."""
    found = [function]
    while (inner := getattr(found[-1], "__wrapped__", None)) is not None and len(found) < _DEEPEST:
        found.append(inner)
    return found


def put_in(module: nn.Module, methods: Iterable[str], replacements: Mapping[Any, Any]) -> None:
    """Replace functions in the wrappers that a module has as attributes of its own, and remember what was there.

    Args:
        module: Module to change.
        methods: Names of the methods that wrappers may hide.
        replacements: Function of a class -> the function that wrappers should call instead.
    """
    replaced = dict(vars(module).get(REPLACED, {}))
    for name in _names(module, methods):
        old = vars(module)[name]
        new = _Rebuilt(module, replacements).of(old)
        if new is not old:
            vars(module)[name] = new
            first, last = replaced.get(name, (None, None))
            replaced[name] = (first if old is last else old), new
    if replaced:
        vars(module)[REPLACED] = replaced


def take_out(module: nn.Module, methods: Iterable[str], replacements: Mapping[Any, Any]) -> None:
    """Undo `put_in`: put back what was there, or replace functions in wrappers that came later.

    Args:
        module: Module to change.
        methods: Names of the methods that wrappers may hide.
        replacements: Function that `put_in` has put in -> the function of the class.
    """
    replaced = vars(module).pop(REPLACED, {})
    for name in _names(module, methods):
        old, new = replaced.get(name, (None, None))
        current = vars(module)[name]
        vars(module)[name] = _Rebuilt(module, replacements).of(old if current is new else current)


def hiding(module: nn.Module, methods: Iterable[str], functions: Iterable[Any]) -> str | None:
    """Return the name of a method that the module has as an attribute of its own and that calls none of `functions`."""
    wanted = dict.fromkeys(functions)
    for name in methods:
        if name in vars(module):
            search = _Rebuilt(module, wanted)
            # A hook of Accelerate calls `module._old_forward`.
            places = (name, *KEPT_BY_ACCELERATE[:1]) if hasattr(module, "_hf_hook") else (name,)
            for place in places:
                search.of(vars(module).get(place))
            if not search.found:
                return name
    return None


def _names(module: nn.Module, methods: Iterable[str]) -> list[str]:
    return [name for name in (*methods, *KEPT_BY_ACCELERATE) if name in vars(module)]


class _Rebuilt:
    """Wrappers of a module's methods, with other functions in place of some."""

    def __init__(self, module: nn.Module, replacements: Mapping[Any, Any]) -> None:
        self.module = module
        self.replacements = replacements
        self.found = False
        self._begun: list[Any] = []  # a function may refer to itself

    def of(self, value: Any) -> Any:
        """Return `value`, or a copy of it if it is, or calls, one of the functions to replace."""
        if isinstance(value, FunctionType) and value in self.replacements:
            self.found = True
            return self.replacements[value] or value
        known = isinstance(value, (FunctionType, MethodType, partial)) or _is_wrapper(value)
        if not known or len(self._begun) > _DEEPEST or any(value is one for one in self._begun):
            return value
        self._begun.append(value)
        try:
            return self._copy(value)
        finally:
            self._begun.pop()

    def _copy(self, value: Any) -> Any:
        if isinstance(value, MethodType):
            if value.__self__ is not self.module:
                return value
            function = self.of(value.__func__)
            return value if function is value.__func__ else MethodType(function, value.__self__)
        attributes = {name: self.of(one) for name, one in vars(value).items()}
        same = all(one is vars(value)[name] for name, one in attributes.items())
        if isinstance(value, partial):
            function, arguments = self.of(value.func), [self.of(one) for one in value.args]
            keywords = {name: self.of(one) for name, one in value.keywords.items()}
            pairs = zip([function, *arguments], [value.func, *value.args], strict=True)
            if (
                same
                and all(a is b for a, b in pairs)
                and all(keywords[name] is one for name, one in value.keywords.items())
            ):
                return value
            new: Any = type(value)(function, *arguments, **keywords)
        elif isinstance(value, FunctionType):
            cells = tuple(self._cell(cell) for cell in value.__closure__ or ())
            if same and all(a is b for a, b in zip(cells, value.__closure__ or (), strict=True)):
                return value
            itself = CellType()
            cells = tuple(itself if _content(cell) is value else cell for cell in cells)
            new = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells or None)
            itself.cell_contents = new
            new.__kwdefaults__, new.__qualname__ = value.__kwdefaults__, value.__qualname__
            new.__module__, new.__doc__, new.__annotations__ = value.__module__, value.__doc__, value.__annotations__
        elif same:
            return value
        else:
            new = object.__new__(type(value))
        vars(new).update(attributes)
        return new

    def _cell(self, cell: CellType) -> CellType:
        content = _content(cell)
        new = self.of(content)
        return cell if new is content else CellType(new)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _is_wrapper(value: Any) -> bool:
    """Return whether an object with attributes can be called, as Accelerate's `ConvertOutputsToFp32`."""
    return callable(value) and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module))
