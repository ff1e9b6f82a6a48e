"""Build a model without its numbers, to see what it would cost before it is built."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)


class _Unfilled(TorchFunctionMode):
    """Skips functions that fill tensors: on the meta device, they import PyTorch's compiler, which takes seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name.endswith("_") and not name.endswith("__"):
            return args[0] if args else kwargs["tensor"]  # the functions of `nn.init` pass it by name
        if func is torch.norm_except_dim:  # from weight norm
            weight, _, dim = args
            return weight.new_empty([size if axis == dim else 1 for axis, size in enumerate(weight.shape)])
        return func(*args, **kwargs)


def skeleton(build: Callable[[], Model]) -> Model:
    """Build a model on the meta device: its tensors have shapes but no memory, and no random number is drawn.

    Args:
        build: Function that builds the model.

    Returns:
        The model.

    Raises:
        ValueError: The sizes are too large for any tensor, or the model would not fit into the machine's memory.
    """
    try:
        with torch.device("meta"), _Unfilled():
            model = build()
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"its sizes are too large to build: {str(error).partition(chr(10))[0]}") from None
    needed = sum(4 * parameter.numel() for parameter in model.parameters())
    if needed > (memory := physical_memory()):
        raise ValueError(
            f"it would take {needed / 1e9:.3g} GB, more than this machine's memory of {memory / 1e9:.3g} GB"
        )
    return model


def physical_memory() -> int:
    """Return the size of the machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
