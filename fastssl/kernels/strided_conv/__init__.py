"""Strided convolutions over packed sequences, fused with norm and activation: one layer, or a stack."""
