"""Subclasses that accelerate another library's modules: create them, recognise them, and undo them.

An accelerated module belongs to a subclass of its original class, with the same name and some methods replaced.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from fastssl.interop import wrapped
from fastssl.models.folder import ACCELERATED_COMPRESSOR

#: Attribute that only accelerated modules have: how group norms treat padding, "valid" or "padded".
NORM = "_fastssl_norm"
#: Attribute that only accelerated modules have: whether modules that the original only reads are called.
CALLS = "_fastssl_calls"


class AcceleratedClasses:
    """Accelerated subclasses of another library's classes; `isinstance`, pickling and copying still work on them.

    Args:
        home: Name of the Python module where pickle finds the subclasses; its `__getattr__` must be `by_name`.
        sources: For each original class, its name -> the name of the Python module that defines it.
        methods: Function from an original class to the attributes that its subclass replaces.
        check: Function that raises ValueError if a module has an unsupported part; None accepts every module.
        width: Function from an encoder to the width D of its frames; None if the classes are not encoders.
        layers: Function from an encoder to its transformer layers; None if the classes are not encoders.
    """

    def __init__(
        self,
        home: str,
        sources: Mapping[str, str],
        methods: Callable[[type[nn.Module]], dict[str, Any]],
        *,
        check: Callable[[Any], None] | None = None,
        width: Callable[[Any], int] | None = None,
        layers: Callable[[Any], Iterable[Any]] | None = None,
    ) -> None:
        self.home = home
        self.sources = sources
        self.methods = methods
        self.check = check
        self.width = width
        self.layers = layers
        self._made: dict[type[nn.Module], type[nn.Module]] = {}
        self._own: dict[type[nn.Module], dict[str, Any]] = {}  # the methods that a subclass replaces

    def original(self, module: nn.Module) -> Any:
        """Return the original class of a module, accelerated or not, or None if the class is not in `sources`."""
        # A user's subclass may have its own forward, so only accelerated subclasses are traced back to their base.
        candidates = type(module).__mro__ if hasattr(type(module), NORM) else (type(module),)
        for cls in candidates:
            if self.sources.get(cls.__name__) == cls.__module__:
                return cls
        return None

    def put_on(self, module: nn.Module, norm: str, calls: bool) -> None:
        """Accelerate a module in place by changing its class.

        Args:
            module: Instance of one of the classes, accelerated or not.
            norm: "valid" or "padded", as in `accelerate`.
            calls: `call_projections` of `accelerate`.
        """
        original = self.original(module)
        subclass, methods = self._subclass(original), self._own[original]
        replacements = {one: own for name, own in methods.items() for one in wrapped.chain(getattr(original, name))}
        wrapped.put_in(module, methods, replacements)
        module.__class__ = subclass
        setattr(module, NORM, norm)
        setattr(module, CALLS, calls)

    def hidden(self, module: nn.Module) -> str | None:
        """Return the name of a method that hides the accelerated one, because it is not known to call the original."""
        original = self.original(module)
        self._subclass(original)
        methods = self._own[original]
        originals = [one for name in methods for one in wrapped.chain(getattr(original, name))]
        return wrapped.hiding(module, methods, [*originals, *methods.values()])

    def take_off(self, module: nn.Module) -> None:
        """Restore the original class of a module in place and drop its compressor; leaves other modules unchanged."""
        original = self.original(module)
        if original is not None and hasattr(type(module), NORM):
            module.__class__ = original
            methods = self._own[original]
            wrapped.take_out(module, methods, {own: getattr(original, name) for name, own in methods.items()})
            for attribute in (NORM, CALLS):
                vars(module).pop(attribute, None)
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
            namespace: dict[str, Any] = {"__module__": self.home, "__qualname__": name, "__doc__": original.__doc__}
            # A class attribute, so that instances that the class itself creates, as in `from_pretrained`, have it too.
            namespace |= {NORM: "valid", CALLS: False}
            namespace |= _answers_of(original)
            methods = self.methods(original)
            scripted = methods if "__prepare_scriptable__" in methods else ()  # TorchScript follows `__wrapped__`, too
            for method, function in methods.items():
                function.__name__ = method  # by which pickle finds a bound method
                # `Accelerator.unwrap_model` puts what it finds at the end of `__wrapped__` on the model.
                function.__signature__ = inspect.signature(function)
                if method not in scripted:
                    vars(function).pop("__wrapped__", None)
            self._made[original] = type(name, (original,), methods | namespace)
            self._own[original] = {name: one for name, one in methods.items() if hasattr(original, name)}
        return self._made[original]


#: Class methods of Transformers' models that decide by the Python module of the class, and set weights or settings.
_BY_MODULE = ("is_custom_code", "_can_set_attn_implementation", "_can_set_experts_implementation")


def _answers_of(original: Any) -> dict[str, Any]:
    """Return those class methods for a subclass, with the answers of the original, whose code it is."""

    def answer(name: str) -> Any:
        return classmethod(lambda cls: getattr(original, name)())

    return {name: answer(name) for name in _BY_MODULE if hasattr(original, name)}
