"""Audio in: corpora, batches by duration, whole recordings, and the demo corpus. Needs `fastssl[train]`."""
