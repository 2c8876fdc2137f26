"""The weights of a run, each model loaded once from its folder, in the dtype it is used in."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from opd_jax import models
from opd_jax.models import decoder
from opd_jax.sharding import replica_check
from opd_jax.sharding.partition import unwrapped
from opd_jax.training.roles import compute_dtype
from opd_jax.training.setup import Setup
from opd_jax.training.step_functions import StepFunctions
from opd_jax.types import TrainState


@dataclasses.dataclass
class Weights:
    """The models of a run as loaded; None where a model is not needed.

    `scorer` is the teacher with the rows of its output matrix in the order of the student's ids.
    """

    student: models.Params | None
    teacher: models.Params | None
    scorer: models.Params | None
    reference: models.Params | None


def load_weights(setup: Setup, *, student: bool) -> Weights:
    """Load the models; the student, as float32 masters, only if `student`, where no checkpoint holds it."""
    config, alignment, mesh = setup.config, setup.alignment, setup.mesh

    def load(path: str, dtype: str, shardings: Any) -> models.Params:
        shardings = shardings if mesh.devices else None
        return models.load(path, dtype=compute_dtype(dtype), shardings=shardings)[1]

    def shardings_of(model: models.ModelConfig, role: str) -> Any:
        return unwrapped(mesh.weights(mesh.slices(decoder.abstract_params(model), role)))

    teacher = scorer = reference = None
    if setup.teacher is not None and config.teacher.follow == "frozen":
        path, dtype = config.teacher.path, config.teacher.dtype
        teacher = scorer = load(path, dtype, shardings_of(setup.teacher, "teacher"))
        if alignment.head_rows is not None:
            scorer = models.with_head_rows(teacher, jnp.asarray(alignment.head_rows))
        teacher, scorer = (mesh.reshard(weights, "teacher") for weights in (teacher, scorer))
    if setup.terms.needs_reference:
        path, dtype = setup.reference_section.path, config.reference.dtype
        same = (path, dtype) == (config.teacher.path, config.teacher.dtype)
        # Self-distillation: one copy of the weights for both.
        if same and teacher is not None:
            reference = teacher
        else:
            reference = load(path, dtype, shardings_of(setup.reference, "reference"))
            reference = mesh.reshard(reference, "reference")
    masters = None
    if student:
        shardings = mesh.masters(decoder.abstract_params(setup.student))
        masters = load(config.student.path, "float32", shardings)
    return Weights(masters, teacher, scorer, reference)


def require_equal_replicas(
    number: int, state: TrainState, functions: StepFunctions, weights: Weights
) -> None:
    """Raise CopiesError where devices hold different weights or optimizer state."""
    if functions.spec.mesh.devices is None:
        return
    held = {"state": state, "weights": functions.compute_weights(state.params)}
    if weights.scorer is not None:
        held["teacher"] = weights.scorer
    if weights.reference is not None:
        held["reference"] = weights.reference
    replica_check.require_equal(held, when=f"after step {number}")
