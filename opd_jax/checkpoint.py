"""Checkpoints by Orbax: train state and data iterator. Teacher and reference are never saved.

Random keys need no saving: each is derived from (seed, step, stream). To resume: build everything
from config.json, restore the newest step, cut the logs back to it, go on.
"""

import pathlib
from types import TracebackType
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from opd_jax.types import TrainState


class Checkpoints:
    """The `checkpoints/` folder of a workdir; a context manager that waits for writes to finish."""

    def __init__(self, workdir: pathlib.Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Newest complete step, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: Any) -> None:
        """Write `step` in the background; the iterator's state is taken now."""
        if step == self.latest:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data)
            ),
        )

    def restore(self, state: TrainState, data: Any) -> TrainState:
        """The newest state, laid out like `state` (which gives shapes); moves the iterator `data`."""
        restored = self._manager.restore(
            self.latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(
                    jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
                ),
                data=grain.checkpoint.CheckpointRestore(data),
            ),
        )
        return restored["state"]
