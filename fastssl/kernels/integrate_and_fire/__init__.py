"""Continuous integrate-and-fire over packed sequences: sums weighted frames into fewer frames."""
