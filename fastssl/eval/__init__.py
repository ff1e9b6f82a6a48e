"""Evaluate encoders: extract features, label frames by k-means, measure quality without labels, run probes."""
