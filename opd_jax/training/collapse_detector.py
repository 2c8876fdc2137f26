"""Detect the onset of truncation-repetition inflation from the metrics of each step.

Pure: it maps a `State` and a step's metrics to a `State` and, where a collapse has begun, an `Alarm`.
collapse_guard.py responds to alarms.

The signals are shares of rollouts or tokens (`rollout/truncation_rate`, ...). Each is compared with the
run's own past, not with a fixed level: 2604.08527 (section 3.3) sees healthy runs at a TruncRate of 0.5.
docs/guard.md has the rule and measurements of it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeVar

from opd_jax.config.guard_limits import LAG

WARMUP = 5  # steps that only estimate the first baseline: a collapse may begin at step 10
PAUSE = 5  # steps without tests after an alarm: a response needs time to take effect
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
    """The numbers of the sequential tests.

    Attributes:
      rollouts: the effective number of independent rollouts per step.
      threshold: evidence (in nats) that counts as a rise; half of it suffices for a second signal.
      memory: steps of the baseline.
      budget: tokens of a response that is not cut by a horizon (training/horizon.py); 0 without one.
    """

    rollouts: float
    threshold: float
    memory: int
    budget: int = dataclasses.field(default=0, kw_only=True)


@dataclasses.dataclass(frozen=True)
class State:
    """The memory of the detector.

    Attributes:
      mean, steps: baseline of each signal, and the number of steps it averages.
      recent: the last steps, which are not in the baseline yet.
      evidence: of each of TESTS, in nats. since: step at which it last left 0.
      pause: remaining steps without tests.
      alarmed: from an alarm until the guard ends it. healthy: consecutive healthy steps so far.
      collapses: alarms so far, without repeated ones. onset: of the current collapse, else 0.
      horizon: budget of the last step's rollouts; 0 where it is fixed.
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
    horizon: float = 0.0


S = TypeVar("S", bound=State)


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A collapse has begun about at step `onset`; `text` lists the signals that rose and by how much.

    `again`: an earlier alarm is still on.
    """

    step: int
    onset: int
    text: str
    again: bool


def independent_rollouts(prompts: int, samples: int) -> float:
    """Return the effective number of independent rollouts, `samples` of each prompt.

    Samples of one prompt are correlated: n rollouts, m of each prompt, count as n / (1 + (m - 1) rho)
    independent ones, with rho = 1/2 (the design effect of cluster sampling).
    """
    return prompts * samples / (1 + (samples - 1) / 2)


def observe(state: S, step: int, row: Mapping[str, float], rules: Rules) -> tuple[S, Alarm | None]:
    """Update the evidence with a step's metrics, `row`. Steps without rollouts change nothing.

    An alarm is raised where truncation has certainly risen and repetition agrees, or where most of the
    rollouts that used to end do not end.

    Another horizon makes other shares healthy: the baseline begins anew there. Below the full budget a
    rollout that does not end was cut by design, so truncation alone is no signal.
    """
    values = _signals(row)
    if not {"truncation", "repetition"} <= values.keys():
        return state, None
    horizon = row.get("rollout/horizon", 0.0)
    if horizon != state.horizon:
        state = dataclasses.replace(
            state, mean={}, steps={}, recent=(), evidence={}, since={}, horizon=horizon
        )
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


def _weighed(state: S, step: int, values: dict[str, float], rules: Rules) -> S:
    """S = min(A, max(0, S + increment)) for each of TESTS: CUSUM (Page 1954).

    In a healthy run S reaches A at most once in e^A steps on average (Lorden 1971).
    """
    evidence, since = dict(state.evidence), dict(state.since)
    for name, (signal, low, high) in TESTS.items():
        if signal not in values or state.steps.get(signal, 0) < WARMUP:
            continue
        base = _ceiling(state, signal, rules)
        if name == "most truncated" and (1 - base < ROOM or state.horizon < rules.budget):
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


def _remembered(state: S, values: dict[str, float], rules: Rules) -> S:
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
