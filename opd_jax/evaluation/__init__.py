"""Evaluation: sample answers to benchmarks, grade them, summarise; held-out problems during training."""
