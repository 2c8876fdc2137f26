"""Checkpoints by Orbax: train state and data iterator. Teacher and reference are never saved.

Random keys need no saving: each is derived from (seed, step, stream). To resume: build everything
from config.json, restore the newest step, cut the logs back to it, go on.
"""

import json
import pathlib
from types import TracebackType
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from opd_jax.errors import WorkdirError
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

    @property
    def steps(self) -> list[int]:
        """All complete steps, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, data: Any, guard: str) -> None:
        """Write `step` in the background; the iterator's state is taken now."""
        if step == self.latest:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(data),
                guard=ocp.args.JsonSave({"state": guard}),
            ),
        )

    def delete_after(self, step: int) -> None:
        """Remove what is newer than `step`."""
        self._manager.wait_until_finished()
        for later in self.steps:
            if later > step:
                self._manager.delete(later)

    def guard(self, step: int) -> str:
        """What was saved of the guard at `step`."""
        restored = self._manager.restore(
            step, args=ocp.args.Composite(guard=ocp.args.JsonRestore())
        )
        return restored["guard"]["state"]

    def restore(self, step: int, state: TrainState, data: Any) -> TrainState:
        """The state of `step`, of the shapes, dtypes and places of `state`; moves the iterator `data`.

        Where `state` says no place it is the first device.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def placed(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device
            )

        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(jax.tree.map(placed, state)),
            ),
        )
        data.set_state(self._iterator(step))
        return restored["state"]

    def _iterator(self, step: int) -> Any:
        """The state of the data iterator at `step`: of every process the same, however many there were."""
        folder = pathlib.Path(self._manager.directory) / str(step) / "data"
        for file in sorted(folder.glob("process_*.json")):
            return json.loads(file.read_text(encoding="utf-8"))
        raise WorkdirError(
            f"{folder}: holds no state of the data; restore the folder, or delete checkpoint {step} "
            "to go on from the one before"
        )


def latest_step(workdir: pathlib.Path) -> int | None:
    """Newest complete step of a workdir, None where there is none; changes nothing."""
    folder = (workdir / "checkpoints").absolute()
    if not folder.is_dir():
        return None
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False)) as found:
        return found.latest_step()


def restore_params(
    workdir: pathlib.Path, abstract_params: Any, *, step: int | None = None
) -> tuple[int, Any]:
    """Read only the parameters of a step (default: the newest) -> (step, host arrays).

    `abstract_params` gives their tree and shapes; the optimiser's state is left on the disk.
    Nothing in the workdir is changed.

    Raises WorkdirError: no checkpoint, not this step, or one of another model or damaged.
    """
    folder = (workdir / "checkpoints").absolute()
    if not folder.is_dir():
        raise WorkdirError(
            f"workdir {str(workdir)!r} holds no checkpoints/; wait for the run's first checkpoint, "
            "or give the workdir of a run"
        )
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise WorkdirError(
                f"workdir {str(workdir)!r} holds no finished checkpoint; "
                "wait for the run's first one, or resume the run"
            )
        step = steps[-1] if step is None else step
        if step not in steps:
            raise WorkdirError(
                f"workdir {str(workdir)!r} has no checkpoint of step {step}; "
                f"there are those of {', '.join(map(str, steps))}"
            )
        item = {"params": abstract_params}
        host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        try:
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(item, restore_args=host, partial_restore=True)
                ),
            )
        except Exception as error:  # Orbax and TensorStore raise whatever their parts raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise WorkdirError(
                f"{folder / str(step)}: cannot restore the parameters ({reason:.200}); it is damaged "
                "or of another model: export an earlier step with --step"
            ) from error
    params = restored["state"]["params"]
    got, want = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (params, abstract_params))
    if got != want:
        raise WorkdirError(
            f"{folder / str(step)}: its parameters have other shapes than student.path of "
            "config.json asks for; restore the model folder that the run started from"
        )
    return step, params
