"""A linear layer whose output for a row does not depend on the number of other rows."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import ops
from fastssl.kernels import gemm
from fastssl.kernels.autograd import is_transformed, once_differentiable
from fastssl.kernels.dispatch import norms_stay_wide

Model = TypeVar("Model", bound=nn.Module)


class _Linear(torch.autograd.Function):
    """A linear layer with autograd that uses `kernels.gemm` for its three matrix products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return gemm.nt(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            gemm.nn(grad_out, weight) if needs_x else None,
            gemm.tn(grad_out, x) if needs_weight else None,
            grad_out.sum(0) if needs_bias else None,
        )


class _CastLinear(torch.autograd.Function):
    """Linear layers of the same input as one product, with copies of their parameters in autocast's dtype.

    The gradients of the parameters and of an fp32 input are fp32 at once. Those of `F.linear` would be rounded to
    autocast's dtype first, and then cast, each in a launch of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, count: int, x: Tensor, weight_copy: Tensor, bias_copy: Tensor | None, *parameters: Tensor | None
    ) -> Any:  # (N, C_out) for one layer, else a tuple of `count`; `parameters` has all weights, then all biases
        lower = x.to(weight_copy.dtype)
        ctx.save_for_backward(lower, weight_copy)
        ctx.dtype, ctx.count = x.dtype, count
        out = F.linear(lower, weight_copy, bias_copy)
        if count == 1:
            return out
        # One copy for all layers, because kernels want contiguous tensors and would copy each of them.
        return out.unflatten(1, (count, -1)).transpose(0, 1).contiguous().unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor | None, ...]:
        lower, weight_copy = ctx.saved_tensors
        _, needs_x, _, _, *needed = ctx.needs_input_grad
        needed_by_kind = needed[: ctx.count], needed[ctx.count :]
        grad_out = grads_out[0] if ctx.count == 1 else torch.cat(grads_out, 1)
        grad_x = _product(grad_out, weight_copy, ctx.dtype) if needs_x else None
        grad_weight = _product(grad_out.t(), lower, torch.float32) if any(needed_by_kind[0]) else None
        grad_bias = grad_out.sum(0, dtype=torch.float32) if any(needed_by_kind[1]) else None
        grads = []
        for grad, needs in zip((grad_weight, grad_bias), needed_by_kind, strict=True):
            parts = [None] * ctx.count if grad is None else grad.chunk(ctx.count)
            grads += [part if need else None for part, need in zip(parts, needs, strict=True)]
        return None, grad_x, None, None, *grads


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply matrices of autocast's dtype; on a GPU, an fp32 product is neither rounded before nor cast."""
    if x.device.type == "cuda" and dtype == torch.float32:
        return torch.mm(x, y, out_dtype=dtype)
    return (x @ y).to(dtype)


#: Names of linear layers that have the same input if they are in the same module: `packed_linears` computes them as one
#: product.
_SAME_INPUT = ("q_proj", "k_proj", "v_proj")
#: Classes of parameters whose values are theirs alone: those of others are parts of a tensor, or have another format.
ORDINARY: tuple[type[Tensor], ...] = (nn.Parameter, Tensor)


class _Copies(threading.local):
    """Copies in autocast's dtype that `casts_together` made in this thread: another one may use another stream."""

    def __init__(self) -> None:
        #: By the ids of the parameters, whose copies follow each other; empty outside `casts_together`.
        self.by_ids: dict[tuple[int, ...], Tensor] = {}


_copies = _Copies()


