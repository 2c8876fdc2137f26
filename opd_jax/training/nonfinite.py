"""Non-finite losses and gradient spikes: detect, log, skip the update, or stop.

The update itself (update.py) leaves parameters and optimiser unchanged where its gradient or loss is not
finite, or its norm exceeds a limit. This module decides how the run responds, and finds the rows that
caused it.
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

WARMUP = 20  # norms to average before one may count as a spike
MEMORY = 50  # norms in the mean; after that many it is a moving one
FOLDER = "nonfinite"
_MOST = 8  # rows to report at most


@dataclasses.dataclass(frozen=True)
class Rules:
    """From the config section `guard`: how many updates may be skipped, and which norm is a spike."""

    skip_nonfinite: int
    spike: float
    spike_action: str


@dataclasses.dataclass(frozen=True)
class State:
    """What checkpoints hold of this module.

    Attributes:
      skipped: updates skipped so far for a non-finite number. spikes: spikes so far.
      log_norm, seen: mean of the logarithm of the gradient norms, and how many it averages.
    """

    skipped: int = 0
    spikes: int = 0
    log_norm: float = 0.0
    seen: int = 0


@dataclasses.dataclass(frozen=True)
class Bad:
    """A row of an update with a non-finite number: its kind, its index, and the non-finite quantities."""

    kind: str  # rollouts | golden
    row: int
    what: tuple[str, ...]


def make_rules(section: Any) -> Rules:
    """Return the rules of the config section `guard`."""
    return Rules(section.skip_nonfinite, section.spike, section.spike_action)


def limit(state: State, rules: Rules) -> float:
    """Return the largest gradient norm to apply; infinite unless spikes are skipped."""
    return _level(state, rules) if rules.spike_action == "skip" else math.inf


def observe(state: State, norm: float, rules: Rules) -> tuple[State, dict[str, float]]:
    """Record the finite norm of an update: return the new state, and keys for the step's line.

    A spike exceeds `spike` times the geometric mean of the norms before it. It enters the mean clipped at
    that limit, so that the mean follows in time if norms stay high.
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
    """Return the state as a JSON object."""
    return dataclasses.asdict(state)


def from_json(fields: Mapping[str, Any] | None) -> State:
    """Return the state that `to_json` wrote; a new one where a checkpoint has none."""
    return State(**fields) if fields else State()


def bad_scores(rollout: Rollout, scores: Scores, mask_BT: np.ndarray) -> list[Bad]:
    """Return the rollouts in which the log-prob of a counted token is not finite."""
    logprobs = {
        "sampler": rollout.sampler_logprob_BT, "student": scores.student_logprob_BT,
        "teacher": scores.teacher_logprob_BT, "reference": scores.reference_logprob_BT,
        "teacher, of its span": scores.spans and scores.spans.teacher_logprob_BT,
    }  # fmt: skip
    bad: dict[int, list[str]] = {}
    for name, logprob_BT in logprobs.items():
        if logprob_BT is not None:
            bad_B = (~np.isfinite(np.asarray(logprob_BT)) & mask_BT).any(axis=1)
            for row in np.flatnonzero(bad_B):
                bad.setdefault(int(row), []).append(f"log-prob of the {name}")
    return [Bad("rollouts", row, tuple(what)) for row, what in sorted(bad.items())]


def bad_rows(
    accumulate: Gradients,
    params: Any,
    frozen: Frozen,
    rollout_rows: Any,
    golden_rows: Any,
    weights: Mapping[str, float],
) -> list[Bad]:
    """Find up to `_MOST` rows whose own loss or gradient is not finite, with the programs of the update.

    It tries every micro-batch, and every single row of those that are not finite.
    """
    bad: list[Bad] = []
    for name, add, rows, of_kind in accumulate.kinds(rollout_rows, golden_rows, weights):

        def nonfinite_terms(
            part: microbatches.MicroBatch,
            add: Callable = add,
            rows: Any = rows,
            of_kind: Any = of_kind,
        ) -> tuple[str, ...]:
            microbatch = accumulate.mesh.rows(microbatches.gather(rows, part))
            grads = accumulate.mesh.zeros(params)
            value, parts, grads = add(params, frozen, microbatch, of_kind, grads)
            measured = {f"loss/{term}": x for term, x in parts.items()} | {"loss/total": value}
            norm = optax.tree.norm(accumulate.mesh.reduce(grads))
            fetched = jax.device_get(accumulate.mesh.total(measured) | {"gradient": norm})
            return tuple(k for k, x in fetched.items() if not np.isfinite(x).all())

        for part in accumulate.split(rows):
            if len(bad) < _MOST and nonfinite_terms(part):
                for row in part.rows:
                    alone = dataclasses.replace(part, rows=np.array([row]))
                    if len(bad) < _MOST and (terms := nonfinite_terms(alone)):
                        bad.append(Bad(name, int(row), terms))
    return bad


def save_texts(
    folder: pathlib.Path,
    step: int,
    bad: Sequence[Bad],
    held: Mapping[str, Any],
    decode: Callable[[list[int]], str],
) -> pathlib.Path | None:
    """Write WORKDIR/nonfinite/STEP.json: each bad row, its non-finite quantities, and its text.

    `held` has the rows of each kind. Return the file; None where there is no such row, and in every process
    but the first.
    """
    if not bad or not multihost.first():
        return None
    file = folder / FOLDER / f"{step}.json"
    file.parent.mkdir(parents=True, exist_ok=True)

    def text(one: Bad) -> str:
        tokens_T = held[one.kind].tokens_BT[one.row]
        return decode(tokens_T[: held[one.kind].length_B[one.row]].tolist())

    rows = [dataclasses.asdict(one) | {"text": text(one)} for one in bad]
    atomic.write_json(file, rows, indent=2)
    return file


def described(
    step: int, names: Sequence[str], bad: Sequence[Bad], file: pathlib.Path | None
) -> str:
    """Return one line: the step, the terms, the rows, and the file of their texts."""
    terms = dict.fromkeys(what for one in bad for what in one.what) or dict.fromkeys(names)
    line = f"step {step}: {', '.join(terms)} not finite"
    if not bad:
        return line
    rows = ", ".join(f"{one.kind} {one.row}" for one in bad)
    more = " and maybe others" if len(bad) >= _MOST else ""
    return f"{line} in {rows}{more}" + (f" (texts in {file})" if file else "")


def leave_out(state: State, rules: Rules, problem: str) -> tuple[State, dict[str, float]]:
    """Count a skipped update and print a warning; return the new state and its metrics.

    Raises NonFiniteError where `guard.skip_nonfinite` updates were skipped before.
    """
    if state.skipped >= rules.skip_nonfinite:
        raise NonFiniteError(
            f"{problem}; the parameters are unchanged: lower --config.optim.learning_rate, or skip such "
            f"updates with --config.guard.skip_nonfinite={rules.skip_nonfinite + 10}"
        )
    if multihost.first():
        print(f"warning: {problem}; left out", flush=True)
    state = dataclasses.replace(state, skipped=state.skipped + 1)
    return state, {"guard/skipped": float(state.skipped)}
