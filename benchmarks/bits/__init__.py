"""What `benchmarks.same_bits` computes in each tree; only names of the public surface, which every commit has."""
