"""The checkpoint that did best on the held-out problems, beside the newest ones.

WORKDIR/best/ has config.json and checkpoints/ as a workdir has them, so launch/export.py and
launch/evaluate.py take it for one; best.json says which step it is and how good.
"""

import json
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from opd_jax.checkpoint import manifest
from opd_jax.checkpoint.checkpoint import Checkpoints
from opd_jax.errors import ConfigError
from opd_jax.sharding import multihost
from opd_jax.workdir import atomic


class Best:
    """WORKDIR/best/, kept by one metric of the evaluations; more is better, or less."""

    def __init__(self, workdir: pathlib.Path, *, metric: str, more: bool):
        self._workdir, self._folder = workdir, workdir / "best"
        self._metric, self._more = metric, more

    @property
    def record(self) -> dict[str, Any] | None:
        """step, metric and value of what is kept; None where nothing is, or by another metric."""
        file = self._folder / "best.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        return found if found and found["metric"] == self._metric else None

    def offer(
        self,
        step: int,
        summary: dict[str, float],
        save: Callable[[Checkpoints], None],
        *,
        comparable: Callable[[int], bool] = lambda _: True,
    ) -> bool:
        """Keep `step` if it is better than what is kept; `save` writes it. Equal is not better.

        `comparable`: whether the evaluation of a step was made as this one was. What is kept by another
        is replaced, whatever its value. Raises ConfigError where the evaluation did not measure the metric.
        """
        if self._metric not in summary:
            raise ConfigError(
                f"eval.best={self._metric}, but the held-out problems give only {', '.join(summary)}; set "
                "--config.eval.best to one of these, or name problems with answers by --config.eval.data"
            )
        value, kept = summary[self._metric], multihost.from_first(lambda: self.record)
        if math.isnan(value):
            return False
        if kept is not None and not comparable(kept["step"]):
            kept = None
        if kept is not None and (value <= kept["value"] if self._more else value >= kept["value"]):
            return False
        self._folder.mkdir(exist_ok=True)
        if multihost.first():
            config = (self._workdir / "config.json").read_text(encoding="utf-8")
            atomic.write_text(self._folder / "config.json", config)
        with Checkpoints(self._folder, keep=1) as saved:
            saved.delete_after(step - 1)  # of before a rollback, this step's too
            save(saved)
        if multihost.first():
            found = {"step": step, "metric": self._metric, "value": value}
            atomic.write_json(self._folder / "best.json", found)  # after what it speaks of
        return True


def forget_after(workdir: pathlib.Path, step: int) -> None:
    """Remove best/ where it keeps a step after `step`: the trajectory that led to it is discarded."""
    folder = workdir / "best"

    def newest() -> int:
        file = folder / "best.json"
        found = json.loads(file.read_text(encoding="utf-8"))["step"] if file.exists() else -1
        return max(found, *manifest.steps(folder / "checkpoints"), -1)

    if multihost.from_first(newest) <= step:
        return
    if multihost.first():
        (folder / "best.json").unlink(missing_ok=True)  # first: it speaks of the rest
        shutil.rmtree(folder)
    multihost.agree({})
