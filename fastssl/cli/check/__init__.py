"""`fastssl check`: run every kernel on this machine's own device, beside the reference and beside PyTorch."""
