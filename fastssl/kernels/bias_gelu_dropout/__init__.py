"""Dropout of GELU(x + bias); the backward pass recomputes the mask."""
