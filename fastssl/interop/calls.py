"""What an accelerated method keeps of the original's: its signature, documentation and ways to be called."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch


def as_original(original: Callable[..., Any], method: Callable[..., Any]) -> Any:
    """Return a method that has the signature, annotations and documentation of the original, and calls another one.

    Code that asks a model what it takes (`inspect.signature`, as in the `Trainer` of Transformers) gets the original's
    answer, and a call may give any parameter by position.

    Args:
        original: The original's method.
        method: Function of the module and of the original's arguments by name, as `**arguments`: those of the call,
            without defaults.

    Raises:
        TypeError: At a call with arguments that the original does not take.
    """
    signature = inspect.signature(original)
    names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    required = [name for name in names if signature.parameters[name].default is inspect.Parameter.empty]
    any_name = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = _by_name(names, args, kwargs)
        if given is None or any(name not in given for name in required) or not (any_name or set(given) <= set(names)):
            signature.bind(self, *args, **kwargs)  # raises the error that Python raises for such a call
            raise TypeError(f"{original.__qualname__}: called with other arguments than {signature}")
        return method(self, **given)

    vars(call)["__signature__"] = signature  # for what does not follow `__wrapped__`, as `inspect.getfullargspec`
    return call


def _by_name(names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return all arguments by name, or None if there are too many or one is given twice."""
    given = dict(zip(names, args, strict=False))
    if len(args) > len(names) or any(name in given for name in kwargs):
        return None
    return {**given, **kwargs}


def recorded_by(arguments: Iterable[Any]) -> str | None:
    """Return what records this call to run it again for other batches, or None.

    The lengths of a batch are numbers on the host. A recording would keep them as constants, without a word, and use
    them for every later batch.

    Args:
        arguments: Arguments of the call.
    """
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch.compiler.is_dynamo_compiling():
        return None
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch.onnx" if torch.onnx.is_in_onnx_export() else "torch.jit.trace"
    if any(isinstance(argument, torch.fx.Proxy) for argument in arguments):
        return "torch.fx"
    return "make_fx" if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None else None


def mapped_by() -> str | None:
    """Return what runs this call for each slice of its tensors at once, or None: slices cannot be packed."""
    if torch.compiler.is_dynamo_compiling() or not torch._C._are_functorch_transforms_active():
        return None
    functorch = torch._C._functorch
    levels = functorch.get_interpreter_stack() or ()
    return "torch.func.vmap" if any(level.key() == functorch.TransformType.Vmap for level in levels) else None
