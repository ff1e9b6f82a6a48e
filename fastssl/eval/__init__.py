"""What an encoder is worth: features of recordings, classes of frames, quality without labels, probes."""
