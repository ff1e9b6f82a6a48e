"""Subclasses that accelerate another library's modules: create them, recognise them, and undo them.

An accelerated module belongs to a subclass of its class, with the same name and some methods replaced. If its class is
itself a subclass of the library's class, the replaced methods come between the two, where `super()` finds them.
"""

import copyreg
import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from types import FunctionType, new_class
from typing import Any

from torch import Tensor, nn

from fastssl.interop import wrapped
from fastssl.interop.call_through import INDEX_BY_FSDP
from fastssl.models.folder import ACCELERATED_COMPRESSOR
from fastssl.nn.prepacked import check_stays

#: Attribute that only accelerated modules have: how group norms treat padding, "valid" or "padded".
NORM = "_fastssl_norm"
#: Attribute that only accelerated modules have: whether modules that the original only reads are called.
CALLS = "_fastssl_calls"
#: Attribute that only accelerated classes have: the `AcceleratedClasses` that made them.
_MAKER = "_fastssl_maker"


class AcceleratedClasses:
    """Accelerated subclasses of another library's classes; `isinstance`, pickling and copying still work on them.

    Args:
        home: Name of the Python module where pickle finds the subclasses; its `__getattr__` must be `by_name`.
        sources: For each original class, its name -> the name of the Python module that defines it.
        methods: Function from an original class to the attributes that its subclass replaces.
        check: Function that raises ValueError if a module has an unsupported part; None accepts every module.
        width: Function from an encoder to the width D of its frames; None if the classes are not encoders.
        layers: Function from an encoder to its transformer layers; None if the classes are not encoders.
        not_called: Names of methods that the originals' code calls and the accelerated methods do not; see `replaced`.
        trains: Whether the accelerated code also runs in training mode.
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
        not_called: Collection[str] = (),
        trains: bool = True,
    ) -> None:
        self.home = home
        self.sources = sources
        self.methods = methods
        self.check = check
        self.width = width
        self.layers = layers
        self.not_called = not_called
        self.trains = trains
        self._made: dict[type[nn.Module], type[nn.Module]] = {}
        self._plain: dict[type[nn.Module], type[nn.Module]] = {}  # from accelerated classes to those they accelerate
        self._own: dict[type[nn.Module], dict[str, Any]] = {}  # the methods that a subclass replaces

    def original(self, module: nn.Module) -> Any:
        """Return the class in `sources` that a module belongs to, itself or by a subclass, or None if there is none."""
        return self._source(type(module))

    def _source(self, kind: type[nn.Module]) -> Any:
        return next((cls for cls in kind.__mro__ if self.sources.get(cls.__name__) == cls.__module__), None)

    def put_on(self, module: nn.Module, norm: str, calls: bool) -> None:
        """Accelerate a module in place by changing its class.

        Args:
            module: Instance of one of the classes, accelerated or not.
            norm: "valid" or "padded", as in `accelerate`.
            calls: `call_projections` of `accelerate`.
        """
        original, kind = self.original(module), type(module)
        subclass = kind if hasattr(kind, NORM) else self._subclass(kind)
        self._subclass(original)
        methods = self._own[original]
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
        kinds = (original, type(module))
        called = [one for name in methods for kind in kinds for one in wrapped.chain(getattr(kind, name))]
        return wrapped.hiding(module, methods, [*called, *methods.values()])

    def overridden(self, module: nn.Module) -> str | None:
        """Return the name of a method that a subclass of the original overrides without a call of `super()`, or None.

        The accelerated method is then never called.
        """
        original = self.original(module)
        self._subclass(original)
        subclasses = type(module).__mro__[: type(module).__mro__.index(original)]
        for name in self._own[original]:
            for kind in subclasses:
                own = None if kind in self._plain else vars(kind).get(name)
                if own is not None and not any(map(_uses_super, wrapped.chain(own))):
                    return name
        return None

    def replaced(self, module: nn.Module) -> str | None:
        """Return the name of a method in `not_called` that a subclass or the module itself replaces, or None."""
        original = self.original(module)
        for name in self.not_called:
            expected = self._own[original].get(name, getattr(original, name, None))
            if name in vars(module) or getattr(type(module), name, None) is not expected:
                return name
        return None

    def plain(self, kind: type[nn.Module]) -> type[nn.Module]:
        """Return the class of a module as it would be without acceleration.

        Args:
            kind: Class of a module. It may have been made from an accelerated one, as by FSDP2's `fully_shard`.
        """
        if kind in self._plain or not hasattr(kind, NORM):
            return self._plain.get(kind, kind)
        namespace = {name: one for name, one in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        if any(map(_uses_super, namespace.values())):  # written by hand, so it cannot be made again
            return self._source(kind)  # type: ignore[no-any-return]
        bases = tuple(self.plain(base) for base in kind.__bases__)
        self._plain[kind] = new_class(kind.__name__, bases, {}, lambda body: body.update(namespace))
        return self._plain[kind]

    def take_off(self, module: nn.Module) -> None:
        """Restore the original class of a module in place and drop its compressor; leaves other modules unchanged."""
        original = self.original(module)
        if original is not None and hasattr(type(module), NORM):
            module.__class__ = self.plain(type(module))
            self._subclass(original)
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

    def _subclass(self, kind: type[nn.Module]) -> type[nn.Module]:
        """Return the accelerated class for a class in `sources`, or for a subclass of one."""
        if kind not in self._made:
            original = self._source(kind)
            made = self._of_original(kind) if kind is original else self._of_subclass(kind, self._subclass(original))
            self._made[kind], self._plain[made] = made, kind
        return self._made[kind]

    def _of_original(self, original: type[nn.Module]) -> type[nn.Module]:
        name = original.__name__
        namespace: dict[str, Any] = {"__module__": self.home, "__qualname__": name, "__doc__": original.__doc__}
        # A class attribute, so that instances that the class itself creates, as in `from_pretrained`, have it too.
        namespace |= {NORM: "valid", CALLS: False, _MAKER: self}
        namespace |= _answers_of(original)
        namespace["_apply"] = _apply_of(original)
        methods = self.methods(original)
        scripted = methods if "__prepare_scriptable__" in methods else ()  # TorchScript follows `__wrapped__`, too
        for method, function in methods.items():
            function.__name__ = method  # by which pickle finds a bound method
            # `Accelerator.unwrap_model` puts what it finds at the end of `__wrapped__` on the model.
            function.__signature__ = inspect.signature(function)
            if method not in scripted:
                vars(function).pop("__wrapped__", None)
        self._own[original] = {name: one for name, one in methods.items() if hasattr(original, name)}
        return type(name, (original,), methods | namespace)

    def _of_subclass(self, kind: type[nn.Module], accelerated: type[nn.Module]) -> type[nn.Module]:
        made: Any

        def reduce(self: Any, protocol: int) -> Any:
            """Have pickle find the class by the two that it was made from."""
            reduced: Any = super(made, self).__reduce_ex__(max(protocol, 2))
            if type(self) is made and reduced[:2] == (copyreg.__newobj__, (made,)):  # type: ignore[attr-defined]
                return _instance, (accelerated, kind), *reduced[2:]
            return reduced  # the class says itself how to pickle it

        namespace: dict[str, Any] = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        namespace["__reduce_ex__"] = reduce
        if hasattr(kind, INDEX_BY_FSDP):
            namespace[INDEX_BY_FSDP] = getattr(kind, INDEX_BY_FSDP) + 1
        made = new_class(kind.__name__, (kind, accelerated), {}, lambda body: body.update(namespace))
        return made  # type: ignore[no-any-return]


def original_class(model: nn.Module) -> type[nn.Module]:
    """Return the class of Transformers that an accelerated encoder's class is derived from."""
    return next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))


