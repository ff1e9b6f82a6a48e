"""Strided convolutions over packed sequences, fused with norm and activation: one layer, or a stack."""

from fastssl.ops.strided_conv.op import StridedConvLayer as StridedConvLayer
from fastssl.ops.strided_conv.op import strided_conv as strided_conv
from fastssl.ops.strided_conv.op import strided_conv_stack as strided_conv_stack
