"""Checkpoints in Orbax's format: train state and data iterator. Teacher and reference are never saved.

Random keys need no saving: each is derived from (seed, step, stream). To resume: build everything
from config.json, restore the newest step, cut the logs back to it, continue.
"""

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from opd_jax.checkpoint import manifest
from opd_jax.errors import OpdError, WorkdirError
from opd_jax.sharding import multihost
from opd_jax.types import TrainState

_SNAPSHOT = "snapshot"  # the item of a checkpoint that holds the weights at the last jump
_UNSCHEDULED = "unscheduled"  # an empty file that marks a checkpoint as not counting for `keep`


class Checkpoints:
    """The `checkpoints/` folder of a workdir; a context manager that waits for writes to finish.

    A checkpoint exists when it is complete and contains its manifest (manifest.py). The newest `keep` of
    the scheduled ones are kept, and the newest of all: one that an early end wrote does not count, and is
    removed when a newer one is complete. So an old one that a rollback needs survives any number of restarts.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: int):
        self._workdir, self._keep, self._writing = workdir, keep, -1
        self._folder = (workdir / "checkpoints").absolute()
        if multihost.first():
            manifest.clear(self._folder)
        self._unscheduled: set[int] = set(multihost.from_first(self._marked))
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            self.wait()
            self._manager.close()
        except Exception:
            if kind is None:  # otherwise the first error is the one to report
                raise

    @property
    def latest(self) -> int | None:
        """Newest complete step, None where there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """All complete steps, in order, and the one that is being written."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        data: Any,
        guard: str,
        *,
        extras: Any = None,
        snapshot: Any = None,
        scheduled: bool = True,
    ) -> None:
        """Write `step` in the background; the iterator's state is copied now.

        `extras`: further values, a dict that JSON can hold. `snapshot`: the weights at the last jump
        (training/jump.py), host arrays; None without. `scheduled`: whether it counts for `keep`.
        Raises WorkdirError where this or the previous one cannot be written; complete ones remain.
        """
        if step == self.latest:
            return
        self.wait()
        size = bytes_of(state) + bytes_of(snapshot)
        manifest.require_room(self._workdir, size, 1, what=f"checkpoint {step}")
        self._writing = step
        if not scheduled:
            self._unscheduled.add(step)
        items = {
            "state": ocp.args.StandardSave(state),
            "data": grain.checkpoint.CheckpointSave(data),
            "guard": ocp.args.JsonSave({"state": guard} | (extras or {})),
        }
        if snapshot is not None:
            items[_SNAPSHOT] = ocp.args.StandardSave(snapshot)
        with self._reported():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete; then remove those that are not kept."""
        self._settle()
        steps = self.steps
        scheduled = [step for step in steps if step not in self._unscheduled]
        kept = {*scheduled[-self._keep :], *steps[-1:]}
        self._remove([step for step in steps if step not in kept])

    def delete_after(self, step: int) -> None:
        """Remove every checkpoint newer than `step`."""
        self._settle()  # `step` may be the oldest of more than `keep`
        self._remove([later for later in self.steps if later > step])

    def _settle(self) -> None:
        with self._reported():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def _remove(self, steps: list[int]) -> None:
        # Each process lists the folder for itself, and a network disk may show them different listings.
        steps = multihost.from_first(lambda: steps)
        if not steps:
            return
        if multihost.first():
            for step in reversed(steps):  # newest first: an interruption leaves the oldest ones
                manifest.remove(self._folder, step)
        multihost.agree({})
        self._unscheduled -= set(steps)
        self._manager.reload()

    def _marked(self) -> list[int]:
        """Return the steps of checkpoints that are marked as unscheduled."""
        return [
            step
            for step in manifest.steps(self._folder)
            if (self._folder / str(step) / _UNSCHEDULED).exists()
        ]

    def _seal(self) -> None:
        """Write the manifest; Orbax calls this in a thread after the last write, before the rename."""
        if multihost.first():
            for folder in manifest.unfinished(self._folder, self._writing):
                if self._writing in self._unscheduled:
                    (folder / _UNSCHEDULED).touch()
                manifest.seal(folder)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn Orbax's and TensorStore's errors about a full or lost disk into one line."""
        try:
            yield
        except OpdError:
            raise
        except Exception as error:  # they may raise any type of error
            complete = manifest.steps(self._folder)
            previous = (
                f"checkpoint {complete[-1]} is complete"
                if complete
                else "there is no earlier checkpoint"
            )
            free = manifest.free_bytes(self._workdir) / manifest.GIB
            raise WorkdirError(
                f"{self._folder / str(self._writing)} could not be written ({_reason(error)}; "
                f"{free:.2f} GiB free); {previous}; make room, and run the same command again to resume"
            ) from error

    def extras(self, step: int) -> dict[str, Any]:
        """Return the values saved with the arrays of `step`; `state` is the guard's, as text."""
        restored = self._manager.restore(
            step, args=ocp.args.Composite(guard=ocp.args.JsonRestore())
        )
        return restored["guard"]

    def restore(self, step: int, state: TrainState, data: Any) -> TrainState:
        """Restore the state of `step` with shapes, dtypes and shardings of `state`; set the iterator `data`.

        Where `state` has no shardings, the arrays are uncommitted on the default device, like the weights
        that a run starts from. Committed arrays would make every program compile again.
        """
        committed = all(getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(state))
        try:
            # Orbax returns host arrays where the target has host arrays. Those of the target are never
            # written, so they take no memory.
            target = state
            if not committed:
                target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), state)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            restored = self._manager.restore(step, args=args)["state"]
        except Exception as error:
            raise WorkdirError(
                f"{self._folder / str(step)}: cannot be restored ({_reason(error)}); move the folder "
                "elsewhere to resume from the checkpoint before it"
            ) from error
        data.set_state(self._iterator(step))
        return restored if committed else jax.tree.map(jnp.array, restored)

    def snapshot(self, step: int, params: Any) -> Any:
        """Return the snapshot saved with `step`, host arrays like `params`; None where it has none."""
        if not (self._folder / str(step) / _SNAPSHOT).exists():
            return None
        target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), params)
        args = ocp.args.Composite(**{_SNAPSHOT: ocp.args.StandardRestore(target)})
        return self._manager.restore(step, args=args)[_SNAPSHOT]

    def _iterator(self, step: int) -> Any:
        """Return the state of the data iterator at `step`, which is the same in every process."""
        folder = pathlib.Path(self._manager.directory) / str(step) / "data"
        for file in sorted(folder.glob("process_*.json")):
            return json.loads(file.read_text(encoding="utf-8"))
        raise WorkdirError(
            f"{folder}: has no state of the data iterator; restore the folder, or delete checkpoint "
            f"{step} to resume from the one before"
        )


