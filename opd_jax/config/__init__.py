"""The config: its fields, the checks of their values, and the rules between them."""

from opd_jax.config.fields import default
from opd_jax.config.schema import explain, flatten, near, suggest, to_json
from opd_jax.config.validate import validate

__all__ = ["default", "explain", "flatten", "near", "suggest", "to_json", "validate"]