@contextmanager
def casts_together(module: nn.Module) -> Iterator[None]:
    """Return a context in which the linear layers of a module are cast for autocast in one launch, not one by one.

    Without autocast, on the CPU and inside `torch.compile`, nothing changes. Layers do not use the copies where saved
    tensors have hooks (`torch.autograd.graph.saved_tensors_hooks`), as under activation checkpointing: it computes them
    again outside this context, and must save the same tensors there. Parameters must not change inside the context.

    Args:
        module: Module whose linear layers `packed_linear` and `packed_linears` compute.
    """
    groups = [] if torch.compiler.is_compiling() or casts_are_shared() else _groups_to_cast(module)
    if not groups:
        yield
        return
    device = groups[0][0].device
    sizes = [-(-sum(one.numel() for one in group) // _ALIGNMENT) * _ALIGNMENT for group in groups]
    with torch.no_grad():
        buffer = torch.empty(sum(sizes), dtype=torch.get_autocast_dtype(device.type), device=device)
        copies: dict[tuple[int, ...], Tensor] = {}
        for part, group in zip(buffer.split(sizes), groups, strict=True):
            shape = torch.Size((sum(len(one) for one in group), *group[0].shape[1:]))
            whole = part[: shape.numel()].view(shape)
            copies[_key(group)] = whole
            own = whole.split([len(one) for one in group])
            copies |= {_key([one]): copy for one, copy in zip(group, own, strict=True)}
        single = [one for group in groups for one in group]
        torch._foreach_copy_([copies[_key([one])] for one in single], single)
    _copies.by_ids.update(copies)
    try:
        yield
    finally:
        _copies.by_ids.clear()


def casts_are_shared() -> bool:
    """Return whether the code runs inside `casts_together`, with copies that are freed at its end."""
    return bool(_copies.by_ids)


def _groups_to_cast(module: nn.Module) -> list[list[Tensor]]:
    """Return the groups of `_groups` that autocast would cast: ordinary tensors on the device of the first one."""
    first = next(module.parameters(), None)
    if first is None or not _is_cast(first.device.type):
        return []
    return [group for group in _groups(module) if all(_is_ordinary(one, first.device) for one in group)]


def _is_ordinary(parameter: Tensor, device: torch.device) -> bool:
    """Return whether a parameter is on a device, and neither sharded nor quantised."""
    return parameter.device == device and type(parameter) in ORDINARY


def _groups(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield the parameters of the linear layers of a module, those of layers with the same input in one group."""
    seen: set[int] = set()
    for part in module.modules():
        layers = [child for name in _SAME_INPUT if isinstance(child := part._modules.get(name), nn.Linear)]
        groups: tuple[list[Tensor], ...] = [layer.weight for layer in layers], [layer.bias for layer in layers]
        for group in groups:
            if len(group) == len(_SAME_INPUT) and _can_join(group) and seen.isdisjoint(map(id, group)):
                seen.update(map(id, group))
                yield group
    for part in module.modules():
        for one in part.parameters(recurse=False) if isinstance(part, nn.Linear) else ():
            if one.dtype == torch.float32 and id(one) not in seen:
                seen.add(id(one))
                yield [one]


def _can_join(group: Sequence[Tensor | None]) -> bool:
    """Return whether parameters are different fp32 tensors of the same shape, of a size that keeps copies aligned."""
    tensors = [one for one in group if one is not None and one.dtype == torch.float32]
    alike = len({one.shape for one in tensors}) == 1 and len({id(one) for one in tensors}) == len(group)
    return alike and tensors[0].numel() % _LEAST_ALIGNMENT == 0


def _key(parameters: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(map(id, parameters))


def _is_cast(device: str) -> bool:
    return device != "cpu" and torch.is_autocast_enabled(device)


#: Copies begin at multiples of this many elements, because fast matrix products need aligned pointers.
_ALIGNMENT = 64
#: Within a group, they begin at multiples of this many (16 bytes), below which a product gets slow.
_LEAST_ALIGNMENT = 8


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply `torch.nn.functional.linear` to packed frames; on the CPU, a frame gets the same bits in any batch.

    Args:
        x: (N, C_in) packed frames.
        weight: (C_out, C_in) weight.
        bias: (C_out,) bias, or None.

    Returns:
        (N, C_out) in the dtype of `x`, or in autocast's dtype under autocast.
    """
    if (cast := _by_copies(x, [weight], [bias])) is not None:
        return cast[0]
    if _by_onednn(x, weight):
        out: Tensor = _Linear.apply(x, weight, bias)
        return out
    rows = x.shape[0]
    if rows >= gemm.STABLE_ROWS or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    padded = F.pad(x, (0, 0, 0, gemm.STABLE_ROWS - rows))
    return F.linear(padded, weight, bias)[:rows]


def packed_linears(x: Tensor, layers: Sequence[nn.Linear]) -> list[Tensor]:
    """Apply several linear layers to the same packed frames, as `packed_linear` applies one.

    Inside `casts_together`, the layers `q_proj`, `k_proj` and `v_proj` of a module are one product: on a GPU, one large
    product is faster than three, forward and backward.

    Args:
        x: (N, C_in) packed frames.
        layers: Linear layers with weights (C_out, C_in), in the order q, k, v.

    Returns:
        (N, C_out) for each layer, contiguous.
    """
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if (cast := _by_copies(x, weights, biases)) is not None:
        return cast
    if norms_stay_wide(x):
        x = x.to(torch.get_autocast_dtype("cuda"))  # autocast would convert it, and keep it, once per layer
    return [packed_linear(x, layer.weight, layer.bias) for layer in layers]


def _by_copies(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor] | None:
    """Compute layers as one product with copies of their parameters; return None if there are none side by side."""
    if not _copies.by_ids or torch.compiler.is_compiling():
        return None
    if not torch.is_autocast_enabled(x.device.type) or _is_recorded() or is_transformed():
        return None
    weight_copy = _copies.by_ids.get(_key(weights))
    given = [bias for bias in biases if bias is not None]
    bias_copy = _copies.by_ids.get(_key(given))
    if weight_copy is None or len(given) not in (0, len(biases)) or (given and bias_copy is None):
        return None
    out = _CastLinear.apply(len(weights), x, weight_copy, bias_copy, *weights, *biases)
    return [out] if len(weights) == 1 else list(out)


def _is_recorded() -> bool:
    """Return whether tensors that are saved for the backward pass have hooks, as under activation checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether the products of a layer call oneDNN directly."""
    direct = weight.dtype == x.dtype and not torch.is_autocast_enabled("cpu") and gemm.takes_onednn(x)
    return direct and not is_transformed()


class PackedLinear(nn.Linear):
    """`torch.nn.Linear` over packed frames; on the CPU, a frame gets the same bits in any batch.

    Tools that look for exact types do not find it; see `with_plain_linears`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: (N, in_features) to (N, out_features)."""
        return packed_linear(input, self.weight, self.bias)

    def with_gelu(self, input: Tensor) -> Tensor:
        """Apply the layer, then GELU: (N, in_features) to (N, out_features).

        If oneDNN computes the product and neither autograd nor a hook needs the value before GELU, oneDNN applies GELU
        as part of the product.
        """
        watched = torch.is_grad_enabled() or self._forward_pre_hooks or self._forward_hooks
        if _by_onednn(input, self.weight) and not watched:
            return gemm.nt(input, self.weight, self.bias, gelu=True)
        return ops.bias_gelu_dropout(self(input), None)


def with_plain_linears(model: Model) -> Model:
    """Turn the linear layers of an encoder into plain `torch.nn.Linear`, in place, for tools that know no subclass.

    `torch.ao.quantization.quantize_dynamic` and torchao look for exact types, and would leave the layers as they are
    without a word. An encoder computes the same with plain layers, up to rounding. Names and parameters stay.

    Args:
        model: One of this package's encoders, or any module that contains one.

    Returns:
        The same model.
    """
    for module in model.modules():
        if type(module) is PackedLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return model
