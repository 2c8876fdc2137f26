"""The collapse guard: respond to the alarms of collapse_detector.py.

Pure: it maps a `State` and an alarm to a `State` and a `Response`, which the training loop carries out. A
state can be written as JSON and read back, so that a checkpoint holds it and a resumed run continues
exactly.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from opd_jax.training import collapse_detector
from opd_jax.training.collapse_detector import Alarm

MARGIN = 5  # delay of the estimated onset, in steps, where truncation rises within 30 steps


@dataclasses.dataclass(frozen=True)
class Rules(collapse_detector.Rules):
    """The numbers of the detector and of the guard; see config section `guard`.

    Attributes:
      beta_kl, lambda_gold: as configured, before any strengthening.
    """

    action: str
    patience: int
    factor: float
    beta_kl: float
    beta_kl_floor: float
    beta_kl_max: float
    lambda_gold: float
    lambda_gold_floor: float
    lambda_gold_max: float
    max_rollbacks: int


@dataclasses.dataclass(frozen=True)
class State(collapse_detector.State):
    """The memory of the detector and of the guard.

    Attributes:
      level: how often the terms were strengthened. rollbacks: so far.
      event: metrics of a rollback, logged with the next step because the step itself is undone.
    """

    level: int = 0
    rollbacks: int = 0
    event: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Response:
    """What the training loop must do at this step in addition to continuing.

    Attributes:
      lines: messages to print. event: keys for this step's line of metrics.jsonl, plain numbers.
      restore: step of the checkpoint to restore, None to stay.
      stop: save a checkpoint, unless `restore` is one, and end the run.
    """

    lines: tuple[str, ...] = ()
    event: dict[str, float] = dataclasses.field(default_factory=dict)
    stop: bool = False
    restore: int | None = None


def make_rules(config: Any) -> Rules:
    """Return the rules of a complete config."""
    section, rollout, loss = config.guard, config.rollout, config.loss
    return Rules(
        rollouts=collapse_detector.independent_rollouts(
            rollout.prompts_per_step, rollout.samples_per_prompt
        ),
        threshold=math.log(section.false_alarm_every),
        memory=section.memory,
        budget=rollout.max_response_tokens if rollout.horizon else 0,
        action=section.action,
        patience=section.patience,
        factor=section.factor,
        beta_kl=loss.beta_kl,
        beta_kl_floor=section.beta_kl_floor,
        beta_kl_max=section.beta_kl_max,
        lambda_gold=loss.lambda_gold,
        lambda_gold_floor=section.lambda_gold_floor,
        lambda_gold_max=section.lambda_gold_max,
        max_rollbacks=section.max_rollbacks,
    )


def terms(state: State, rules: Rules) -> tuple[float, float]:
    """Return (beta_kl, lambda_gold) in force: as configured at level 0, times `factor` per level, bounded.

    Where one is configured as 0, its floor is the value at the first level.
    """

    def raised(value: float, floor: float, most: float) -> float:
        if state.level == 0 or most <= value:
            return value
        first = value * rules.factor if value else floor
        return min(first * rules.factor ** (state.level - 1), most)

    return (
        raised(rules.beta_kl, rules.beta_kl_floor, rules.beta_kl_max),
        raised(rules.lambda_gold, rules.lambda_gold_floor, rules.lambda_gold_max),
    )


def masking(state: State, rules: Rules) -> bool:
    """Return whether repetitive tails are masked in the loss."""
    return rules.action == "mask" and state.alarmed


def respond(
    state: State, step: int, alarm: Alarm | None, rules: Rules, checkpoints: Sequence[int]
) -> tuple[State, Response]:
    """Respond to an alarm, or to enough healthy steps in a row.

    `checkpoints` are the steps that can be restored. Terms and mask of the new state apply from the next
    step on; where the response restores a step, the run continues there with this state.
    """
    was, pending = terms(state, rules), state.event
    raised = state.level > 0
    state = dataclasses.replace(state, event={})
    if alarm is None:
        state, response = _eased(state, step, rules)
    else:
        state, response = _acted(state, alarm, rules, checkpoints)
    lines, event = response.lines, pending | response.event
    if response.stop:
        event["guard/stopped"] = 1.0
    beta_kl, lambda_gold = now = terms(state, rules)
    if now != was:
        lines = (*lines, f"from here on beta_kl={beta_kl:g}, lambda_gold={lambda_gold:g}")
    if raised or state.level:
        event = event | {"guard/beta_kl": beta_kl, "guard/lambda_gold": lambda_gold}
    return state, dataclasses.replace(response, lines=lines, event=event)


def _acted(
    state: State, alarm: Alarm, rules: Rules, checkpoints: Sequence[int]
) -> tuple[State, Response]:
    event = {"guard/alarm": 1.0, "guard/onset": float(alarm.onset)}
    warning = Response((alarm.text,), event)
    stronger = _stronger(state, rules)
    if rules.action == "stop":
        return state, dataclasses.replace(warning, stop=True)
    if rules.action == "rollback":
        return _rolled_back(stronger, warning, alarm, rules, checkpoints)
    if rules.action == "strengthen":
        return (stronger, warning) if stronger.level > state.level else (state, Response())
    if alarm.again:  # the warning was printed, or the mask set, at the first alarm
        return state, Response()
    if rules.action == "mask":
        lines = (alarm.text, "from here on repetitive tails are left out of the loss")
        return state, Response(lines, event | {"guard/masking": 1.0})
    return state, warning


def _stronger(state: State, rules: Rules) -> State:
    """Return the state one level higher, unless both terms are at their bounds."""
    more = dataclasses.replace(state, level=state.level + 1)
    return more if terms(more, rules) != terms(state, rules) else state


def _rolled_back(
    state: State, warning: Response, alarm: Alarm, rules: Rules, checkpoints: Sequence[int]
) -> tuple[State, Response]:
    before = [step for step in checkpoints if step < alarm.onset]
    target = max(
        (step for step in before if step < alarm.onset - MARGIN), default=max(before, default=None)
    )
    if state.rollbacks >= rules.max_rollbacks:
        place = "" if target is None else f" at step {target}"
        lines = (
            *warning.lines,
            f"the run went back {state.rollbacks} times already; it stops{place}",
        )
        return state, dataclasses.replace(warning, lines=lines, stop=True, restore=target)
    if target is None:
        if alarm.again:  # printed at the first alarm; a change of the terms is printed anyway
            return state, Response()
        lines = (
            *warning.lines,
            f"no checkpoint is from before step {alarm.onset}; the run goes on",
        )
        return state, dataclasses.replace(warning, lines=lines)
    event = warning.event | {
        "guard/rolled_back_from": float(alarm.step),
        "guard/rolled_back_to": float(target),
        "guard/rollbacks": state.rollbacks + 1.0,
    }
    state = dataclasses.replace(
        state, rollbacks=state.rollbacks + 1, recent=(), onset=0, event=event
    )
    lines = (*warning.lines, f"back to step {target}")
    return state, Response(lines, event, restore=target)


def _eased(state: State, step: int, rules: Rules) -> tuple[State, Response]:
    """After `patience` healthy steps end the alarm, and lower strengthened terms by one level.

    Each further collapse doubles the patience: otherwise a lasting cause would be released again and again.
    What a rollback strengthened stays strengthened, because from there the run is known to collapse.
    """
    eases = rules.action == "strengthen" and state.level > 0
    patience = rules.patience * 2 ** max(state.collapses - 1, 0)
    if state.healthy < patience or not (state.alarmed or eases):
        return state, Response()
    response = Response()
    if state.alarmed:
        event = {"guard/recovered": 1.0} | ({"guard/masking": 0.0} if masking(state, rules) else {})
        response = Response((f"step {step}: healthy for {state.healthy} steps",), event)
    level = state.level - eases
    return dataclasses.replace(state, alarmed=False, healthy=0, onset=0, level=level), response


def to_json(state: State) -> str:
    """Return the state as JSON text; `from_json` returns an equal one."""
    return json.dumps(dataclasses.asdict(state))


def from_json(text: str) -> State:
    """Return the state that `to_json` wrote."""
    fields = json.loads(text)
    return State(**fields | {"recent": tuple(fields["recent"])})


def resumed(saved: tuple[int, State], record: tuple[int, State] | None) -> tuple[int, State]:
    """Return the step and state to resume from: the newest checkpoint's, or the last rollback's if newer.

    `record` is written before a rollback changes anything: otherwise a run killed during one would repeat
    the steps that the rollback undid, and forget the rollback.
    """
    if record is not None and record[1].rollbacks > saved[1].rollbacks:
        return record
    return saved
