"""An accelerated module is of a subclass of its class with the same name and other methods: made, found and undone."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastssl.models.folder import ACCELERATED_COMPRESSOR

#: What an accelerated module has of its own: how group norms treat padding.
NORM = "_fastssl_norm"


class AcceleratedClasses:
    """Subclasses of another library's classes, which `isinstance`, pickling and copying take for the original.

    Args:
        home: The Python module where pickle finds them; its `__getattr__` has to be `by_name`.
        sources: Name of a class -> the Python module that it is from.
        methods: Class -> what is other in its subclass.
        check: Raises ValueError if a module has a part that is not served.
        width: Of an encoder's frames, D; None if the classes are not encoders.
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
        """The class that a module is of, accelerated or not; None for one that is not known."""
        # A subclass of somebody else has a forward of its own, perhaps; ours are marked.
        candidates = type(module).__mro__ if hasattr(type(module), NORM) else (type(module),)
        for cls in candidates:
            if self.sources.get(cls.__name__) == cls.__module__:
                return cls
        return None

    def put_on(self, module: nn.Module, norm: str) -> None:
        """Give a module of one of the classes our methods."""
        module.__class__ = self._subclass(self.original(module))
        setattr(module, NORM, norm)

    def take_off(self, module: nn.Module) -> None:
        """Give a module its own methods back, if it has ours."""
        original = self.original(module)
        if original is not None and hasattr(type(module), NORM):
            module.__class__ = original
            vars(module).pop(NORM, None)
            if hasattr(module, ACCELERATED_COMPRESSOR):
                delattr(module, ACCELERATED_COMPRESSOR)

    def by_name(self, name: str) -> type[nn.Module]:
        """The accelerated class of this name."""
        if name not in self.sources:
            raise AttributeError(f"module {self.home!r} has no attribute {name!r}")
        return self._subclass(getattr(importlib.import_module(self.sources[name]), name))

    def _subclass(self, original: type[nn.Module]) -> type[nn.Module]:
        if original not in self._made:
            name = original.__name__
            namespace = {"__module__": self.home, "__qualname__": name, "__doc__": original.__doc__}
            # An instance that the class itself makes, as `from_pretrained` does, has it too.
            namespace[NORM] = "valid"
            self._made[original] = type(name, (original,), self.methods(original) | namespace)
        return self._made[original]
