"""Continuous integrate-and-fire over packed sequences: frames become fewer frames, by learned weights."""