def latest_step(workdir: pathlib.Path) -> int | None:
    """Return the newest complete step of a workdir, None where there is none; changes nothing."""
    folder = (workdir / "checkpoints").absolute()
    if not folder.is_dir():
        return None
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        return manager.latest_step()


def restore_params(
    workdir: pathlib.Path, abstract_params: Any, *, step: int | None = None
) -> tuple[int, Any]:
    """Read only the parameters of a step (default: the newest); return (step, host arrays).

    `abstract_params` has their tree and shapes; the optimizer's state is not read. Nothing in the
    workdir is changed.

    Raises WorkdirError where there is no checkpoint of this step, or it is damaged or has another model.
    """
    folder = (workdir / "checkpoints").absolute()
    if not folder.is_dir():
        raise WorkdirError(
            f"workdir {str(workdir)!r} has no checkpoints/; wait for the run's first checkpoint, "
            "or give the workdir of another run"
        )
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise WorkdirError(
                f"workdir {str(workdir)!r} has no complete checkpoint; "
                "wait for the run's first one, or resume the run"
            )
        step = steps[-1] if step is None else step
        if step not in steps:
            raise WorkdirError(
                f"workdir {str(workdir)!r} has no checkpoint of step {step}; "
                f"it has those of {', '.join(map(str, steps))}; set --step to one of these"
            )
        if reason := manifest.damage(folder / str(step)):
            raise WorkdirError(
                f"{folder / str(step)}: damaged ({reason}); set --step to an earlier step"
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
        except Exception as error:  # Orbax and TensorStore may raise any type of error
            raise WorkdirError(
                f"{folder / str(step)}: cannot restore the parameters ({_reason(error)}); it is damaged "
                "or belongs to another model; set --step to an earlier step"
            ) from error
    params = restored["state"]["params"]
    actual, expected = (
        jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (params, abstract_params)
    )
    if actual != expected:
        raise WorkdirError(
            f"{folder / str(step)}: its parameters have other shapes than the model at student.path of "
            "config.json; restore the model folder that the run started from"
        )
    return step, params


def recorded(workdir: pathlib.Path, step: int) -> dict[str, Any]:
    """Return the values saved beside the arrays of a step, as `Checkpoints.extras`; changes nothing."""
    folder = (workdir / "checkpoints").absolute()
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        args = ocp.args.Composite(guard=ocp.args.JsonRestore())
        return manager.restore(step, args=args)["guard"]


def bytes_of(tree: Any) -> int:
    """Return the bytes of all arrays (or shapes), each counted once however many devices hold it."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _reason(error: Exception) -> str:
    """Shorten a long error of Orbax or TensorStore to one line: its beginning and its end."""
    text = " ".join((str(error).strip() or type(error).__name__).split())
    return text if len(text) <= 200 else f"{text[:80]} ... {text[-100:]}"
