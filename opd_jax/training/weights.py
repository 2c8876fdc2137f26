"""The weights of a run, each model loaded once from its folder, in the dtype it is used in."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from opd_jax import models
from opd_jax.models import decoder
from opd_jax.sharding import replica_check, waiting
from opd_jax.sharding.mesh import Mesh
from opd_jax.sharding.partition import unwrapped
from opd_jax.training.roles import compute_dtype
from opd_jax.training.setup import Setup
from opd_jax.training.step_functions import StepFunctions
from opd_jax.types import TrainState


@dataclasses.dataclass
class Weights:
    """The models of a run as loaded; None where a model is not needed.

    Attributes:
      scorer: the teacher with the rows of its output matrix in the order of the student's ids.
      others: the scorers of further teachers; those of one folder are the same object.
      wait: whether teachers are host arrays, which `placed` puts on the devices.
    """

    student: models.Params | None
    teacher: models.Params | None
    scorer: models.Params | None
    reference: models.Params | None
    others: tuple[models.Params | None, ...] = ()
    wait: bool = False

    @property
    def scorers(self) -> tuple[models.Params | None, ...]:
        """What scores, of all teachers, the first one first."""
        return (self.scorer, *self.others)

    def placed(self, teacher: models.Params | None, mesh: Mesh) -> models.Params | None:
        """Return a teacher's weights on the devices, where they are already unless teachers wait."""
        return waiting.place(teacher, mesh) if self.wait and teacher is not None else teacher


def load_weights(setup: Setup, *, student: bool) -> Weights:
    """Load the models; the student, as float32 masters, only if `student`, where no checkpoint holds it."""
    config, alignment, mesh = setup.config, setup.alignment, setup.mesh

    def load(path: str, dtype: str, shardings: Any) -> models.Params:
        shardings = shardings if mesh.devices else None
        return models.load(path, dtype=compute_dtype(dtype), shardings=shardings)[1]

    def scorer_of(teacher: models.Params, head_rows: Any) -> models.Params:
        return (
            teacher if head_rows is None else models.with_head_rows(teacher, jnp.asarray(head_rows))
        )

    def shardings_of(model: models.ModelConfig, role: str) -> Any:
        return unwrapped(mesh.weights(mesh.slices(decoder.abstract_params(model), role)))

    teacher = scorer = reference = None
    if setup.teacher is not None and config.teacher.follow == "frozen":
        path, dtype = config.teacher.path, config.teacher.dtype
        teacher = load(path, dtype, shardings_of(setup.teacher, "teacher"))
        scorer = scorer_of(teacher, alignment.head_rows)
        teacher, scorer = (mesh.reshard(weights, "teacher") for weights in (teacher, scorer))
    host = bool(setup.others) and config.teachers.wait == "host"
    if host:
        teacher, scorer = waiting.to_host((teacher, scorer))
    by_path = {config.teacher.path: scorer}
    for other in setup.others:
        if other.path not in by_path:
            loaded = load(other.path, config.teacher.dtype, shardings_of(other.model, "teacher"))
            own = mesh.reshard(scorer_of(loaded, other.head_rows), "teacher")
            by_path[other.path] = waiting.to_host(own) if host else own
    if setup.terms.needs_reference:
        path, dtype = setup.reference_section.path, config.reference.dtype
        same = (path, dtype) == (config.teacher.path, config.teacher.dtype)
        # Self-distillation: one copy of the weights for both.
        if same and teacher is not None and not host:
            reference = teacher
        else:
            reference = load(path, dtype, shardings_of(setup.reference, "reference"))
            reference = mesh.reshard(reference, "reference")
    masters = None
    if student:
        shardings = mesh.masters(decoder.abstract_params(setup.student))
        masters = load(config.student.path, "float32", shardings)
    others = tuple(by_path[other.path] for other in setup.others)
    return Weights(masters, teacher, scorer, reference, others, host)


def require_equal_replicas(
    number: int, state: TrainState, functions: StepFunctions, weights: Weights
) -> None:
    """Raise CopiesError where devices hold different weights or optimizer state."""
    if functions.spec.mesh.devices is None:
        return
    held = {"state": state, "weights": functions.compute_weights(state.params)}
    if not weights.wait:
        scorers = dict(enumerate(weights.scorers))
        held |= {f"teacher {i}": scorer for i, scorer in scorers.items() if scorer is not None}
    if weights.reference is not None:
        held["reference"] = weights.reference
    replica_check.require_equal(held, when=f"after step {number}")
