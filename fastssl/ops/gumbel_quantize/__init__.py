"""Straight-through Gumbel softmax over codebooks: frames become the nearest of a few learned vectors."""

from fastssl.ops.gumbel_quantize.op import gumbel_quantize as gumbel_quantize
