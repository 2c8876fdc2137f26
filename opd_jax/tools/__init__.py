"""Beside the path from config to report: data preparation, cold start, probes, profiles, benchmarks."""
