"""On-policy distillation (OPD) and Stable-OPD of language models in JAX."""

__version__ = "0.1.0"
