"""Recipes: models, data, lengths and batch that every method shares. `FILE.py:RECIPE` picks one."""

import pathlib
from collections.abc import Callable

from ml_collections import ConfigDict

import opd_jax
from opd_jax.config import default, near
from opd_jax.errors import ConfigError


def recipe(text: str | None) -> ConfigDict:
    """The config of `RECIPE[,key=value...]`; methods (the other files here) then set their numbers."""
    name, *options = (text or "tiny").split(",")
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} is not known; {near(name, list(RECIPES))}")
    if options:
        raise ConfigError(f"recipe {name!r} takes no options, got {','.join(options)!r}")
    config = default()
    RECIPES[name](config)
    return config


def tiny(config: ConfigDict) -> None:
    """The embedded world: two small Qwen2 models and multi-step arithmetic; 2 CPU cores, no network."""
    models = pathlib.Path(opd_jax.__file__).parent / "tiny"
    config.student.path = str(models / "student")
    config.teacher.path = str(models / "teacher")
    config.steps = 100
    config.rollout.prompts_per_step = 16
    config.rollout.samples_per_prompt = 4  # 2604.08527: "4 rollouts each"
    config.rollout.max_prompt_tokens = 40
    config.rollout.max_response_tokens = 160
    config.optim.learning_rate = 2e-4
    config.optim.warmup_steps = (
        10  # Adam's first steps are as large as its rate, whatever the noise
    )
    config.eval.temperature = 1.0  # the distribution that OPD trains
    config.eval.every = 25
    config.metrics.repetition_tail = 100  # the paper's 10,000 characters can never occur here
    config.metrics.repetition_threshold = 2.2


RECIPES: dict[str, Callable[[ConfigDict], None]] = {"tiny": tiny}
