"""Turn an encoder into one for inference on the CPU, whose weights are laid out beforehand in fp32, bf16 or int8."""

from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastssl.kernels.prepacked_conv.weights import FORMATS, Format, prepack
from fastssl.nn.linear import PackedLinear
from fastssl.nn.prepacked import Prepacked, PrepackedConv, PrepackedLinear, PrepackedPositionalConv
from fastssl.nn.feature_extractor import FeatureExtractor
from fastssl.nn.transformer import ConvolutionalPositionalEmbedding, PositionalConvLayer

Model = TypeVar("Model", bound=nn.Module)
#: Linear layers whose outputs are the operands of further products, and so are rounded to bf16 unless in "fp32".
_FEED_PRODUCTS = ("q_proj", "k_proj", "v_proj", "intermediate_dense")
#: Linear layers that stay as they are: too narrow to matter.
_KEPT = ("gru_rel_pos_linear",)
#: Convolutions of the front end, from the second on, that "int8" computes in bytes; the others are in bf16.
_INT8_CONVOLUTIONS = (1, 2)


def prepack_encoder(encoder: Model, format: Format) -> Model:
    """Replace an encoder's linear layers and convolutions by prepacked ones, in place.

    Args:
        encoder: Encoder in evaluation mode, on the CPU and in fp32, of `models` or with its modules.
        format: "fp32", "bf16" or "int8". In "int8", most of the front end, the positional convolution and the attention
            are in bf16.

    Returns:
        The same encoder; its parameters need no gradients.
    """
    if format not in FORMATS:
        raise ValueError(f"inference: must be one of {', '.join(FORMATS)}, or None, got {format!r}")
    lower = torch.float32 if format == "fp32" else torch.bfloat16
    by_bf16: Format = "fp32" if format == "fp32" else "bf16"
    for module in list(encoder.modules()):
        if isinstance(module, FeatureExtractor):
            *others, last = list(module.conv_layers)[1:]
            for index, layer in enumerate([*others, last], 1):
                conv = layer.conv
                packed = prepack(
                    conv.weight, conv.bias, format="int8" if format == "int8" and index in _INT8_CONVOLUTIONS else by_bf16
                )
                dtype = torch.float32 if layer is last else lower
                layer.conv = PrepackedConv(packed, stride=conv.stride[0], dtype=dtype)
        elif isinstance(module, ConvolutionalPositionalEmbedding | PositionalConvLayer):
            conv = module.conv
            packed = prepack(conv.weight, conv.bias, format=by_bf16, groups=conv.groups)
            module.conv = PrepackedPositionalConv(packed, weight_norm=parametrize.is_parametrized(conv, "weight"))
        for name, child in list(module.named_children()):
            if type(child) is PackedLinear and name not in _KEPT:
                dtype = lower if name in _FEED_PRODUCTS else torch.float32
                packed = prepack(child.weight, child.bias, format=format)
                setattr(module, name, PrepackedLinear(packed, dtype=dtype))
    return encoder.requires_grad_(False)
