"""The forward pass of a speech encoder over packed frames: functions that take modules and find parts by name.

The modules of this package, of Transformers and of torchaudio use the same attribute names (`q_proj`, `layer_norm`,
...), so one forward pass serves all three. If a part is plain PyTorch, the fused ops of this package compute with its
parameters. Any other part (an adapter in place of a linear layer, a subclass, a module with a hook) is called on
frames (N, C).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.weight_norm import WeightNorm

from fastssl import ops
from fastssl.kernels.dispatch import norms_stay_wide
from fastssl.nn.activation import sigmoid
from fastssl.nn.linear import ORDINARY, PackedLinear, packed_linear, packed_linears
from fastssl.nn.prepacked import PrepackedConv, PrepackedLinear, PrepackedPositionalConv, prepacked_linears
from fastssl.packing import Layout, Packed

#: Classes whose forward is that of `torch.nn.Linear`; the second is the output layer of `torch.nn.MultiheadAttention`.
_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
_PLAIN_WEIGHTS = (*ORDINARY, type(None))  # not quantised, not sharded
#: A Transformers model that once returned hidden states or attention weights keeps hooks from this Python module. They
#: change nothing.
_RECORDER = "transformers.utils.output_capturing"


def is_watched(module: nn.Module) -> bool:
    """Return whether calling `module` does more than its class's `forward`: it has hooks or a replaced `forward`."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks or "forward" in vars(module):
        return True
    hooks = module._forward_hooks
    return bool(hooks) and not all(map(is_recorder, hooks.values()))


def is_recorder(hook: Any) -> bool:
    """Return whether a hook is one of Transformers' that records outputs and changes nothing."""
    return getattr(hook, "__module__", None) == _RECORDER


def is_watched_convolution(conv: nn.Module) -> bool:
    """Return whether calling a convolution does more than `is_watched` accepts and `convolution_weight` does."""
    if _weight_norm(conv) is None:
        return is_watched(conv)
    hooks = conv._forward_hooks.values()
    others = len(conv._forward_pre_hooks) > 1 or conv._backward_hooks or conv._backward_pre_hooks
    return bool(others) or "forward" in vars(conv) or not all(map(is_recorder, hooks))


def convolution_weight(conv: Any) -> Tensor:
    """Return the weight of a convolution, as a call would make it.

    A parametrisation makes it when it is read, but `torch.nn.utils.weight_norm` does so in a hook before a call.
    """
    norm = _weight_norm(conv)
    weight: Tensor = conv.weight if norm is None else norm.compute_weight(conv)
    return weight


def _weight_norm(conv: nn.Module) -> WeightNorm | None:
    for hook in conv._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight":
            return hook
    return None


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Return whether ops may compute in place of `module`.

    Args:
        module: Module to check.
        kinds: Classes whose computation the op reproduces; a subclass does not count.

    Returns:
        True if the type of `module` is one of `kinds`, its weight is an ordinary tensor (neither quantised nor
        sharded), and `is_watched` returns False.
    """
    if type(module) not in kinds or is_watched(module):
        return False
    # `getattr` is slow on a module without a weight, such as a dropout, because PyTorch first composes an error
    # message.
    places = (module._parameters, vars(module), module._buffers)
    return all(type(place["weight"]) in _PLAIN_WEIGHTS for place in places if "weight" in place)


def linear(module: Any, x: Tensor) -> Tensor:
    """Apply a linear layer, or the module that replaces it: (N, C_in) to (N, C_out)."""
    if is_plain(module, *_LINEAR):
        return packed_linear(x, module.weight, module.bias)
    out: Tensor = module(x)
    return out


def dropout(module: Any, x: Tensor) -> Tensor:
    """Apply a dropout module; skip a plain one that drops nothing."""
    if is_plain(module, nn.Dropout) and _probability(module) == 0:
        return x
    out: Tensor = module(x)
    return out


def _probability(dropout: Any) -> float:
    """Return the dropout probability of a module in its current mode: 0 in evaluation."""
    return float(dropout.p) if dropout.training else 0.0


def add_and_norm(branch: Tensor, residual: Tensor, norm: Any, dropout: Any = None) -> Tensor:
    """Compute `norm(residual + dropout(branch))`, fused if both modules are plain.

    Args:
        branch: (N, D) frames.
        residual: (N, D) frames, in the dtype of `branch` or in fp32.
        norm: Layer norm module.
        dropout: Dropout module; None drops nothing.

    Returns:
        (N, D) normalised frames in the dtype of `residual`; under CUDA autocast in fp32, see `wide`.
    """
    if _is_plain_norm(norm) and (dropout is None or is_plain(dropout, nn.Dropout)):
        dropout_p = 0.0 if dropout is None else _probability(dropout)
        return ops.dropout_add_layer_norm(
            branch, wide(residual), weight=norm.weight, bias=norm.bias, eps=norm.eps, dropout_p=dropout_p
        )
    out: Tensor = norm(residual + (branch if dropout is None else dropout(branch)))
    return out


def _is_plain_norm(norm: Any) -> bool:
    """Return whether the fused op computes a norm: a plain layer norm with weight and bias."""
    return is_plain(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def wide(x: Tensor) -> Tensor:
    """Return frames as `torch.nn.LayerNorm` returns them: in fp32 under CUDA autocast, else in their own dtype.

    The op of `add_and_norm` and `sum_and_norm` returns the norm in the dtype of its residual. In fp32, frames stay as
    exact as in plain PyTorch if they are an output or the next residual. Before a linear layer it does not matter,
    because the layer rounds them.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32)) if norms_stay_wide(x) else x


