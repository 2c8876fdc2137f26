"""The fields of the collapse guard: which are refused, and what each action may raise."""

import pytest

from configs import opd, sft, stable_opd
from opd_jax.config import guard_limits
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError

pytestmark = pytest.mark.short


def with_fields(config, **fields):
    for field, value in fields.items():
        section, _, name = field.partition("__")
        config[section][name] = value
    return config


def test_the_guard_is_off_and_rows_go_on_by_default():
    for method in (opd, stable_opd, sft):
        config = method.get_config()
        assert config.guard.action == "off"
        assert config.rollout.stop_on_repetition == 0
        assert not guard_limits.may_raise_beta_kl(config)
        assert not guard_limits.may_raise_lambda_gold(config)


@pytest.mark.parametrize("action", guard_limits.ACTIONS)
def test_actions_are_valid_and_say_what_they_may_raise(action):
    config = with_fields(opd.get_config(), guard__action=action)
    validate(config)
    raises = action in ("strengthen", "rollback")
    assert (
        guard_limits.may_raise_beta_kl(config)
        == guard_limits.may_raise_lambda_gold(config)
        == raises
    )
    config = with_fields(config, guard__lambda_gold_max=0.0)
    validate(config)
    assert not guard_limits.may_raise_lambda_gold(config)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"guard__action": "wrn"}, "--config.guard.action=warn"),
        ({"guard__false_alarm_every": 1}, "guard.false_alarm_every=1"),
        ({"guard__memory": 19}, "at least 20"),
        ({"guard__patience": 9}, "at least 10"),
        ({"guard__factor": 1.0}, "at least 1.1"),
        ({"guard__max_rollbacks": 0}, "at least 1"),
        ({"guard__beta_kl_max": -1.0}, "guard.beta_kl_max=-1.0"),
        ({"guard__action": "strengthen", "guard__beta_kl_max": 0.001}, "guard.beta_kl_max=0.001"),
        ({"guard__action": "strengthen", "loss__lambda_gold": 3.0}, "at least 3.0"),
        ({"guard__action": "strengthen", "guard__beta_kl_floor": 0.0}, "above 0"),
        (
            {"guard__action": "strengthen", "guard__beta_kl_max": 0.0, "guard__lambda_gold_max": 0.0},
            "nothing to raise",
        ),
        ({"guard__action": "rollback", "checkpoint__every": 20}, "--config.checkpoint.keep=3"),
        ({"guard__action": "rollback", "checkpoint__every": 0}, "--config.checkpoint.every=30"),
        ({"guard__action": "warn", "loss__pg_weight": 0.0, "loss__lambda_gold": 1.0}, "no"),
        ({"rollout__stop_on_repetition": -1}, "rollout.stop_on_repetition=-1"),
        ({"rollout__stop_on_repetition": 8}, "rollout.repetition_period=16"),
        ({"rollout__stop_on_repetition": 160}, "rollout.max_response_tokens=160"),
        ({"rollout__repetition_period": 0}, "rollout.repetition_period=0"),
    ],
)  # fmt: skip
def test_impossible_guards_are_refused_in_one_line(fields, says):
    config = opd.get_config()
    with pytest.raises(ConfigError) as error:
        validate(with_fields(config, **fields))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
