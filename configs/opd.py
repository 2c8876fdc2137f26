"""Plain on-policy distillation (arXiv 2604.08527, section 2): the teacher's log-ratio as advantage.

python launch/train.py --config=configs/opd.py
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(recipe: str | None = None) -> ConfigDict:
    """The defaults of the loss section are OPD."""
    return recipes.recipe(recipe)
