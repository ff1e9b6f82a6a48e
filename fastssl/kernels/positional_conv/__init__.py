"""Grouped convolution over time with zeros beyond the ends of each sequence."""
