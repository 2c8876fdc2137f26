"""The student of a run's checkpoint: its weights, or its adapters merged into their base."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from opd_jax import models
from opd_jax.checkpoint import resume
from opd_jax.checkpoint.checkpoint import recorded, restore_params
from opd_jax.models import decoder, low_rank
from opd_jax.models.fingerprint import fingerprint
from opd_jax.models.low_rank import LowRank
from opd_jax.training.roles import make_low_rank
from opd_jax.workdir.folder import read_config


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a checkpoint; host arrays.

    Attributes:
      base_hash: of the tensors of the base that they were trained beside.
    """

    step: int
    params: models.Params
    low_rank: LowRank
    base_hash: str


def restore_student(
    workdir: pathlib.Path, model: models.ModelConfig, *, step: int | None = None
) -> tuple[int, models.Params]:
    """Read the student of a step (default: the newest), adapters merged; return (step, float32 host arrays).

    Adapters are merged into the tensors of the run's `student.path`. Raises WorkdirError as `restore_params`
    does, and where these are not the base of the adapters; ModelError where the folder is gone.
    """
    found = restore_adapters(workdir, model, step=step)
    if found is None:
        return restore_params(workdir, decoder.abstract_params(model), step=step)
    base = models.load(read_config(workdir)["student"]["path"], dtype=np.float32)[1]
    merged = low_rank.merge(low_rank.join(base, found.params), found.low_rank.scale)
    return found.step, jax.tree.map(np.asarray, merged)


def restore_adapters(
    workdir: pathlib.Path, model: models.ModelConfig, *, step: int | None = None
) -> Adapters | None:
    """Read the adapters of a step (default: the newest); None for a run that trains all weights.

    Raises as `restore_student` does.
    """
    config: dict[str, Any] = read_config(workdir)
    spec = make_low_rank(config.get("lora", {"rank": 0}))  # runs of older versions lack it
    if spec is None:
        return None
    like = low_rank.abstract_adapters(model, spec)
    step, params = restore_params(workdir, like, step=step)
    base_hash = fingerprint(config["student"]["path"])
    resume.require_base(recorded(workdir, step), base_hash)
    return Adapters(step, params, spec, base_hash)
