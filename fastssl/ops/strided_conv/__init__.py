"""Strided convolution over packed sequences, fused with norm and activation."""

from fastssl.ops.strided_conv.op import strided_conv as strided_conv
