"""The parts of a probe: tables of labels, features of frozen encoders, heads on them, scores."""
