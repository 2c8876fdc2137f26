"""Where a run goes on: what its newest checkpoint, or a rollback that was cut short, says of that."""

import dataclasses
import json
import pathlib
import time

from opd_jax.checkpoint.checkpoint import Checkpoints
from opd_jax.sharding import multihost
from opd_jax.training import collapse_guard, nonfinite
from opd_jax.workdir import atomic

Pending = tuple[dict[str, float], list[dict]]  # metrics and rollouts of a step, not yet logged
_ROLLBACK = "rollback.json"  # what a rollback is about, until a later checkpoint knows of it
_RECENT = 50


@dataclasses.dataclass(frozen=True)
class Point:
    """The step to go on from.

    Attributes:
      pending: of that step, where the run was ended before its evaluation: it comes first.
    """

    step: int
    guard: collapse_guard.State
    numerics: nonfinite.State
    pending: Pending | None


def point(folder: pathlib.Path, saved: Checkpoints) -> Point:
    """The newest checkpoint; or the one that a rollback which was cut short was going back to."""
    newest = saved.latest
    assert newest is not None
    state = collapse_guard.from_json(saved.beside(newest)["state"])
    noted = multihost.from_first(lambda: _noted(folder))
    last = None if noted is None else (noted["step"], collapse_guard.from_json(noted["guard"]))
    step, state = collapse_guard.resumed((newest, state), last)
    beside = saved.beside(step)
    pending = beside.get("pending") if step == newest else None
    return Point(
        step,
        state,
        nonfinite.from_json(beside.get("numerics")),
        None if pending is None else (pending[0], pending[1]),
    )


def note_rollback(folder: pathlib.Path, step: int, state: collapse_guard.State) -> None:
    """Say where a rollback goes, before it touches anything."""
    if multihost.first():
        atomic.write_json(
            folder / _ROLLBACK, {"step": step, "guard": collapse_guard.to_json(state)}
        )


def _noted(folder: pathlib.Path) -> dict | None:
    file = folder / _ROLLBACK
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


class Pace:
    """How long it may take from one step to the next, by the last ones."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._laps: list[float] = []

    def lap(self) -> float:
        """A step has ended. Seconds that another one, and saving, should be given: twice the longest
        of the last, of which the process's first, which compiled, is none."""
        now = time.monotonic()
        self._laps = [*self._laps, now - self._last][-_RECENT:]
        self._last = now
        return 2 * max(self._laps[1:] or self._laps)
