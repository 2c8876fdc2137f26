"""The config tree: defaults, validation, and what a user reads after a mistake."""

import json
import pathlib

import pytest

from configs import opd, sft, stable_opd
from opd_jax import config as configuration
from opd_jax.errors import ConfigError

pytestmark = pytest.mark.short
GOLDEN = pathlib.Path(__file__).parent / "golden" / "configs"


def with_field(field: str, value: object):
    config = stable_opd.get_config()
    section, _, name = field.rpartition(".")
    target = config[section] if section else config
    with target.ignore_type():
        target[name] = value
    return config


@pytest.mark.parametrize("module", [stable_opd, opd, sft])
def test_shipped_configs_are_valid(module):
    configuration.validate(module.get_config())
    configuration.validate(module.get_config("tiny"))


@pytest.mark.parametrize("module", [stable_opd, opd, sft])
def test_golden_config(module, update_golden):
    """A changed default shows as a diff of a text file."""
    flat = configuration.flatten(module.get_config().to_dict())
    lines = [
        f"{k} = {json.dumps(v if not k.endswith('path') else pathlib.Path(v).name)}"
        for k, v in sorted(flat.items())
    ]
    text = "\n".join(lines) + "\n"
    file = GOLDEN / f"{module.__name__.split('.')[-1]}-tiny.txt"
    if update_golden:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert file.read_text() == text


def test_methods_differ_in_numbers_only():
    one = configuration.flatten(stable_opd.get_config().to_dict())
    other = configuration.flatten(opd.get_config().to_dict())
    assert {k for k in one if one[k] != other[k]} == {"loss.lambda_gold", "loss.beta_kl"}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("steps", 0, "steps=0"),
        ("rollout.temperature", -1.0, "rollout.temperature=-1.0"),
        ("rollout.temperature", 0.0, "greedy"),
        ("rollout.temperature", float("nan"), "rollout.temperature=nan"),
        ("rollout.top_p", 0.0, "rollout.top_p=0.0"),
        ("rollout.top_p", 1.5, "0 to 1"),
        ("optim.learning_rate", float("inf"), "finite"),
        ("optim.schedule", "cosin", "--config.optim.schedule=cosine"),
        ("loss.kl_estimator", "k4", "full, k1, k2, k3"),
        ("loss.aggregation", "mean", "token, sequence"),
        ("student.dtype", "float8", "auto, float32, bfloat16"),
        ("student.path", "", "student.path"),
        ("teacher.path", "", "teacher.path"),
        ("optim.updates_per_rollout", 3, "--config.rollout.prompts_per_step=18"),
        ("optim.microbatch_tokens", 10, "--config.optim.microbatch_tokens="),
        ("optim.warmup_steps", -1, "optim.warmup_steps=-1"),
        ("log.every", "often", "log.every"),
        ("rollout.prompts_per_step", 2.5, "whole number"),
    ],
)
def test_impossible_values_are_refused_in_one_line(field, value, says):
    with pytest.raises(ConfigError) as error:
        configuration.validate(with_field(field, value))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_field_names_the_nearest():
    config = stable_opd.get_config()
    with config.unlocked():
        config.rollout.temprature = 1.0
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        configuration.validate(config)


def test_missing_field_is_named():
    config = stable_opd.get_config()
    with config.unlocked():
        del config.rollout.top_p
    with pytest.raises(ConfigError, match=r"config.rollout.top_p is missing"):
        configuration.validate(config)


def test_nothing_to_train_is_refused():
    config = opd.get_config()
    config.loss.pg_weight = 0.0
    with pytest.raises(ConfigError, match="nothing would be trained"):
        configuration.validate(config)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        stable_opd.get_config("tyni")
