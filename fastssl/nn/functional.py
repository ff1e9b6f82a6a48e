"""The forward of a speech encoder over packed frames, as functions of modules found by their attributes' names.

Our modules, those of Transformers and those of torchaudio name their parts alike (`q_proj`, `layer_norm`, ...), so one
forward serves all three. Where a part is plain PyTorch, our ops compute with its parameters, fused. Anything else (an
adapter in place of a linear layer, a subclass, a module with a hook) is called, on (N, C).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastssl import ops
from fastssl.nn.activation import sigmoid
from fastssl.nn.linear import PackedLinear, packed_linear
from fastssl.packing import Layout, Packed

#: Classes with the forward of `torch.nn.Linear`; the second is the output layer of `torch.nn.MultiheadAttention`.
_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
_PLAIN_WEIGHTS = (nn.Parameter, Tensor, type(None))  # not quantised, not sharded
#: Leaves hooks on the layers of any model that was once asked for hidden states or attention weights; they are inert.
_RECORDER = "transformers.utils.output_capturing"


def is_watched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's `forward`."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks or "forward" in vars(module):
        return True
    return any(getattr(hook, "__module__", None) != _RECORDER for hook in module._forward_hooks.values())


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is exactly of one of these classes, with ordinary weights, and not watched."""
    return type(module) in kinds and not is_watched(module) and type(getattr(module, "weight", None)) in _PLAIN_WEIGHTS


def linear(module: Any, x: Tensor) -> Tensor:
    """A linear layer, or whatever stands in its place."""
    if is_plain(module, *_LINEAR):
        return packed_linear(x, module.weight, module.bias)
    out: Tensor = module(x)
    return out


def dropout(module: Any, x: Tensor) -> Tensor:
    """A dropout module, skipped while it does nothing."""
    if is_plain(module, nn.Dropout) and _probability(module) == 0:
        return x
    out: Tensor = module(x)
    return out


def _probability(dropout: Any) -> float:
    return float(dropout.p) if dropout.training else 0.0


def add_and_norm(branch: Tensor, residual: Tensor, norm: Any, dropout: Any = None) -> Tensor:
    """`norm(residual + dropout(branch))`; `dropout=None` drops nothing."""
    if is_plain(norm, nn.LayerNorm) and (dropout is None or is_plain(dropout, nn.Dropout)):
        dropout_p = 0.0 if dropout is None else _probability(dropout)
        return ops.dropout_add_layer_norm(
            branch, residual, weight=norm.weight, bias=norm.bias, eps=norm.eps, dropout_p=dropout_p
        )
    out: Tensor = norm(residual + (branch if dropout is None else dropout(branch)))
    return out


def sum_and_norm(branch: Tensor, residual: Tensor, norm: Any, dropout: Any) -> tuple[Tensor, Tensor]:
    """`residual + dropout(branch)`, and its norm."""
    if is_plain(norm, nn.LayerNorm) and is_plain(dropout, nn.Dropout):
        dropout_p = _probability(dropout)
        normalised, total = ops.dropout_add_layer_norm(
            branch, residual, weight=norm.weight, bias=norm.bias, eps=norm.eps, dropout_p=dropout_p, prenorm=True
        )
        return total, normalised
    total = residual + dropout(branch)
    return total, norm(total)


def feed_forward(module: Any, x: Tensor) -> Tensor:
    """Two linear layers with GELU and dropout between them; not what `module` may drop of its output."""
    dense, dropout = module.intermediate_dense, module.intermediate_dropout
    plain = is_plain(dropout, nn.Dropout)
    if plain and _probability(dropout) == 0 and isinstance(dense, PackedLinear):
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
    """Self-attention within each sequence, (N, D), before its output layer.

    Args:
        module: Has `dropout`, the probability for attention probabilities in training.
        projected: Queries, keys and values, (N, H, E) each.
        layout: Where each sequence begins.
        distance_bias: (H, 2R + 1), see `ops.varlen_attention`.
        gate: (N, H), which a query's bias is multiplied by.
    """
    q, k, v = projected
    dropout_p = module.dropout if module.training else 0.0
    return ops.varlen_attention(q, k, v, layout, dropout_p=dropout_p, distance_bias=distance_bias, gate=gate).flatten(1)


def queries_keys_values(module: Any, x: Tensor) -> list[Tensor]:  # (N, D) -> three of (N, H, E)
    """Three linear layers, their outputs split over `num_heads`."""
    projections = (module.q_proj, module.k_proj, module.v_proj)
    return [linear(projection, x).unflatten(1, (module.num_heads, -1)) for projection in projections]


