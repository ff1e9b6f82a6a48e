"""Dropout of GELU(x + bias), with the mask recomputed in the backward."""
