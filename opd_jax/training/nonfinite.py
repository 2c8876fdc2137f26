"""Numbers that are not finite, and gradients that are far too large: seen, told of, left out or stopped at.

The update itself (update.py) leaves parameters and optimiser as they are
where its gradient or loss is not finite, or its norm beyond the limit it is given; here is decided what
the run does about it, and found out which rows it came from.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from opd_jax.data import microbatches
from opd_jax.errors import NonFiniteError
from opd_jax.sharding import multihost
from opd_jax.training.update import Gradients
from opd_jax.types import Frozen, Rollout, Scores
from opd_jax.workdir import atomic

WARMUP = 20  # norms before one may be a spike
MEMORY = 50  # norms that the mean is over, from then on a moving one
FOLDER = "nonfinite"
_MOST = 8  # rows that are looked for


@dataclasses.dataclass(frozen=True)
class Rules:
    """Of the config section `guard`: updates that may be left out, and what is a spike."""

    skip_nonfinite: int
    spike: float
    spike_action: str


@dataclasses.dataclass(frozen=True)
class State:
    """What is remembered, and goes into checkpoints.

    Attributes:
      skipped: updates left out so far for a number that was not finite. spikes: seen so far.
      log_norm, seen: mean of the logarithm of the gradient norms, and how many it is of.
    """

    skipped: int = 0
    spikes: int = 0
    log_norm: float = 0.0
    seen: int = 0


@dataclasses.dataclass(frozen=True)
class Bad:
    """A row of an update with a number that is not finite: which, of what kind, and where in it."""

    kind: str  # rollouts | golden
    row: int
    what: tuple[str, ...]


def make_rules(section: Any) -> Rules:
    """The rules of the config section `guard`."""
    return Rules(section.skip_nonfinite, section.spike, section.spike_action)


def limit(state: State, rules: Rules) -> float:
    """The largest gradient norm that is applied; infinite unless spikes are left out."""
    return _level(state, rules) if rules.spike_action == "skip" else math.inf


def observe(state: State, norm: float, rules: Rules) -> tuple[State, dict[str, float]]:
    """Take in the finite norm of an update: the new state, and keys for the step's line.

    A spike is above `spike` times the geometric mean of the norms before it. It counts for the mean
    as if it were at that limit: if norms stay up there, the mean follows in time.
    """
    if not rules.spike or norm <= 0:
        return state, {}
    level = _level(state, rules)
    row = {}
    if norm > level:
        row = {"guard/spike": norm * rules.spike / level}  # times the mean
        state = dataclasses.replace(state, spikes=state.spikes + 1)
    seen = state.seen + 1
    mean = state.log_norm + (math.log(min(norm, level)) - state.log_norm) / min(seen, MEMORY)
    return dataclasses.replace(state, log_norm=mean, seen=seen), row


def _level(state: State, rules: Rules) -> float:
    warm = rules.spike and state.seen >= WARMUP
    return rules.spike * math.exp(state.log_norm) if warm else math.inf


def to_json(state: State) -> dict[str, float]:
    """A state as JSON holds it."""
    return dataclasses.asdict(state)


def from_json(fields: Mapping[str, Any] | None) -> State:
    """The state that `to_json` wrote; a new one where a checkpoint has none."""
    return State(**fields) if fields else State()


def bad_scores(rollout: Rollout, scores: Scores, mask_BT: np.ndarray) -> list[Bad]:
    """Rollouts with a log-prob of a counted token that is not finite."""
    named = {
        "sampler": rollout.sampler_logprob_BT, "student": scores.student_logprob_BT,
        "teacher": scores.teacher_logprob_BT,
    }  # fmt: skip
    found: dict[int, list[str]] = {}
    for name, logprob_BT in named.items():
        if logprob_BT is not None:
            bad_B = (~np.isfinite(np.asarray(logprob_BT)) & mask_BT).any(axis=1)
            for row in np.flatnonzero(bad_B):
                found.setdefault(int(row), []).append(f"log-prob of the {name}")
    return [Bad("rollouts", row, tuple(what)) for row, what in sorted(found.items())]


def bad_rows(
    accumulate: Gradients,
    params: Any,
    frozen: Frozen,
    rollout_rows: Any,
    golden_rows: Any,
    weights: Mapping[str, float],
) -> list[Bad]:
    """Up to `_MOST` rows whose own loss or gradient is not finite, through the programs of the update.

    Micro-batches are tried as they are, and of a bad one every row alone.
    """
    found: list[Bad] = []
    for name, add, rows, mine in accumulate.kinds(rollout_rows, golden_rows, weights):

        def what(part: microbatches.MicroBatch, add: Callable = add, rows: Any = rows, mine: Any = mine
                 ) -> tuple[str, ...]:  # fmt: skip
            taken = accumulate.mesh.rows(microbatches.gather(rows, part))
            grads = accumulate.mesh.zeros(params)
            value, parts, grads = add(params, frozen, taken, mine, grads)
            measured = {f"loss/{term}": x for term, x in parts.items()} | {"loss/total": value}
            norm = optax.tree.norm(accumulate.mesh.reduce(grads))
            fetched = jax.device_get(accumulate.mesh.total(measured) | {"gradient": norm})
            return tuple(k for k, x in fetched.items() if not np.isfinite(x).all())

        for part in accumulate.split(rows):
            if len(found) < _MOST and what(part):
                for row in part.rows:
                    alone = dataclasses.replace(part, rows=np.array([row]))
                    if len(found) < _MOST and (terms := what(alone)):
                        found.append(Bad(name, int(row), terms))
    return found


def save_texts(
    folder: pathlib.Path, step: int, bad: Sequence[Bad], text: Callable[[Bad], str]
) -> pathlib.Path | None:
    """Write WORKDIR/nonfinite/STEP.json: each bad row, what was not finite in it, and its text.

    Returns None where there is no such row, and in every process but the first.
    """
    if not bad or not multihost.first():
        return None
    file = folder / FOLDER / f"{step}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(one) | {"text": text(one)} for one in bad]
    atomic.write_json(file, rows, indent=2)
    return file


def described(
    step: int, names: Sequence[str], bad: Sequence[Bad], file: pathlib.Path | None
) -> str:
    """One line: the step, the terms, the rows, and where their texts are."""
    terms = dict.fromkeys(what for one in bad for what in one.what) or dict.fromkeys(names)
    said = f"step {step}: {', '.join(terms)} not finite"
    if not bad:
        return said
    rows = ", ".join(f"{one.kind} {one.row}" for one in bad)
    more = " and maybe others" if len(bad) >= _MOST else ""
    return f"{said} in {rows}{more}" + (f" (texts in {file})" if file else "")


def leave_out(state: State, rules: Rules, problem: str) -> tuple[State, dict[str, float]]:
    """Count an update that is left out, with a warning; returns the new state and its metrics.

    Raises NonFiniteError where `guard.skip_nonfinite` updates were left out before.
    """
    if state.skipped >= rules.skip_nonfinite:
        raise NonFiniteError(
            f"{problem}; the parameters were left as they were: lower --config.optim.learning_rate, or "
            f"leave such updates out: --config.guard.skip_nonfinite={rules.skip_nonfinite + 10}"
        )
    if multihost.first():
        print(f"warning: {problem}; left out", flush=True)
    state = dataclasses.replace(state, skipped=state.skipped + 1)
    return state, {"guard/skipped": float(state.skipped)}
