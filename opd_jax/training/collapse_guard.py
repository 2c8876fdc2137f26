"""The collapse guard: detect the onset of truncation-repetition inflation and decide how to respond.

Pure: it maps a `State` and a step's metrics to a `State` and a `Response`, which the training loop
carries out. A state can be written as JSON and read back, so that a checkpoint holds it and a resumed
run continues exactly.

The signals are shares of rollouts or tokens (`rollout/truncation_rate`, ...). Each is compared with the
run's own past, not with a fixed level: 2604.08527 (section 3.3) sees healthy runs at a TruncRate of 0.5.
docs/guard.md has the rule and measurements of it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from opd_jax.config.guard_limits import LAG

WARMUP = 5  # steps that only estimate the first baseline: a collapse may begin at step 10
PAUSE = 5  # steps without tests after a response, which needs time to take effect
MARGIN = 5  # delay of the estimated onset, in steps, where truncation rises within 30 steps
FLOOR = 0.01  # lower bound of a healthy share: one row in 100 loops in any run
ROOM = 1 / 3  # share of rollouts that must end for truncation alone to be a signal
SPLIT = 3  # minimum steps until an alarm: one hard batch of prompts is no collapse

# Sequential tests: name -> signal, and the two hypotheses; (0, 0.25) tests "still the baseline"
# against "a quarter of the way from the baseline to 1".
TESTS: dict[str, tuple[str, float, float]] = {
    "truncation": ("truncation", 0.0, 0.25),
    "repetition": ("repetition", 0.0, 0.1),  # rare in healthy runs, so a smaller rise is a signal
    "repeated tokens": ("repeated tokens", 0.0, 0.25),
    "most truncated": ("truncation", 0.25, 0.75),
}
COMPANIONS = ("repetition", "repeated tokens")


@dataclasses.dataclass(frozen=True)
class Rules:
    """The numbers of the guard; see config section `guard`.

    Attributes:
      rollouts: the effective number of independent rollouts per step.
      threshold: evidence (in nats) that counts as a rise; half of it suffices for a second signal.
      memory: steps of the baseline.
      beta_kl, lambda_gold: as configured, before any strengthening.
    """

    action: str
    rollouts: float
    threshold: float
    memory: int
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
class State:
    """The guard's memory.

    Attributes:
      mean, steps: baseline of each signal, and the number of steps it averages.
      recent: the last steps, which are not in the baseline yet.
      evidence: of each of TESTS, in nats. since: step at which it last left 0.
      pause: remaining steps without tests.
      alarmed: from an alarm until enough healthy steps. healthy: consecutive healthy steps so far.
      collapses: alarms so far, without repeated ones. onset: of the current collapse, else 0.
      level: how often the terms were strengthened. rollbacks: so far.
      event: metrics of a rollback, logged with the next step because the step itself is undone.
    """

    mean: dict[str, float] = dataclasses.field(default_factory=dict)
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    recent: tuple[dict[str, float], ...] = ()
    evidence: dict[str, float] = dataclasses.field(default_factory=dict)
    since: dict[str, int] = dataclasses.field(default_factory=dict)
    pause: int = 0
    alarmed: bool = False
    healthy: int = 0
    collapses: int = 0
    onset: int = 0
    level: int = 0
    rollbacks: int = 0
    event: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A collapse has begun about at step `onset`; `text` lists the signals that rose and by how much.

    `again`: an earlier alarm is still on.
    """

    step: int
    onset: int
    text: str
    again: bool


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
    """Return the rules of a complete config.

    Samples of one prompt are correlated: n rollouts, m of each prompt, count as n / (1 + (m - 1) rho)
    independent ones, with rho = 1/2 (the design effect of cluster sampling).
    """
    section, rollout, loss = config.guard, config.rollout, config.loss
    n, m = rollout.prompts_per_step * rollout.samples_per_prompt, rollout.samples_per_prompt
    return Rules(
        action=section.action,
        rollouts=n / (1 + (m - 1) / 2),
        threshold=math.log(section.false_alarm_every),
        memory=section.memory,
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


def observe(
    state: State, step: int, row: Mapping[str, float], rules: Rules
) -> tuple[State, Alarm | None]:
    """Update the evidence with a step's metrics, `row`. Steps without rollouts change nothing.

    An alarm is raised where truncation has certainly risen and repetition agrees, or where most of the
    rollouts that used to end do not end.
    """
    values = _signals(row)
    if not {"truncation", "repetition"} <= values.keys():
        return state, None
    if state.pause:
        state = dataclasses.replace(state, pause=state.pause - 1)
        return _remembered(state, values, rules), None
    state = _weighed(state, step, values, rules)
    suspicion = _suspicion(state.evidence, rules)
    if suspicion >= 1:
        onset = state.onset or _onset(state, rules)
        alarm = Alarm(step, onset, _text(state, step, onset, values, rules), state.alarmed)
        state = dataclasses.replace(
            state, evidence={}, since={}, pause=PAUSE, alarmed=True, healthy=0,
            collapses=state.collapses + (not state.alarmed), onset=onset,
        )  # fmt: skip
        return _remembered(state, values, rules), alarm
    state = dataclasses.replace(state, healthy=state.healthy + 1 if suspicion < 0.5 else 0)
    return _remembered(state, values, rules), None


def increment(x: float, p0: float, p1: float, n: float) -> float:
    """n [x log(p1/p0) + (1 - x) log((1 - p1)/(1 - p0))]: log-likelihood ratio of a share x of n rollouts.

    Its exponential has mean at most 1 for any n independent values in [0, 1] of mean p0 or less,
    not only for binary ones, because exp is convex (Hoeffding 1963, Eq. 4.1).
    """
    return n * (x * math.log(p1 / p0) + (1 - x) * math.log((1 - p1) / (1 - p0)))


def _signals(row: Mapping[str, float]) -> dict[str, float]:
    """Return a step's finite signals. Rollouts stopped on repetition count as truncated and as repetitive."""
    stopped, nan = row.get("rollout/stopped_rate", 0.0), math.nan
    values = {
        "truncation": row.get("rollout/truncation_rate", nan) + stopped,
        "repetition": max(row.get("rollout/repetition_rate", nan), stopped),
        "repeated tokens": row.get("score/repeated_token_fraction", nan),
        "entropy": row.get("score/student_entropy", nan),
        "length": row.get("rollout/length_mean", nan),
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _weighed(state: State, step: int, values: dict[str, float], rules: Rules) -> State:
    """S = min(A, max(0, S + increment)) for each of TESTS: CUSUM (Page 1954).

    In a healthy run S reaches A at most once in e^A steps on average (Lorden 1971).
    """
    evidence, since = dict(state.evidence), dict(state.since)
    for name, (signal, low, high) in TESTS.items():
        if signal not in values or state.steps.get(signal, 0) < WARMUP:
            continue
        base = _ceiling(state, signal, rules)
        if name == "most truncated" and 1 - base < ROOM:
            evidence[name] = 0.0
            continue
        p0, p1 = (base + part * (1 - base) for part in (low, high))
        gained = increment(values[signal], p0, p1, rules.rollouts)
        before = evidence.get(name, 0.0)
        after = max(before + min(gained, rules.threshold / SPLIT), 0.0)
        evidence[name] = min(after, rules.threshold)
        if before == 0 < after:
            since[name] = step
    return dataclasses.replace(state, evidence=evidence, since=since)


def _ceiling(state: State, signal: str, rules: Rules) -> float:
    """Return an upper bound of the baseline: its mean plus one standard error, at least FLOOR."""
    n = rules.rollouts * min(state.steps[signal], rules.memory)
    mean = (state.mean[signal] * n + 0.5) / (n + 1)  # Jeffreys prior: no event is not a rate of 0
    return min(max(mean + math.sqrt(mean * (1 - mean) / (n + 1)), FLOOR), 1 - FLOOR)


def _suspicion(evidence: Mapping[str, float], rules: Rules) -> float:
    """Return evidence relative to an alarm, which is raised at 1; a step below 1/2 is healthy."""
    share = {name: evidence.get(name, 0.0) / rules.threshold for name in TESTS}
    agreeing = 2 * max(share[name] for name in COMPANIONS)
    return max(min(share["truncation"], agreeing), share["most truncated"])


def _onset(state: State, rules: Rules) -> int:
    """Return the step at which the evidence began to grow: truncation's, or an earlier agreeing signal's."""
    agreeing = [n for n in COMPANIONS if 2 * state.evidence.get(n, 0.0) >= rules.threshold]
    return min(state.since[name] for name in ("truncation", *agreeing) if name in state.since)


def _text(state: State, step: int, onset: int, values: dict[str, float], rules: Rules) -> str:
    """Return one line: every signal from its baseline to the mean of the last steps."""
    last = [*state.recent, values][-SPLIT:]

    def change(name: str) -> str:
        shares = [row[name] for row in last if name in row]
        return f"{name} {state.mean.get(name, math.nan):.3g} -> {sum(shares) / len(shares):.3g}"

    risen = [name for name in COMPANIONS if state.evidence.get(name, 0.0) > 0]
    context = [name for name in ("entropy", "length") if name in values]
    suffix = f" ({', '.join(map(change, context))})" if context else ""
    return (
        f"step {step}: collapse since about step {onset}: "
        f"{', '.join(map(change, ['truncation', *risen]))}{suffix}"
    )


def _remembered(state: State, values: dict[str, float], rules: Rules) -> State:
    """Add the step of LAG steps ago to the baseline: a mean, and a moving one after `memory` steps.

    The baseline is frozen from an alarm until the run is healthy, so that a collapse never becomes normal.
    """
    warming = state.steps.get("truncation", 0) < WARMUP
    recent = (*state.recent, values)
    if not warming and len(recent) <= LAG:
        return dataclasses.replace(state, recent=recent)
    oldest, recent = recent[0], recent[1:]
    if state.alarmed:
        return dataclasses.replace(state, recent=recent)
    mean, steps = dict(state.mean), dict(state.steps)
    for name, value in oldest.items():
        steps[name] = steps.get(name, 0) + 1
        old = mean.get(name, 0.0)
        mean[name] = old + (value - old) / min(steps[name], rules.memory)
    return dataclasses.replace(state, mean=mean, steps=steps, recent=recent)


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
