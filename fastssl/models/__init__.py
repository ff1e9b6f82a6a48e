"""One file per system: an encoder and its pre-training objective."""
