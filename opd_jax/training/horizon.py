"""The horizon: a response budget that grows in stairs while training goes on.

The student first samples short responses; every `every` steps the budget rises to the next length of the
ladder, whose last length is rollout.max_response_tokens (POPD 2605.31490, Fast OPD 2602.15260). With a least
entropy it rises only where the student's distributions are still wide enough (2605.16826). The published
ladders, intervals and thresholds are not known: all of them are fields. Pure; a checkpoint holds the `State`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

ENTROPY = "score/student_entropy"


@dataclasses.dataclass(frozen=True)
class Rules:
    """The numbers of a horizon; one length is a fixed budget.

    Attributes:
      ladder: response budgets, rising; the last one is that of the rows.
      every: steps between two checks. least_entropy: see `next_length`.
    """

    ladder: tuple[int, ...]
    every: int
    least_entropy: float


@dataclasses.dataclass(frozen=True)
class State:
    """The budget of the next step, and the entropies since the last check.

    Attributes:
      length: response tokens that a rollout may have.
      entropy: sum over the steps since the last check that measured it. steps: their number.
    """

    length: int
    entropy: float = 0.0
    steps: int = 0


def make_rules(config: Any) -> Rules:
    """Return the rules of a complete config."""
    rollout = config.rollout
    ladder = tuple(sorted({*rollout.horizon, rollout.max_response_tokens}))
    return Rules(ladder, rollout.horizon_steps, rollout.horizon_entropy)


def start(rules: Rules) -> State:
    """Return the state before the first step."""
    return State(rules.ladder[0])


def next_length(length: int, entropy: float, ladder: Sequence[int], least_entropy: float) -> int:
    """L_{m+1} if H >= H_min, else L_m: the budget after a check. (2605.16826, known second-hand)

    `length` L_m, `entropy` H the mean token entropy in nats; nan counts as below any H_min. The paper
    measures H on held-out problems; here it is that of the rollouts since the last check.
    """
    if not entropy >= least_entropy:
        return length
    return min((longer for longer in ladder if longer > length), default=length)


def observe(state: State, step: int, row: Mapping[str, float], rules: Rules) -> State:
    """Return the state after `step`, whose metrics are `row`; the budget changes at multiples of `every`.

    Without a least entropy the budget of step s is length (s - 1) // every of the ladder, whatever was
    measured. A fixed budget has no checks and sums up nothing: its state stays that of the start.
    """
    if len(rules.ladder) == 1:
        return state
    entropy = row.get(ENTROPY, math.nan)
    if math.isfinite(entropy):
        state = dataclasses.replace(state, entropy=state.entropy + entropy, steps=state.steps + 1)
    if step % rules.every:
        return state
    mean = (
        state.entropy / state.steps if state.steps else 0.0
    )  # unmeasured: below any least entropy
    return State(next_length(state.length, mean, rules.ladder, rules.least_entropy))


def keys(state: State, rules: Rules) -> dict[str, float]:
    """Return the metrics of a step that sampled with this state; none where the budget is fixed."""
    return {"rollout/horizon": float(state.length)} if len(rules.ladder) > 1 else {}


def describe(rules: Rules, steps: int) -> list[str]:
    """Return lines for the start of a run of `steps` steps; none where the budget is fixed."""
    *lower, last = rules.ladder
    if not lower:
        return []
    stairs = ", ".join(map(str, lower))
    pace = f"for {rules.every} steps each"
    if rules.least_entropy:
        pace = (
            f"raised where the mean entropy of {rules.every} steps is at least "
            f"{rules.least_entropy:g} nats"
        )
    lines = [
        f"horizon: responses of at most {stairs}, then {last} tokens, {pace}; the plan is that of {last}"
    ]
    if (needed := rules.every * len(lower)) >= steps:
        lines.append(
            f"note: {steps} steps end before the horizon reaches {last} tokens, which takes "
            f"{'at least ' * bool(rules.least_entropy)}{needed} steps"
        )
    return lines


def to_json(state: State) -> str:
    """Return the state as JSON text; `from_json` returns an equal one."""
    return json.dumps(dataclasses.asdict(state))


def from_json(text: str | None, rules: Rules) -> State:
    """Return the state that `to_json` wrote; the first one for a checkpoint without it.

    A state of another ladder, which a run may resume with after its config was changed, keeps its length
    within the ladder's; a fixed budget is always its own.
    """
    if text is None or len(rules.ladder) == 1:
        return start(rules)
    state = State(**json.loads(text))
    return dataclasses.replace(state, length=min(state.length, rules.ladder[-1]))