def sum_and_norm(branch: Tensor, residual: Tensor, norm: Any, dropout: Any = None) -> tuple[Tensor, Tensor]:
    """Return the sum `residual + dropout(branch)` and its norm, both (N, D); fused if both modules are plain.

    Both have the dtype of `residual`, which is that of `branch` or fp32. Without a dropout module, nothing is dropped.
    """
    if _is_plain_norm(norm) and (dropout is None or is_plain(dropout, nn.Dropout)):
        dropout_p = 0.0 if dropout is None else _probability(dropout)
        normalised, total = ops.dropout_add_layer_norm(
            branch, residual, weight=norm.weight, bias=norm.bias, eps=norm.eps, dropout_p=dropout_p, prenorm=True
        )
        return total, normalised
    total = residual + (branch if dropout is None else dropout(branch))
    return total, norm(total)


def feed_forward(module: Any, x: Tensor) -> Tensor:
    """Apply two linear layers with GELU and dropout between them.

    Args:
        module: Module with `intermediate_dense`, `intermediate_dropout` and `output_dense`. The caller applies any
            dropout of the output.
        x: (N, D) frames.

    Returns:
        (N, D) frames.
    """
    dense, dropout = module.intermediate_dense, module.intermediate_dropout
    plain = is_plain(dropout, nn.Dropout)
    if (
        plain
        and _probability(dropout) == 0
        and isinstance(dense, PackedLinear | PrepackedLinear)
        and not is_watched(dense)
    ):
        inner = dense.with_gelu(x)
    elif plain:
        inner = ops.bias_gelu_dropout(linear(dense, x), None, dropout_p=_probability(dropout))
    else:
        inner = dropout(F.gelu(linear(dense, x)))
    return linear(module.output_dense, inner)


