"""Benchmarks of decoding, scoring, updates and complete steps, compared with the limits of the machine."""
