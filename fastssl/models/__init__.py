"""Encoders and pre-training systems, with one file for each system: its config, its model and its objective."""