def maker_of(module: nn.Module) -> AcceleratedClasses:
    """Return what made the class of an accelerated module."""
    maker: AcceleratedClasses = getattr(type(module), _MAKER)
    return maker


def _instance(accelerated: Any, kind: type[nn.Module]) -> nn.Module:
    """Return an empty module of an accelerated class, for pickle.

    Args:
        accelerated: The accelerated class of the library's class.
        kind: Subclass of the library's class.
    """
    subclass: Any = getattr(accelerated, _MAKER)._subclass(kind)
    module: nn.Module = object.__new__(subclass)
    return module


def _uses_super(value: Any) -> bool:
    """Return whether a value is a function that contains `super()`."""
    code = getattr(value, "__code__", None) if isinstance(value, FunctionType) else None
    return code is not None and ("__class__" in code.co_freevars or "super" in code.co_names)


def _apply_of(original: Any) -> Callable[..., Any]:
    """Return `_apply` for a subclass, which refuses to move or cast a module with prepacked layers as a whole."""

    @functools.wraps(original._apply)
    def _apply(self: Any, fn: Callable[[Tensor], Tensor], *args: Any, **options: Any) -> Any:
        check_stays(self, fn)
        return original._apply(self, fn, *args, **options)

    found: Any = _apply
    found.__signature__ = inspect.signature(original._apply)
    vars(found).pop("__wrapped__")  # as of the other methods
    return found  # type: ignore[no-any-return]


#: Class methods of Transformers' models that decide by the Python module of the class, and set weights or settings.
_BY_MODULE = ("is_custom_code", "_can_set_attn_implementation", "_can_set_experts_implementation")


def _answers_of(original: Any) -> dict[str, Any]:
    """Return those class methods for a subclass, with the answers of the original, whose code it is."""

    def answer(name: str) -> Any:
        return classmethod(lambda cls: getattr(original, name)())

    return {name: answer(name) for name in _BY_MODULE if hasattr(original, name)}
