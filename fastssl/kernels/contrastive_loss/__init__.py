"""The contrastive loss of wav2vec 2.0, and whether each frame's own target scored highest."""
