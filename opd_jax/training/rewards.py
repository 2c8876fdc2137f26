"""The reward of each rollout: the verdict about its answer, a user's function, or a column of the data."""

import dataclasses
import decimal
from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_jax.data.columns import reach
from opd_jax.data.problem import Problem
from opd_jax.errors import RewardError
from opd_jax.grading.grader import Grade, decided
from opd_jax.grading.rewards import Call, RewardPool, advice
from opd_jax.sharding import multihost


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Rewards of a step's rollouts.

    Attributes:
      reward_B: float32, from 0 to 1; 0 where it is not known.
      known_B: rollouts with a reward; bool [B].
      timeouts, faults: rollouts without one, because a call timed out, or failed in another way.
      external: whether they come from a function or a column.
    """

    reward_B: np.ndarray
    known_B: np.ndarray
    timeouts: int = 0
    faults: int = 0
    external: bool = True

    def shown(self, row: int) -> float | None:
        """Return the reward of a rollout for rollouts.jsonl; None where it is not known."""
        return round(float(self.reward_B[row]), 5) if self.known_B[row] else None

    def metrics(self) -> dict[str, float]:
        """Return `rollout/reward` and its counts; nothing for verdicts, which `rollout/accuracy` covers."""
        if not self.external:
            return {}
        row = {
            "rollout/rewarded": float(np.sum(self.known_B)),
            "rollout/reward_timeouts": float(self.timeouts),
            "rollout/reward_faults": float(self.faults),
        }
        if self.known_B.any():
            row["rollout/reward"] = float(np.mean(self.reward_B[self.known_B], dtype=float))
        return row


def of_verdicts(grades: Sequence[Grade | None]) -> Rewards:
    """Return 1 for a correct answer and 0 for any other; unknown where no grade decides it."""
    return Rewards(
        reward_B=np.array([grade is Grade.CORRECT for grade in grades], np.float32),
        known_B=np.array([decided(grade) for grade in grades], bool),
        external=False,
    )


def of_column(problems: Sequence[Problem], column: str, *, group: int) -> Rewards:
    """Return the number in `column` for each of the `group` rollouts of a problem, which are adjacent."""
    values = [column_value(problem, column) for problem in problems]
    assert all(isinstance(value, float) for value in values), "checked when the data was opened"
    reward_B = np.repeat(np.array(values, np.float32), group)
    return Rewards(reward_B, np.ones(len(reward_B), bool))


def column_value(problem: Problem, column: str) -> float | str:
    """Return the reward in a column of the problem's row, or what is wrong with it, as text."""
    value: Any = reach(problem.fields or {}, column)
    number = isinstance(value, (int, float, decimal.Decimal))
    if number and 0 <= value <= 1:
        return float(value)
    shown = str(value) if number else repr(value) if isinstance(value, str) else "no number"
    return (
        f"reward.column={column} holds {shown[:60]}, wanted a number from 0 to 1; correct the row, or name "
        "another column: --config.reward.column=COLUMN"
    )


def asked(pool: RewardPool, problems: Sequence[Problem], texts: Sequence[str]) -> dict[str, Any]:
    """Call the pool's function for each problem and its texts, which are adjacent.

    Returns values that JSON can hold, for `of_answers`: one process of several calls, all of them read.
    """
    group = len(texts) // len(problems)
    calls = [
        Call(problem.id, texts[i * group : (i + 1) * group], problem.reward_row())
        for i, problem in enumerate(problems)
    ]
    results = pool.rewards(calls)
    faults = [result.fault for result in results if result.fault]
    line = f"{faults[0]}; {advice(pool.log)}" if faults else ""
    if len(faults) > 1:
        line += f" ({len(faults) - 1} other problems of this step failed, too)"
    return {
        "rewards": [reward for result in results for reward in result.rewards],
        "line": line,
        "timeouts": group * sum(result.timed_out for result in results),
        "faults": group * sum(bool(result.fault and not result.timed_out) for result in results),
    }


def of_answers(answers: dict[str, Any], *, on_error: str) -> Rewards:
    """Return the rewards that `asked` collected; `on_error`, one of ON_ERROR, decides about failed calls.

    Raises RewardError for "stop": one line that names the problem.
    """
    if answers["line"] and on_error == "stop":
        raise RewardError(answers["line"])
    if answers["line"] and multihost.first():
        print(f"warning: {answers['line']}", flush=True)
    return Rewards(
        reward_B=np.array([reward or 0.0 for reward in answers["rewards"]], np.float32),
        known_B=np.array([reward is not None for reward in answers["rewards"]], bool),
        timeouts=answers["timeouts"],
        faults=answers["faults"],
    )
