"""Supervised fine-tuning on golden solutions: the cold start before OPD. No rollouts are made.

python launch/train.py --config=configs/sft.py

The solutions are the data's own, or the teacher's: launch/sample.py writes a file of those. OPD then
starts from the folder that launch/export.py makes of this run (`student=DIR`).
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(recipe: str | None = None) -> ConfigDict:
    """Only the golden term: no policy gradient, no reference."""
    config = recipes.recipe(recipe, without=("teacher",))
    config.teacher.path = ""
    config.data.teacher_prompt_template = config.data.teacher_system_prompt = "same"
    config.loss.pg_weight = 0.0
    config.loss.lambda_gold = 1.0
    config.loss.aggregation = (
        "sequence"  # the default: it applies to rollouts, of which there are none
    )
    config.eval.teacher = False
    _RECIPES[(recipe or "tiny").partition(",")[0]](config)
    return config


def _tiny(config: ConfigDict) -> None:
    if config.data.train == "tiny:train":  # not where a file was named
        config.data.train = "tiny:sft"


def _smollm2(config: ConfigDict) -> None:
    config.rollout.prompts_per_step = 16
    config.rollout.max_response_tokens = 320
    config.optim.learning_rate = 5e-5 * recipes.rate_factor(config)
    config.optim.schedule = "cosine"


def _luffy(config: ConfigDict) -> None:
    """LUFFY's SFT, whose numbers the paper's table repeats; its own SFT stage is unknown."""
    config.data.epochs = 3.0
    config.rollout.prompts_per_step = 64
    config.rollout.max_response_tokens = 15_360  # 16,384 with the prompt
    config.optim.learning_rate = 5e-5 * recipes.rate_factor(config)
    config.optim.schedule = "cosine"
    config.optim.warmup_fraction = 0.1


def _qwen3(config: ConfigDict) -> None:
    """2604.13016, Table 3."""
    config.data.epochs = 1.0
    config.rollout.prompts_per_step = 64  # 8 a device; the number of devices is not given
    config.rollout.max_response_tokens = 13_312  # 14,336 with the prompt
    config.optim.learning_rate = 1e-5 * recipes.rate_factor(config)
    config.optim.schedule = "cosine"
    config.optim.warmup_fraction = 0.05


_RECIPES = {
    "tiny": _tiny,
    "smollm2-135m": _smollm2,
    "qwen2.5-math-1.5b": _luffy,
    "qwen2.5-math-7b": _luffy,
    "qwen3-1.7b": _qwen3,
}
