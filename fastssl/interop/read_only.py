"""Modules that an original encoder only reads: it computes with their weights and biases, and never calls them.

An adapter or a hook on such a module does nothing in the original. Accelerated encoders read these modules too, so that
they compute the same. `accelerate(model, call_projections=True)` has them call those that can be called.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from fastssl.interop.classes import CALLS
from fastssl.nn import functional as F
from fastssl.nn.linear import packed_linear, packed_linears
from fastssl.nn.prepacked import PrepackedLinear

#: Class of attention -> names of its parts that the original only reads.
READ_ONLY = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),  # Transformers
    "WavLMSelfAttention": ("attention",),  # torchaudio; it calls `attention.out_proj`
}
#: Those whose parts are linear layers, which may be called instead.
_CALLABLE = ("WavLMAttention",)
#: Modules that a warning has named.
_named: WeakSet[nn.Module] = WeakSet()


def read_only(layers: Iterable[Any]) -> Iterator[nn.Module]:
    """Yield the modules of an encoder's layers that the original only reads."""
    for layer in layers:
        for part in READ_ONLY.get(_kind(layer), ()):
            yield getattr(layer.attention, part)


def _kind(layer: Any) -> str:
    """Return the name of the class of a layer's attention; layers of a Conformer have it by another name."""
    return type(getattr(layer, "attention", None)).__name__


def check_callable(model: nn.Module, layers: Iterable[Any]) -> None:
    """Raise ValueError if `call_projections` asks for what nothing can call."""
    for layer in layers:
        if (name := _kind(layer)) in READ_ONLY and name not in _CALLABLE:
            raise ValueError(
                f"call_projections: {type(model).__module__}.{type(model).__name__} with {name} has its queries', "
                "keys' and values' weights in one parameter, so there is no module to call; leave the option out"
            )


def _ignored(layers: Iterable[Any]) -> list[nn.Module]:
    """Return the modules that do more than their weights say, but are only read: adapters, hooks."""
    return [module for module in read_only(layers) if _does_more(module)]


def warn_once(model: nn.Module, layers: Iterable[Any], *, again: bool = False, stacklevel: int = 3) -> None:
    """Warn of adapters and hooks on modules that the original only reads.

    Args:
        model: The encoder, accelerated.
        layers: Its layers.
        again: Whether to also warn of modules that a warning has named already.
        stacklevel: As in `warnings.warn`.
    """
    found = [module for module in _ignored(layers) if again or module not in _named]
    if not found:
        return
    _named.update(found)
    names, kind = _names(model, found), type(model).__name__
    if getattr(model, CALLS):
        message = (
            f"call_projections: {names} have adapters (LoRA) or hooks, which the original {kind} ignores, because it "
            "only reads the weights of these modules. They are called here; what they learn has no effect after "
            "`fastssl.restore`, in the original library, or where the original code runs, unless you merge it into "
            "the weights first (PEFT: `merge_and_unload`)"
        )
    else:
        message = (
            f"{names} have adapters (LoRA) or hooks, which have no effect: {kind} only reads the weights of these "
            "modules and never calls them, and accelerated it computes the same. "
        )
        message += (
            "To train such adapters, use `fastssl.accelerate(model, call_projections=True)`"
            if any(_kind(layer) in _CALLABLE for layer in layers)
            else "Put adapters on other modules, such as the feed-forward layers"
        )
    warnings.warn(message, stacklevel=stacklevel)


def lost(model: nn.Module, layers: Iterable[Any]) -> str | None:
    """Say what the original code leaves out, of a model that calls its projections; None if nothing."""
    found = _ignored(layers) if getattr(model, CALLS, False) else []
    if not found:
        return None
    return (
        f"the original {type(model).__name__} ignores the adapters (LoRA) or hooks on {_names(model, found)}, which "
        "were called because of call_projections=True"
    )


def queries_keys_values(module: Any, x: Tensor) -> list[Tensor]:  # (N, D) -> three of (N, H, E)
    """Return queries, keys and values by the weights of `q_proj`, `k_proj` and `v_proj`, which are not called."""
    projections = [module.q_proj, module.k_proj, module.v_proj]
    if isinstance(module.q_proj, PrepackedLinear):
        return F.queries_keys_values(module, x)
    return [frames.unflatten(1, (module.num_heads, -1)) for frames in packed_linears(x, projections)]


def output(module: Any, x: Tensor) -> Tensor:  # (N, D) -> (N, D)
    """Apply the output layer by its weights; it is not called."""
    if isinstance(module.out_proj, PrepackedLinear):
        return F.linear(module.out_proj, x)
    return packed_linear(x, module.out_proj.weight, module.out_proj.bias)


def _does_more(module: nn.Module) -> bool:
    """Return whether calling a module does more than its weights and its class's `forward` in PyTorch."""
    plain = type(module).forward in (nn.Linear.forward, nn.MultiheadAttention.forward, PrepackedLinear.forward)
    return not plain or F.is_watched(module)


def _names(model: nn.Module, found: list[nn.Module]) -> str:
    first, *rest = (name for name, module in model.named_modules() if any(module is one for one in found))
    return f"{first} and {len(rest)} more" if rest else first
