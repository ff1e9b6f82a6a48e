"""Turn an encoder into one for inference on the CPU, whose weights are laid out beforehand in fp32, bf16 or int8."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastssl.kernels.prepacked_conv.op import multiplies_bytes
from fastssl.kernels.prepacked_conv.weights import FORMATS, Format, prepack
from fastssl.nn.feature_extractor import FeatureExtractor
from fastssl.nn.linear import PackedLinear
from fastssl.nn.prepacked import PrepackedConv, PrepackedLinear, PrepackedPositionalConv, weight_of
from fastssl.nn.transformer import ConvolutionalPositionalEmbedding, PositionalConvLayer

Model = TypeVar("Model", bound=nn.Module)
#: Linear layers whose outputs are only factors of further products, and so in bf16 unless the format is "fp32".
_FEED_PRODUCTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "intermediate_dense")
#: Linear layers that stay as they are, because they are too narrow to matter.
_KEPT = ("gru_rel_pos_linear",)
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
            "inference: int8 needs a processor with the instructions AVX512-VNNI, which this one lacks; use 'bf16' or "
            "'fp32'"
        )


def prepack_encoder(encoder: Model, format: Format, weights: Mapping[str, Tensor] | None = None) -> Model:
    """Replace the linear layers and convolutions of an encoder by prepacked ones, in place and one at a time.

    In "int8", the positional convolution, most of the front end and the attention are in bf16. Layer norms, the sums of
    residuals and the first convolution are in fp32 in any format.

    Args:
        encoder: Encoder of `models`. Its tensors may be on the meta device if `weights` is given.
        format: "fp32", "bf16" or "int8".
        weights: All tensors of the encoder's state dict by name; None takes the encoder's own.

    Returns:
        The same encoder, in evaluation mode, on the CPU; its parameters are in fp32 and need no gradients.

    Raises:
        ValueError: The format is unknown or cannot be computed with on this processor.
    """
    check_format(format)
    left = dict(encoder.state_dict() if weights is None else weights)
    lower = torch.float32 if format == "fp32" else torch.bfloat16
    halves: Format = "fp32" if format == "fp32" else "bf16"

    def take(prefix: str) -> dict[str, Tensor]:
        names = [name for name in left if name.startswith(f"{prefix}.")]
        return {name.removeprefix(f"{prefix}."): left.pop(name).detach().float() for name in names}

    for path, module in list(encoder.named_modules()):
        prefix = f"{path}." if path else ""
        if isinstance(module, FeatureExtractor):
            last = len(module.conv_layers) - 1
            for index, layer in enumerate(module.conv_layers):
                if index > 0:
                    own = take(f"{prefix}conv_layers.{index}.conv")
                    by_bytes = format == "int8" and index in _INT8_CONVOLUTIONS
                    packed = prepack(own["weight"], own.get("bias"), format="int8" if by_bytes else halves)
                    dtype = torch.float32 if index == last else lower
                    layer.conv = PrepackedConv(packed, stride=layer.conv.stride[0], dtype=dtype)
        elif isinstance(module, ConvolutionalPositionalEmbedding | PositionalConvLayer):
            normed = parametrize.is_parametrized(module.conv, "weight")
            own = take(f"{prefix}conv")
            packed = prepack(weight_of(own), own.get("bias"), format=halves, groups=module.conv.groups)
            module.conv = PrepackedPositionalConv(packed, weight_norm=normed)
        for name, child in list(module.named_children()):
            if type(child) is PackedLinear and name not in _KEPT:
                own = take(f"{prefix}{name}")
                packed = prepack(own["weight"], own.get("bias"), format=format)
                setattr(module, name, PrepackedLinear(packed, dtype=lower if name in _FEED_PRODUCTS else torch.float32))
    for path, module in encoder.named_modules():
        for name, parameter in list(module._parameters.items()):
            key = f"{path}.{name}" if path else name
            if parameter is not None and key in left:
                found = left.pop(key).detach()
                if found.is_meta:  # the mask vector of a model that does not store one, as `Encoder` initialises it
                    found = torch.rand(found.shape, device="cpu")
                module._parameters[name] = nn.Parameter(
                    found.to("cpu", torch.float32, copy=True), requires_grad=False
                )
    return encoder.eval()

