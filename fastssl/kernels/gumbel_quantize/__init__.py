"""Straight-through Gumbel softmax over codebooks: each frame is replaced by one of a few learned vectors."""
