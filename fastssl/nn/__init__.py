"""Modules over packed sequences: front end, attention, transformer, quantiser, masking."""
