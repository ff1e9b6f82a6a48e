"""Turn an encoder into one for inference on the CPU, whose weights are laid out beforehand in fp32, bf16 or int8."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastssl.kernels.prepacked_conv.op import multiplies_bytes
from fastssl.kernels.prepacked_conv.weights import FORMATS, Format, prepack
from fastssl.models.folder import check_finite
from fastssl.nn import functional
from fastssl.nn.compression import SequenceCompressor
from fastssl.nn.linear import PackedLinear
from fastssl.nn.prepacked import (
    Prepacked,
    PrepackedConv,
    PrepackedLinear,
    PrepackedPositionalConv,
    names_of_norm,
    weight_of,
)

Model = TypeVar("Model", bound=nn.Module)
#: Linear layers whose outputs are only factors of further products, and so in bf16 unless the format is "fp32".
_FEED_PRODUCTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "intermediate_dense")
#: Linear layers that stay as they are: too narrow to matter, or a head.
_KEPT = ("gru_rel_pos_linear", "aux")
#: Convolutions of the front end that "int8" computes in bytes: the largest ones. The others are in bf16.
_INT8_CONVOLUTIONS = (1, 2)


def check_format(format: object) -> None:
    """Check the argument `inference` of the public functions.

    Raises:
        ValueError: It is not the name of a format, or this processor cannot multiply bytes.
    """
    if format not in FORMATS:
        raise ValueError(f"inference: must be one of {', '.join(FORMATS)}, or None, got {format!r}")
    if format == "int8" and not multiplies_bytes():
        raise ValueError(
            "inference: int8 needs a processor with the instructions AVX512-VNNI and the compiled module _C_cpu, and "
            "one of them is missing here; use 'bf16' or 'fp32'"
        )


def prepack_encoder(encoder: Model, format: Format, weights: Mapping[str, Tensor] | None = None) -> Model:
    """Replace the linear layers and convolutions of an encoder by prepacked ones, in place and one at a time.

    In "int8", the positional convolution, most of the front end and the attention are in bf16. Layer norms, the sums of
    residuals and the first convolution are in fp32 in any format. Layers with hooks, and those of other classes, such
    as LoRA's and what they wrap, stay as they are; so does a compressor.

    Args:
        encoder: Encoder of this package, or an accelerated one. Its tensors may be on the meta device if `weights` is
            given.
        format: "fp32", "bf16" or "int8".
        weights: All tensors of the encoder's state dict by name; None takes the encoder's own.

    Returns:
        The same encoder. Its parameters are in fp32 on the CPU and need no gradients.

    Raises:
        ValueError: The format is unknown, or cannot be computed with on this processor; or the encoder's own weights
            are not finite, which "int8" cannot hold.
    """
    check_format(format)
    if format == "int8" and weights is None:  # before the first layer is replaced
        check_finite(encoder.state_dict().items(), name=f"inference: {type(encoder).__name__}")
    left = dict(encoder.state_dict() if weights is None else weights)
    lower = torch.float32 if format == "fp32" else torch.bfloat16
    halves: Format = "fp32" if format == "fp32" else "bf16"

    def take(path: str) -> dict[str, Tensor]:
        names = [name for name in left if name.startswith(f"{path}.")]
        return {name.removeprefix(f"{path}."): left.pop(name).detach().float() for name in names}

    def put(parent: nn.Module, name: str, layer: Prepacked) -> None:
        setattr(parent, name, layer.instead_of(getattr(parent, name)))

    for path, index, last, block in list(_front_end(encoder)):
        own, by_bytes = take(f"{path}.conv"), format == "int8" and index in _INT8_CONVOLUTIONS
        packed = prepack(own["weight"], own.get("bias"), format="int8" if by_bytes else halves)
        put(block, "conv", PrepackedConv(packed, stride=block.conv.stride[0], dtype=torch.float32 if last else lower))
    for path, block in list(_positional(encoder)):
        names, own = names_of_norm(block.conv), take(f"{path}.conv")
        packed = prepack(weight_of(own), own.get("bias"), format=halves, groups=block.conv.groups)
        put(block, "conv", PrepackedPositionalConv(packed, names))
    for path, parent, name in list(_linear(encoder)):
        own, dtype = take(path), lower if name in _FEED_PRODUCTS else torch.float32
        put(parent, name, PrepackedLinear(prepack(own["weight"], own.get("bias"), format=format), dtype=dtype))
    for path, module in encoder.named_modules():
        for name, parameter in list(module._parameters.items()):
            key = f"{path}.{name}" if path else name
            if parameter is None:
                continue
            found = left.pop(key, parameter).detach()
            if found.is_meta:  # the mask vector of a model that does not store one, as `Encoder` initialises it
                found = torch.rand(found.shape, device="cpu")
            if parameter.is_meta or parameter.dtype != torch.float32:
                module._parameters[name] = nn.Parameter(found.to("cpu", torch.float32, copy=True))
    return encoder.requires_grad_(False)


def is_prepacked(encoder: nn.Module) -> bool:
    """Return whether an encoder has a prepacked layer."""
    return any(isinstance(module, Prepacked) for module in encoder.modules())


def unpack_encoder(encoder: nn.Module) -> None:
    """Undo `prepack_encoder` in place; weights keep the values that the encoder computed with."""
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Prepacked):
                setattr(module, name, child.restored())


def _front_end(encoder: nn.Module) -> Iterator[tuple[str, int, bool, Any]]:
    """Yield path, index and module of each convolution of front ends but the first, and whether it is the last one."""
    for path, module in encoder.named_modules():
        blocks = list(getattr(module, "conv_layers", ()))
        plain = len(blocks) > 1 and all(_is_plain(block.conv, nn.Conv1d) for block in blocks[1:])
        if plain and blocks[0].conv.in_channels == 1:
            for index, block in enumerate(blocks[1:], 1):
                yield f"{path}.conv_layers.{index}", index, block is blocks[-1], block


def _positional(encoder: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield path and module of each positional convolution."""
    for path, module in encoder.named_modules():
        embedding: Any = module._modules.get("pos_conv_embed")
        stacked = getattr(embedding, "layers", None)
        blocks = {"": embedding} if stacked is None else {f".layers.{index}": one for index, one in enumerate(stacked)}
        for name, block in blocks.items():
            conv: Any = getattr(block, "conv", None)
            plain = isinstance(conv, nn.Conv1d) and not functional.is_watched_convolution(conv)
            if (
                plain
                and conv.stride[0] == 1
                and 2 * int(conv.padding[0]) in (conv.kernel_size[0], conv.kernel_size[0] - 1)
            ):
                yield f"{path}.pos_conv_embed{name}".removeprefix("."), block


def _linear(encoder: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield path, parent and name of each linear layer, except those in a compressor or a wrapper around a layer."""
    # The parts of LoRA's layers and of other wrappers around a layer are read and merged by the wrapper.
    left_alone = [
        one for one in encoder.modules() if isinstance(one, SequenceCompressor) or "base_layer" in one._modules
    ]
    kept = {id(part) for one in left_alone for part in one.modules()}
    for path, module in encoder.named_modules():
        for name, child in module.named_children():
            if id(child) not in kept and name not in _KEPT and _is_plain(child, nn.Linear, PackedLinear):
                yield f"{path}.{name}".removeprefix("."), module, name


def _is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    return type(module) in kinds and not functional.is_watched(module)
