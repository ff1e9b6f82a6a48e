"""Dropout, residual and layer norm in one pass."""

from fastssl.ops.dropout_add_layer_norm.op import dropout_add_layer_norm as dropout_add_layer_norm
