"""Benchmarks: what decoding, scoring, updates and whole steps take, beside what the machine can do."""
