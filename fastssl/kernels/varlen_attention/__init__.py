"""Attention within each sequence of a packed batch, with dropout and WavLM's gated distance bias."""
