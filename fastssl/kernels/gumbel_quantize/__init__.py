"""Straight-through Gumbel softmax over codebooks: frames become the nearest of a few learned vectors."""
