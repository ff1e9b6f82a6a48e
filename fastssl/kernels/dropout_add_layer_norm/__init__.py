"""Layer norm of residual + dropout(x), with the mask recomputed in the backward."""
