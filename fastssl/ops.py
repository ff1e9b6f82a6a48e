"""Packed kernels: tensors in, tensors out. Each op has a folder with its reference, its kernels and its README.

`backend=` of every op: "reference" (plain PyTorch), "native" (compiled C++ or CUDA), "triton", "torch" (PyTorch's own
kernel); None takes the environment variable FASTSSL_BACKEND, else the fastest there is. What exists: `fastssl info`.
"""

from fastssl.kernels.bias_gelu_dropout.op import bias_gelu_dropout as bias_gelu_dropout
from fastssl.kernels.contrastive_loss.op import contrastive_loss as contrastive_loss
from fastssl.kernels.dropout_add_layer_norm.op import dropout_add_layer_norm as dropout_add_layer_norm
from fastssl.kernels.gumbel_quantize.op import gumbel_quantize as gumbel_quantize
from fastssl.kernels.integrate_and_fire.op import integrate_and_fire as integrate_and_fire
from fastssl.kernels.positional_conv.op import positional_conv as positional_conv
from fastssl.kernels.strided_conv.op import strided_conv as strided_conv
from fastssl.kernels.strided_conv.op import strided_conv_stack as strided_conv_stack
from fastssl.kernels.strided_conv.plan import StridedConvLayer as StridedConvLayer
from fastssl.kernels.varlen_attention.op import varlen_attention as varlen_attention
