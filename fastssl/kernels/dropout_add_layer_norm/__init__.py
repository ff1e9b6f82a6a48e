"""Layer norm of residual + dropout(x); the backward pass recomputes the mask."""
