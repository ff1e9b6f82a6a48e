"""Builds the package: `backend.py` is what pip calls, `extensions.py` compiles `csrc/`."""