def gate(module: Any, x: Tensor) -> Tensor:  # (N, D) -> (N, H)
    """WavLM's gate of each query and head, from the query's own frame (arXiv 2110.13900, section III-B)."""
    heads = x.unflatten(1, (module.num_heads, -1)).flatten(0, 1)  # (N * H, E)
    # Summed, because Microsoft's WavLM stores the projection to two gates as four parts of each.
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
) -> tuple[Tensor, Tensor]:
    """Attention and feed-forward, each with dropout and a residual, and a norm before it or after.

    Args:
        layer: Has `layer_norm` and `dropout` of attention, and `final_layer_norm` of the feed-forward.
        x: (N, D).
        attention: (N, D) to (N, D).
        feed_forward: (N, D) to (N, D).
        output_dropout: The module that drops out the feed-forward's output.
        pre_norm: Norm before each block instead of after its residual.
        normalised: (N, D) what the first norm makes of `x`, from a caller who has it; with `pre_norm`.
        following: The norm that comes next, which is fused with the last residual; with `pre_norm`.

    Returns:
        The output (N, D), and what `following` makes of it: without one, the output again.
    """
    if not pre_norm:
        x = add_and_norm(attention(x), x, layer.layer_norm, layer.dropout)
        x = add_and_norm(feed_forward(x), x, layer.final_layer_norm, output_dropout)
        return x, x
    attended = attention(layer.layer_norm(x) if normalised is None else normalised)
    x, normalised = sum_and_norm(attended, x, layer.final_layer_norm, layer.dropout)
    branch = feed_forward(normalised)
    if following is not None:
        return sum_and_norm(branch, x, following, output_dropout)
    x = x + dropout(output_dropout, branch)
    return x, x


def front_end(conv_layers: Iterable[Any], x: Packed) -> Packed:
    """Strided convolutions with GELU, each a module with `conv` and perhaps `layer_norm`: (N, C_in) to (N_out, C)."""
    return Packed(*ops.strided_conv_stack(x.values, [conv_layer(module) for module in conv_layers], x.layout))


def conv_layer(module: Any) -> ops.StridedConvLayer:
    """A convolution and its norm as `ops.strided_conv_stack` takes them; a group norm has a group for each channel."""
    conv, norm = module.conv, getattr(module, "layer_norm", None)
    if norm is None:
        return ops.StridedConvLayer(conv.weight, conv.stride[0], conv.bias)
    kind: Literal["group", "layer"] = "group" if isinstance(norm, nn.GroupNorm) else "layer"
    return ops.StridedConvLayer(conv.weight, conv.stride[0], conv.bias, kind, norm.weight, norm.bias, norm.eps)


def normalise(module: Any, frames: Tensor) -> Tensor:  # (N, C) -> (N, C)
    """The layer norm of a module that may have none."""
    norm = getattr(module, "layer_norm", None)
    normalised: Tensor = frames if norm is None else norm(frames)
    return normalised


def project(projection: Any, normalised: Tensor) -> Tensor:  # (N, C) -> (N, D)
    """The front end's frames at the transformer's width: a linear layer, then dropout."""
    return dropout(projection.dropout, linear(projection.projection, normalised))


def positional_embedding(module: Any, x: Tensor, layout: Layout) -> Tensor:  # (N, D) -> (N, D)
    """A grouped convolution as long as its input, then GELU; or data2vec's `layers` of them, with norms between."""
    for block in getattr(module, "layers", [module]):
        x = ops.positional_conv(x, block.conv.weight, layout, bias=block.conv.bias)
        x = F.gelu(normalise(block, x))
    return x


def hidden_states(
    stack: Any, frames: Packed, layers: Iterable[Any], run: Callable[[Any, Tensor], Tensor], *, pre_norm: bool
) -> Iterator[Tensor]:
    """The input of the first layer, then the output of each layer, (N, D), for stacks that are not ours.

    `nn.Transformer` fuses two more sums with the norms that follow them. In somebody else's model that would change
    roundings, and which elements dropout drops.

    Args:
        stack: Has `pos_conv_embed`, `layer_norm` and `dropout`.
        frames: (N, D).
        layers: The layers that run. An iterator is asked for the next one after the last has run, so the random draws
            of layer drop keep their place among those of dropout.
        run: Calls a layer on (N, D).
        pre_norm: Whether `layer_norm` comes after the layers, where the caller applies it.
    """
    x = frames.values + positional_embedding(stack.pos_conv_embed, *frames)
    yield (x := dropout(stack.dropout, x if pre_norm else stack.layer_norm(x)))
    for layer in layers:
        yield (x := run(layer, x))


def kept_layers(stack: Any, generator: torch.Generator | None) -> list[bool]:
    """Whether each of a stack's `layers` runs this time: in training, each is skipped with probability `layer_drop`.

    Args:
        stack: Its layers and `layer_drop`.
        generator: CPU generator of the draws; None takes torch's own.
    """
    if not stack.training or stack.layer_drop <= 0:
        return [True] * len(stack.layers)
    kept: list[bool] = (torch.rand(len(stack.layers), generator=generator) >= stack.layer_drop).tolist()
    return kept
