"""Failures that no input explains, in one line each: a disk that is full or gone, a device out of memory."""

import contextlib
import dataclasses
import errno
import os
import pathlib
from collections.abc import Iterator

import jax

from opd_jax.checkpoint import manifest
from opd_jax.errors import OpdError, PlanError, WorkdirError
from opd_jax.memory_plan import memory
from opd_jax.memory_plan.report import RunPlan, amount
from opd_jax.metrics.tracing import stage_of

_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.ESTALE,
    errno.EPERM,
)  # fmt: skip
_LESS = 0.8  # of what the stage was planned to take: what to change is searched for this much


@contextlib.contextmanager
def explained(folder: pathlib.Path, plan: RunPlan | None) -> Iterator[None]:
    """Turn such a failure of the run in `folder` into its OpdError; others pass."""
    try:
        yield
    except OpdError:
        raise
    except OSError as error:
        if error.errno not in _DISK or not _inside(error, folder):
            raise
        raise WorkdirError(_of_disk(error, folder)) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise PlanError(_of_memory(error, plan)) from error


def _inside(error: OSError, folder: pathlib.Path) -> bool:
    """Whether it is about the workdir: a write that fails names no file."""
    name = error.filename
    return name is None or os.path.abspath(os.fsdecode(name)).startswith(str(folder.absolute()))


def _of_disk(error: OSError, folder: pathlib.Path) -> str:
    steps = manifest.steps(folder / "checkpoints")
    kept = f"checkpoint {steps[-1]} is whole" if steps else "there is no checkpoint yet"
    free = amount(manifest.free_bytes(folder))
    return (
        f"workdir {str(folder)!r} cannot be written any more ({error.strerror}; {free} free); {kept}: "
        "mend the disk, and run the same command again to go on"
    )


def _of_memory(error: Exception, plan: RunPlan | None) -> str:
    """The stage, what the plan had for it, and the fields that would make it smaller."""
    name = stage_of(error)
    reason = " ".join(str(error).split())[:160]
    text = f"out of device memory in {name or 'an unnamed stage'} ({reason})"
    fields = "set a smaller --config.optim.microbatch_tokens and --config.rollout.slots"
    if plan is None:
        return f"{text}; {fields}"
    stages = [one for one in plan.memory.stages if one.name == name]
    stage = max(stages or [plan.memory.peak], key=lambda one: one.total)
    held = sorted(stage.held.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{kind} {amount(size)}" for kind, size in held)
    small = dataclasses.replace(plan.memory, usable=_LESS * stage.total, margin=0.0)
    return (
        f"{text}; planned were {amount(stage.total)} of {amount(plan.memory.usable)} ({parts}): "
        f"{memory.remedy(small)}"
    )
