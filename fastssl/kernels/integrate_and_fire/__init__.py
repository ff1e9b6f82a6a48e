"""Continuous integrate-and-fire over packed sequences: merges frames into fewer frames by their weights."""
