"""Programs that `benchmarks.same_bits` runs in each tree; they use only public names, which every commit has."""
