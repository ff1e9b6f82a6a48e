"""Grouped convolution over time with zeros beyond the ends of each sequence."""

from fastssl.ops.positional_conv.op import positional_conv as positional_conv
