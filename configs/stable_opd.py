"""Stable-OPD (arXiv 2604.08527, Eq. 6): OPD + golden mixture + KL to the reference, in one update.

python launch/train.py --config=configs/stable_opd.py
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(recipe: str | None = None) -> ConfigDict:
    """The whole method is these two numbers; with both 0 it is configs/opd.py."""
    config = recipes.recipe(recipe)
    config.loss.lambda_gold = 0.1  # unknown in the paper; 0.1 in two re-implementations
    config.loss.beta_kl = 0.01  # unknown in the paper; 0.01 in two re-implementations
    return config
