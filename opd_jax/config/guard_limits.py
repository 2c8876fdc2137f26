"""What the fields of the collapse guard depend on: its actions, its fixed spans, the terms it may raise."""

from typing import Any

ACTIONS = ("off", "warn", "stop", "strengthen", "mask", "rollback")


LAG = 10  # steps until one counts for the baseline, so that an onset does not raise it


REACH = 30  # steps that the oldest kept checkpoint must lie back: onsets are found that late


def may_raise_beta_kl(config: Any) -> bool:
    """Whether the reference has to be there from the start, though beta_kl may be 0."""
    return _strengthens(config) and config.guard.beta_kl_max > config.loss.beta_kl


def may_raise_lambda_gold(config: Any) -> bool:
    """Whether golden solutions have to be there from the start, though lambda_gold may be 0."""
    return _strengthens(config) and config.guard.lambda_gold_max > config.loss.lambda_gold


def _strengthens(config: Any) -> bool:
    return config.guard.action in ("strengthen", "rollback")
