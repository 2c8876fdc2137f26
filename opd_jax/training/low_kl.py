"""The threshold of the low-KL cut: a quantile over the run's own past rollouts (KAT, 2606.09471).

Pure; a checkpoint holds the `State`. The equation of the cut is losses/low_kl.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from opd_jax.losses.low_kl import least_window_mean, low_kl_cut
from opd_jax.types import Outcome, Rollout, Scores


@dataclasses.dataclass(frozen=True)
class Rules:
    """The numbers of the cut, from the fields `loss.low_kl_*`; a window of 0 is off."""

    window: int
    run: int
    share: float
    history: int
    rollouts: int
    steps: int


@dataclasses.dataclass(frozen=True)
class State:
    """The past of a run.

    Attributes:
      least: least window mean of each of the last `history` rollouts that ended by themselves, oldest first.
      steps: steps so far.
    """

    least: tuple[float, ...] = ()
    steps: int = 0


def make_rules(loss: Any) -> Rules:
    """Return the rules of the config section `loss`."""
    return Rules(
        loss.low_kl_window, loss.low_kl_run, loss.low_kl_share,
        loss.low_kl_history, loss.low_kl_rollouts, loss.low_kl_steps,
    )  # fmt: skip


def threshold(state: State, rules: Rules) -> float | None:
    """s = the (1 - share) quantile of the least window means; None until enough steps and rollouts."""
    if state.steps < rules.steps or len(state.least) < rules.rollouts:
        return None
    return float(np.quantile(state.least, 1 - rules.share))


def observe(
    state: State, rollout: Rollout, scores: Scores, mask_BT: np.ndarray, rules: Rules
) -> State:
    """Add a step's rollouts: those that ended with an end token and have at least one window."""
    least_B = least_window_mean(np.asarray(scores.reverse_kl_BT), mask_BT, rules.window)
    known_B = np.isfinite(least_B) & (rollout.outcome_B == Outcome.EOS)
    least = (*state.least, *map(float, least_B[known_B]))
    return State(least[-rules.history :], state.steps + 1)


def kept(
    state: State, scores: Scores, mask_BT: np.ndarray, rules: Rules
) -> tuple[np.ndarray | None, dict[str, float]]:
    """Return the tokens of `mask_BT` before the cut, bool [B, T], and metrics; None without a threshold."""
    limit = threshold(state, rules)
    if limit is None:
        return None, {}
    kl_BT = np.asarray(scores.reverse_kl_BT)
    kept_B = low_kl_cut(kl_BT, mask_BT, rules.window, rules.run, limit)
    kept_BT = mask_BT & (np.cumsum(mask_BT, axis=1) <= kept_B[:, None])
    cut = 1 - kept_BT.sum() / max(mask_BT.sum(), 1)
    return kept_BT, {"loss/low_kl_threshold": limit, "loss/low_kl_cut": float(cut)}


def to_json(state: State) -> dict[str, Any]:
    """Return the state as a JSON object."""
    return dataclasses.asdict(state)


def from_json(fields: Mapping[str, Any] | None) -> State:
    """Return the state that `to_json` wrote; a new one where a checkpoint has none."""
    return State(tuple(fields["least"]), fields["steps"]) if fields else State()
