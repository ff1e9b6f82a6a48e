"""`fastssl label`: label frames with k-means classes, as targets for HuBERT and WavLM or segments for a compressor."""
