"""Tools outside the training path: data preparation, cold start, probes, profiles, benchmarks."""
