"""Where a run resumes: at its newest checkpoint, or at the target of an interrupted rollback."""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from opd_jax import workdir
from opd_jax.checkpoint import manifest
from opd_jax.checkpoint.checkpoint import Checkpoints, bytes_of
from opd_jax.errors import WorkdirError
from opd_jax.sharding import multihost
from opd_jax.training import collapse_guard, nonfinite
from opd_jax.training.step_functions import StepFunctions
from opd_jax.workdir import atomic

Pending = tuple[dict[str, float], list[dict]]  # metrics and rollouts of a step, not yet logged
# Target and guard state of a rollback, until a later checkpoint has them.
_ROLLBACK = "rollback.json"
_RECENT = 50
_BASE = "base_sha256"


@dataclasses.dataclass(frozen=True)
class Point:
    """The step to resume from.

    Attributes:
      pending: metrics and rollouts of that step where the run ended before its evaluation, which is then
        done first.
    """

    step: int
    guard: collapse_guard.State
    numerics: nonfinite.State
    pending: Pending | None


def point(folder: pathlib.Path, saved: Checkpoints) -> Point:
    """Return the newest checkpoint, or the target of a rollback that was interrupted."""
    newest = saved.latest
    assert newest is not None
    state = collapse_guard.from_json(saved.extras(newest)["state"])
    record = multihost.from_first(lambda: _rollback_record(folder))
    last = None if record is None else (record["step"], collapse_guard.from_json(record["guard"]))
    step, state = collapse_guard.resumed((newest, state), last)
    extras = saved.extras(step)
    pending = extras.get("pending") if step == newest else None
    return Point(
        step,
        state,
        nonfinite.from_json(extras.get("numerics")),
        None if pending is None else (pending[0], pending[1]),
    )


def note_rollback(folder: pathlib.Path, step: int, state: collapse_guard.State) -> None:
    """Record the target of a rollback before the rollback changes anything."""
    if multihost.first():
        atomic.write_json(
            folder / _ROLLBACK, {"step": step, "guard": collapse_guard.to_json(state)}
        )


def _rollback_record(folder: pathlib.Path) -> dict | None:
    file = folder / _ROLLBACK
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def base_record(base_hash: str) -> dict[str, Any]:
    """Return what a checkpoint records of the base of its adapters: a hash of tensors; {} without one."""
    return {_BASE: base_hash} if base_hash else {}


def require_base(extras: Mapping[str, Any], base_hash: str) -> None:
    """Raise WorkdirError where a checkpoint's adapters belong to another base than that of the hash."""
    recorded = extras.get(_BASE, "")
    if recorded != base_hash:
        raise WorkdirError(
            f"the checkpoint's adapters belong to a base with the hash {recorded[:12] or 'of none'}, and the "
            f"tensors of student.path have {base_hash[:12]}; restore the model folder that the run started "
            "from, or give a new --workdir"
        )


def schedule_moved(folder: pathlib.Path, config: ConfigDict) -> list[str]:
    """Return a line if a resumed run has another number of steps and its learning rate depends on it."""
    before = workdir.read_config(folder)["steps"]
    moving = config.optim.schedule != "constant" or config.optim.warmup_fraction
    if before == config.steps or not moving:
        return []
    return [
        f"note: steps was {before} and is {config.steps}; the learning rate of the steps to come is that "
        f"of a run of {config.steps} (optim.schedule={config.optim.schedule}, "
        f"optim.warmup_fraction={config.optim.warmup_fraction:g})"
    ]


def require_disk(functions: StepFunctions, folder: pathlib.Path, first: int) -> None:
    """Raise WorkdirError where the disk cannot hold all checkpoints that exist at one time."""
    config = functions.spec.config
    section = config.checkpoint
    remaining = math.ceil((config.steps - first) / (section.every or config.steps))
    existing = multihost.from_first(lambda: len(manifest.steps(folder / "checkpoints")))
    copies = max(min(section.keep + 1 - existing, remaining), min(remaining, 1))
    # The best one is removed only when a better one is complete, so two may exist.
    copies += 2 if config.eval.best and remaining else 0
    state = functions.abstract_state()
    size = bytes_of(state) + bytes_of(state.params) * bool(config.jump.problems)
    manifest.require_room(folder, size, copies, what=f"a run with checkpoint.keep={section.keep}")


class Pace:
    """Estimate of how long a step may take, from the last steps."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._laps: list[float] = []

    def lap(self) -> float:
        """Record the end of a step; return seconds to allow for another step and a checkpoint.

        That is twice the longest of the last steps, without the process's first one, which compiled.
        """
        now = time.monotonic()
        self._laps = [*self._laps, now - self._last][-_RECENT:]
        self._last = now
        return 2 * max(self._laps[1:] or self._laps)
