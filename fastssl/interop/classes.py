"""Subclasses that accelerate another library's modules: create them, recognise them, and undo them.

An accelerated module belongs to a subclass of its original class, with the same name and some methods replaced.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastssl.models.folder import ACCELERATED_COMPRESSOR

#: Attribute that only accelerated modules have: how group norms treat padding, "valid" or "padded".
NORM = "_fastssl_norm"


class AcceleratedClasses:
    """Accelerated subclasses of another library's classes; `isinstance`, pickling and copying still work on them.

    Args:
        home: Name of the Python module where pickle finds the subclasses; its `__getattr__` must be `by_name`.
        sources: For each original class, its name -> the name of the Python module that defines it.
        methods: Function from an original class to the attributes that its subclass replaces.
        check: Function that raises ValueError if a module has an unsupported part; None accepts every module.
        width: Function from an encoder to the width D of its frames; None if the classes are not encoders.
    """

    def __init__(
        self,
        home: str,
        sources: Mapping[str, str],
        methods: Callable[[type[nn.Module]], dict[str, Any]],
        *,
        check: Callable[[Any], None] | None = None,
        width: Callable[[Any], int] | None = None,
    ) -> None:
        self.home = home
        self.sources = sources
        self.methods = methods
        self.check = check
        self.width = width
        self._made: dict[type[nn.Module], type[nn.Module]] = {}

    def original(self, module: nn.Module) -> Any:
        """Return the original class of a module, accelerated or not, or None if the class is not in `sources`."""
        # A user's subclass may have its own forward, so only accelerated subclasses are traced back to their base.
        candidates = type(module).__mro__ if hasattr(type(module), NORM) else (type(module),)
        for cls in candidates:
            if self.sources.get(cls.__name__) == cls.__module__:
                return cls
        return None

    def put_on(self, module: nn.Module, norm: str) -> None:
        """Accelerate a module in place by changing its class.

        Args:
            module: Instance of one of the classes, accelerated or not.
            norm: "valid" or "padded", as in `accelerate`.
        """
        module.__class__ = self._subclass(self.original(module))
        setattr(module, NORM, norm)

    def take_off(self, module: nn.Module) -> None:
        """Restore the original class of a module in place and drop its compressor; leaves other modules unchanged."""
        original = self.original(module)
        if original is not None and hasattr(type(module), NORM):
            module.__class__ = original
            vars(module).pop(NORM, None)
            if hasattr(module, ACCELERATED_COMPRESSOR):
                delattr(module, ACCELERATED_COMPRESSOR)

    def by_name(self, name: str) -> type[nn.Module]:
        """Return the accelerated class with this name; imports the library that defines the original.

        Raises:
            AttributeError: The name is not in `sources`.
        """
        if name not in self.sources:
            raise AttributeError(f"module {self.home!r} has no attribute {name!r}")
        return self._subclass(getattr(importlib.import_module(self.sources[name]), name))

    def _subclass(self, original: type[nn.Module]) -> type[nn.Module]:
        if original not in self._made:
            name = original.__name__
            namespace = {"__module__": self.home, "__qualname__": name, "__doc__": original.__doc__}
            # A class attribute, so that instances that the class itself creates, as in `from_pretrained`, have it too.
            namespace[NORM] = "valid"
            self._made[original] = type(name, (original,), self.methods(original) | namespace)
        return self._made[original]
