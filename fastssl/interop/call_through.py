"""Run packed code in the place of a module that a tool has wrapped: FSDP2, activation checkpointing, `torch.compile`.

Accelerated encoders read the parts of layers instead of calling the layers. Where FSDP2 holds the parameters of a layer
(`fully_shard`), its hooks must still run around the code that reads them, because only in between are they whole. These
hooks look at no shapes. A hook of anybody else may, and would get packed frames; then the original code runs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fastssl.nn import functional as F

#: Attribute of a class that FSDP2 made: the index of the module's own class in its method resolution order.
INDEX_BY_FSDP = "_orig_cls_mro_index"
#: Python modules of hooks that `call` runs.
_FSDP = ("torch.distributed.fsdp._fully_shard", "torch.distributed._composable.replicate_with_fsdp")
#: Wrappers: the name under which a wrapper keeps its module -> the Python module of the wrapper's class.
_COMPILED, _CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"
_WRAPPERS = {
    _COMPILED: "torch._dynamo.eval_frame",
    _CHECKPOINTED: "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
}


def call(module: nn.Module, function: Callable[..., Any], *tensors: Any) -> Any:
    """Call a function within everything that tools have put around a module.

    Gradients, unsharding and checkpoints see only what is among the positional arguments and results, so each tensor
    that may need a gradient belongs there. What `torch.compile` made of the module is left out: the packed code is not
    compiled.

    Args:
        module: Module in whose place the function runs.
        function: Function of `tensors`.
        tensors: Positional arguments.

    Returns:
        The result of the function, which FSDP2 may have cast.
    """
    wrapper = _wrapper(module)
    if wrapper == _COMPILED:
        return call(_inner(module, wrapper), function, *tensors)
    if wrapper == _CHECKPOINTED:
        checkpoint: Any = getattr(module, "checkpoint_fn")  # noqa: B009
        function = partial(checkpoint, partial(call, _inner(module, wrapper), function))
    if not (module._forward_pre_hooks or module._forward_hooks):
        return function(*tensors)
    return _within_hooks(module, function, tensors)


def _within_hooks(module: nn.Module, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    options: dict[str, Any] = {}
    for key, hook in [*module._forward_pre_hooks.items()]:
        if _is_of_fsdp(hook):
            if key in module._forward_pre_hooks_with_kwargs:
                arguments, options = hook(module, arguments, options) or (arguments, options)
            else:
                arguments = hook(module, arguments) or arguments
    result = function(*arguments)
    for key, hook in [*module._forward_hooks.items()]:
        if _is_of_fsdp(hook):
            named = (options,) if key in module._forward_hooks_with_kwargs else ()
            changed = hook(module, arguments, *named, result)
            result = result if changed is None else changed
    return result


def unwrapped(module: nn.Module) -> Any:
    """Return the module within wrappers that `call` knows."""
    while wrapper := _wrapper(module):
        module = _inner(module, wrapper)
    return module


def without_wrappers(name: str) -> str:
    """Return the name of a submodule without the names of wrappers that `call` knows."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_watched(module: nn.Module) -> bool:
    """Return whether a module or a wrapper around it has a hook that `call` does not run, or a replaced `forward`."""
    wrapper = _wrapper(module)
    hooks = {**module._forward_pre_hooks, **module._forward_hooks}
    if any(_is_of_fsdp(hook) for hook in hooks.values()) or wrapper == _COMPILED:
        others = [hook for hook in hooks.values() if not _is_of_fsdp(hook) and not F.is_recorder(hook)]
        replaced = wrapper != _COMPILED and "forward" in vars(module)
        watched = bool(others or module._backward_hooks or module._backward_pre_hooks or replaced)
    else:
        watched = F.is_watched(module)
    return watched or (wrapper is not None and is_watched(_inner(module, wrapper)))


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module without that which FSDP2 put before it."""
    index: int = getattr(type(module), INDEX_BY_FSDP, 0)
    return type(module).__mro__[index]


def _wrapper(module: nn.Module) -> str | None:
    """Return the name under which a module keeps the one that it wraps, if `call` knows such wrappers."""
    for name, home in _WRAPPERS.items():
        if name in module._modules and own_class(module).__module__ == home:
            return name
    return None


def _inner(wrapper: nn.Module, name: str) -> nn.Module:
    module = wrapper._modules[name]
    assert module is not None
    return module


def _is_of_fsdp(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith(_FSDP)
