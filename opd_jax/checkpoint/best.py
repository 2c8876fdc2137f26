"""The best checkpoint by a metric of the held-out problems, kept in addition to the newest ones.

WORKDIR/best/ has config.json and checkpoints/ like a workdir, so launch/export.py and launch/evaluate.py
accept it as one; best.json has its step and value.
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
    """WORKDIR/best/, selected by one metric of the evaluations. `more`: a larger value is better."""

    def __init__(self, workdir: pathlib.Path, *, metric: str, more: bool):
        self._workdir, self._folder = workdir, workdir / "best"
        self._metric, self._more = metric, more

    @property
    def record(self) -> dict[str, Any] | None:
        """Step, metric and value of the kept checkpoint; None without one, or with one by another metric."""
        file = self._folder / "best.json"
        record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        return record if record and record["metric"] == self._metric else None

    def offer(
        self,
        step: int,
        summary: dict[str, float],
        save: Callable[[Checkpoints], None],
        *,
        comparable: Callable[[int], bool] = lambda _: True,
    ) -> bool:
        """Keep `step` if it is strictly better than the kept one; `save` writes it. Return whether it is.

        `comparable`: whether the evaluation of a step had the same settings as this one. A kept step whose
        evaluation had other settings is replaced, whatever its value. Raises ConfigError where the
        evaluation did not measure the metric.
        """
        if self._metric not in summary:
            raise ConfigError(
                f"eval.best={self._metric}, but evaluation of the held-out problems gives only "
                f"{', '.join(summary)}; set "
                "--config.eval.best to one of these, or --config.eval.data to problems with answers"
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
            saved.delete_after(step - 1)  # a rollback may have left this step or later ones
            save(saved)
        if multihost.first():
            record = {"step": step, "metric": self._metric, "value": value}
            atomic.write_json(
                self._folder / "best.json", record
            )  # after the checkpoint is complete
        return True


def forget_after(workdir: pathlib.Path, step: int) -> None:
    """Remove best/ if it keeps a step after `step`, whose trajectory is discarded."""
    folder = workdir / "best"

    def newest() -> int:
        file = folder / "best.json"
        recorded = json.loads(file.read_text(encoding="utf-8"))["step"] if file.exists() else -1
        return max(recorded, *manifest.steps(folder / "checkpoints"), -1)

    if multihost.from_first(newest) <= step:
        return
    if multihost.first():
        (folder / "best.json").unlink(missing_ok=True)  # first, because it refers to the rest
        shutil.rmtree(folder)
    multihost.agree({})
