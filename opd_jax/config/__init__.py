"""The config: the table of its fields, the checks of their values, and the rules between them."""

from opd_jax.config.fields import default
from opd_jax.config.schema import explain, flatten, near, suggest, to_json
from opd_jax.config.trees import EVALUATION, EXPERIMENT, PROBING, SAMPLING, TRAINING, Tree
from opd_jax.config.validate import validate, validate_evaluation, validate_sampling

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
    "validate",
    "validate_evaluation",
    "validate_sampling",
]
