"""Attention within each sequence of a packed batch, with dropout and WavLM's gated distance bias."""

from fastssl.ops.varlen_attention.op import varlen_attention as varlen_attention
