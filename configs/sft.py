"""Supervised fine-tuning on golden solutions: the cold start before OPD. No rollouts are made.

python launch/train.py --config=configs/sft.py
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(recipe: str | None = None) -> ConfigDict:
    """Only the golden term: no policy gradient, no reference."""
    config = recipes.recipe(recipe)
    config.teacher.path = ""
    config.data.train = "tiny:sft"
    config.loss.pg_weight = 0.0
    config.loss.lambda_gold = 1.0
    return config
