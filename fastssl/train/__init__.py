"""Pre-training and distillation: settings, data, training loop, checkpoints and reports of a run."""
