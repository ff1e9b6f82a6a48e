"""Parts of `fastssl probe`: tables of labels, features of frozen encoders, heads trained on them, scores."""
