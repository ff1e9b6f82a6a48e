"""Dropout of GELU(x + bias), with the mask recomputed in the backward."""

from fastssl.ops.bias_gelu_dropout.op import bias_gelu_dropout as bias_gelu_dropout