def attend(
    module: Any,
    projected: Iterable[Tensor],
    layout: Layout,
    *,
    distance_bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Apply self-attention within each sequence, without the output layer.

    Args:
        module: Module with `dropout`, the dropout probability of the attention weights, used in training only.
        projected: Queries, keys and values, (N, H, E) each.
        layout: Where each sequence begins.
        distance_bias: (H, 2R + 1) bias of the logits by distance, see `ops.varlen_attention`.
        gate: (N, H) factor of the bias for each query and head.

    Returns:
        (N, D) frames, with the heads side by side.
    """
    q, k, v = projected
    dropout_p = module.dropout if module.training else 0.0
    return ops.varlen_attention(q, k, v, layout, dropout_p=dropout_p, distance_bias=distance_bias, gate=gate).flatten(1)


def queries_keys_values(module: Any, x: Tensor) -> list[Tensor]:  # (N, D) -> three of (N, H, E)
    """Return queries, keys and values: the outputs of `q_proj`, `k_proj` and `v_proj`, split over the heads."""
    projected = linears((module.q_proj, module.k_proj, module.v_proj), x)
    return [frames.unflatten(1, (module.num_heads, -1)) for frames in projected]


def linears(modules: Sequence[Any], x: Tensor) -> list[Tensor]:
    """Apply several linear layers, or the modules that replace them, to the same frames (N, C_in)."""
    if all(is_plain(module, *_LINEAR, PackedLinear) for module in modules):
        return packed_linears(x, modules)
    if all(isinstance(module, PrepackedLinear) and not is_watched(module) for module in modules):
        return prepacked_linears(x, modules)
    return [linear(module, x) for module in modules]


def gate(module: Any, x: Tensor) -> Tensor:  # (N, D) -> (N, H)
    """Compute the gate of each query and head from the query's own frame (WavLM, arXiv 2110.13900, section III-B).

    Args:
        module: Module with `num_heads`, `gru_rel_pos_linear` (E to 8) and `gru_rel_pos_const`, the names in
            WavLM's checkpoints.
        x: (N, D) frames.

    Returns:
        (N, H) factor of the distance bias.
    """
    heads = x.unflatten(1, (module.num_heads, -1)).flatten(0, 1)  # (N * H, E)
    # WavLM's projection has eight outputs: each of two gates is the sum of four.
    logits = linear(module.gru_rel_pos_linear, heads).unflatten(1, (2, 4)).sum(-1)
    first, second = sigmoid(logits).view(len(x), module.num_heads, 2).unbind(-1)
    gate: Tensor = first * (second * module.gru_rel_pos_const.view(-1) - 1.0) + 2.0
    return gate


def transformer_layer(
    layer: Any,
    x: Tensor,
    attention: Callable[[Tensor], Tensor],
    feed_forward: Callable[[Tensor], Tensor],
    output_dropout: Any,
    *,
    pre_norm: bool,
    normalised: Tensor | None = None,
    following: Any = None,
    last: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a transformer layer: attention and feed-forward, each with dropout, a residual and a layer norm.

    Args:
        layer: Module with `layer_norm` and `dropout` for the attention block, and `final_layer_norm` for the
            feed-forward block.
        x: (N, D) packed frames.
        attention: Function (N, D) to (N, D), the attention block.
        feed_forward: Function (N, D) to (N, D), the feed-forward block.
        output_dropout: Dropout module for the output of the feed-forward block.
        pre_norm: Whether to normalise the input of each block, instead of the sum of block and residual.
        normalised: (N, D) result of the layer's first norm on `x`, if the caller has it already; requires `pre_norm`.
        following: The norm that comes next, to fuse with the last residual sum; requires `pre_norm`.
        last: Whether the result of `following` is the output of the stack, rather than the input of a layer.

    Returns:
        The output (N, D), and the result of `following` on it (the output again if `following` is None).
    """
    if not pre_norm:
        x = add_and_norm(attention(x), x, layer.layer_norm, layer.dropout)
        x = add_and_norm(feed_forward(x), x, layer.final_layer_norm, output_dropout)
        return x, x
    attended = attention(layer.layer_norm(x) if normalised is None else normalised)
    x, normalised = sum_and_norm(attended, x, layer.final_layer_norm, layer.dropout)
    branch = feed_forward(normalised)
    if following is not None:
        return sum_and_norm(branch, wide(x) if last else x, following, output_dropout)
    x = x + dropout(output_dropout, branch)
    return x, x


def front_end(conv_layers: Iterable[Any], x: Packed) -> Packed:
    """Run a stack of strided convolutions with norm and GELU.

    Args:
        conv_layers: Modules with `conv`, and `layer_norm` if they have a norm.
        x: (N, C_in) packed frames or samples.

    Returns:
        (N_out, C) packed frames.
    """
    first, *others = modules = list(conv_layers)
    if others and all(isinstance(module.conv, PrepackedConv) for module in others):
        for module in others:
            module.conv.check(x.values)
        layers = [prepacked_conv_layer(module) for module in others]
        dtype = x.values.dtype if layers[0].weight.format == "fp32" else torch.bfloat16
        return Packed(*ops.prepacked_front_end(x.values, conv_layer(first), layers, x.layout, dtype=dtype))
    return Packed(*ops.strided_conv_stack(x.values, [conv_layer(module) for module in modules], x.layout))


def prepacked_conv_layer(module: Any) -> ops.PrepackedConvLayer:
    """Describe a module's convolution and layer norm for `ops.prepacked_front_end`.

    Args:
        module: Module whose `conv` is a `PrepackedConv`, and optionally with a layer norm `layer_norm`.
    """
    conv, norm = module.conv, getattr(module, "layer_norm", None)
    row_norm = None if norm is None else ops.RowNorm(norm.weight, norm.bias, norm.eps)
    return ops.PrepackedConvLayer(conv.packed, conv.stride[0], row_norm, conv.dtype)


def conv_layer(module: Any) -> ops.StridedConvLayer:
    """Describe a module's convolution and norm for `ops.strided_conv_stack`.

    Args:
        module: Module with `conv`, and optionally `layer_norm`: a layer norm, or a group norm with one group per
            channel.
    """
    conv, norm = module.conv, getattr(module, "layer_norm", None)
    weight = convolution_weight(conv)
    if norm is None:
        return ops.StridedConvLayer(weight, conv.stride[0], conv.bias)
    kind: Literal["group", "layer"] = "group" if isinstance(norm, nn.GroupNorm) else "layer"
    return ops.StridedConvLayer(weight, conv.stride[0], conv.bias, kind, norm.weight, norm.bias, norm.eps)


def normalise(module: Any, frames: Tensor) -> Tensor:  # (N, C) -> (N, C)
    """Apply the module's `layer_norm`; return the frames unchanged if it has none."""
    norm = getattr(module, "layer_norm", None)
    normalised: Tensor = frames if norm is None else norm(frames)
    return normalised


def project(projection: Any, normalised: Tensor) -> Tensor:  # (N, C) -> (N, D)
    """Project the front end's frames to the transformer's width: a linear layer, then dropout."""
    return dropout(projection.dropout, linear(projection.projection, normalised))


def positional_embedding(module: Any, x: Tensor, layout: Layout) -> Tensor:  # (N, D) -> (N, D)
    """Compute a positional embedding: a grouped convolution that keeps the length, then GELU.

    Args:
        module: Module with `conv`. Or module with `layers`, as in data2vec: a sequence of modules with `conv`, and with
            a `layer_norm` that comes before GELU.
        x: (N, D) frames.
        layout: Where each sequence begins.

    Returns:
        (N, D) frames.
    """
    for block in getattr(module, "layers", [module]):
        if isinstance(block.conv, PrepackedPositionalConv):
            frames = Packed(x, layout)
            norm = getattr(block, "layer_norm", None)
            x = block.conv.with_gelu(frames) if norm is None else F.gelu(norm(block.conv(frames)))
            continue
        x = ops.positional_conv(x, convolution_weight(block.conv), layout, bias=block.conv.bias)
        x = F.gelu(normalise(block, x))
    return x


def with_positions(stack: Any, frames: Packed, positions: Tensor | None = None) -> Tensor:  # (N, D) -> (N, D)
    """Return the frames plus their positional embedding.

    Args:
        stack: Another library's stack of layers, with `pos_conv_embed`.
        frames: (N, D) frames.
        positions: (N, D) embedding; None computes it.
    """
    return frames.values + (positional_embedding(stack.pos_conv_embed, *frames) if positions is None else positions)


def hidden_states(
    stack: Any, x: Tensor, layers: Iterable[Any], run: Callable[[Any, Tensor], Tensor], *, pre_norm: bool
) -> Iterator[Tensor]:
    """Yield the hidden states (N, D) of another library's stack of layers.

    `nn.transformer.Transformer` also fuses the residual sums with the norms that follow them. In a model of another
    library, this would change the rounding and the elements that dropout drops.

    Args:
        stack: Module with `layer_norm` and `dropout`.
        x: (N, D) packed frames, with their positional embedding.
        layers: The layers to run. If it is an iterator, the next layer is requested after the previous one has run, so
            that draws for layer drop and for dropout keep their order.
        run: Function that calls a layer on frames (N, D).
        pre_norm: Whether the layers normalise their inputs; the caller then applies `layer_norm` to the last output.
        positions: (N, D), the positional embedding of the frames; None computes it with `pos_conv_embed`.

    Yields:
        The input of the first layer, then the output of each layer.
    """
    yield (x := dropout(stack.dropout, x if pre_norm else stack.layer_norm(x)))
    for layer in layers:
        yield (x := run(layer, x))


def kept_layers(stack: Any, generator: torch.Generator | None) -> list[bool]:
    """Draw which layers of a stack run: in training, each is skipped with probability `layer_drop`.

    Args:
        stack: Module with `layers` and `layer_drop`.
        generator: CPU generator of the draws; None uses PyTorch's global one.

    Returns:
        One bool per layer, True if it runs.
    """
    if not stack.training or stack.layer_drop <= 0:
        return [True] * len(stack.layers)
    kept: list[bool] = (torch.rand(len(stack.layers), generator=generator, device="cpu") >= stack.layer_drop).tolist()
    return kept
