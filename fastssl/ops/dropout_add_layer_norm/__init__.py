"""Layer norm of residual + dropout(x), with the mask recomputed in the backward."""

from fastssl.ops.dropout_add_layer_norm.op import dropout_add_layer_norm as dropout_add_layer_norm
