"""Packed kernels: tensors in, tensors out. Each op has a folder with its reference, its kernels and its README.

`backend=` of every op: "reference" (plain PyTorch), "native" (compiled C++ or CUDA), "triton", "torch" (PyTorch's own
kernel); None takes the environment variable FASTSSL_BACKEND, else the fastest there is. What exists: `fastssl info`.
"""

from fastssl.ops.bias_gelu_dropout import bias_gelu_dropout as bias_gelu_dropout
from fastssl.ops.contrastive_loss import contrastive_loss as contrastive_loss
from fastssl.ops.dropout_add_layer_norm import dropout_add_layer_norm as dropout_add_layer_norm
from fastssl.ops.gumbel_quantize import gumbel_quantize as gumbel_quantize
from fastssl.ops.integrate_and_fire import integrate_and_fire as integrate_and_fire
from fastssl.ops.positional_conv import positional_conv as positional_conv
from fastssl.ops.strided_conv import StridedConvLayer as StridedConvLayer
from fastssl.ops.strided_conv import strided_conv as strided_conv
from fastssl.ops.strided_conv import strided_conv_stack as strided_conv_stack
from fastssl.ops.varlen_attention import varlen_attention as varlen_attention
