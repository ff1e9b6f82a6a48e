"""Audio input: corpora, batches limited by duration, whole recordings and the demo corpus. Needs `fastssl[train]`."""
