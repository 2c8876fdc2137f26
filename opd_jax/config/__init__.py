"""The config: its fields, the checks of their values, and the rules between them (validate.py).

Imports no JAX: the command line is read, and memory is set up, before JAX is loaded.
"""

from opd_jax.config.fields import default
from opd_jax.config.schema import explain, flatten, near, suggest, to_json

__all__ = ["default", "explain", "flatten", "near", "suggest", "to_json"]
