"""The config: the table of its fields, the checks of their values, the rules between them (validate.py).

This package does not import JAX: the command line is read, and memory is set up, before JAX is loaded.
"""

from opd_jax.config.fields import default
from opd_jax.config.schema import explain, flatten, near, suggest, to_json
from opd_jax.config.trees import EVALUATION, EXPERIMENT, PROBING, SAMPLING, TRAINING, Tree

__all__ = [
    "EVALUATION",
    "EXPERIMENT",
    "PROBING",
    "SAMPLING",
    "TRAINING",
    "Tree",
    "default",
    "explain",
    "flatten",
    "near",
    "suggest",
    "to_json",
]
