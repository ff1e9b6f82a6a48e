"""Bias, GELU and dropout in one pass."""

from fastssl.ops.bias_gelu_dropout.op import bias_gelu_dropout as bias_gelu_dropout
