"""The weights of a run, each model loaded once from its folder, in the dtype it is used in."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import models
from opd_jax.models import decoder, hf_adapters, low_rank
from opd_jax.models.fingerprint import fingerprint
from opd_jax.models.low_rank import LowRank
from opd_jax.rng import Stream, key_for
from opd_jax.sharding import multihost, replica_check, waiting
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
      student: the float32 masters at the start, of the student or of its adapters.
      teacher: the frozen teacher. scorer: the same with the rows of its output matrix in the order of the
        student's ids.
      reference: of the KL.
      others: the scorers of further teachers; those of one folder are the same object.
      wait: whether teachers are host arrays, which `placed` puts on the devices.
      base: compute weights that adapters stand beside; teacher and reference share its arrays where they
        are the same model in the same dtype.
      base_hash: of the tensors of that base; "" without adapters.
    """

    student: models.Params | None
    teacher: models.Params | None
    scorer: models.Params | None
    reference: models.Params | None
    others: tuple[models.Params | None, ...] = ()
    wait: bool = False
    base: models.Params | None = None
    base_hash: str = ""

    @property
    def scorers(self) -> tuple[models.Params | None, ...]:
        """What scores, of all teachers, the first one first."""
        return (self.scorer, *self.others)

    def placed(self, teacher: models.Params | None, mesh: Mesh) -> models.Params | None:
        """Return a teacher's weights on the devices, where they are already unless teachers wait."""
        return waiting.place(teacher, mesh) if self.wait and teacher is not None else teacher


def load_weights(setup: Setup, *, student: bool, base: bool = True) -> Weights:
    """Load the models; the student's masters only if `student`, where no checkpoint holds them.

    `base`: whether the base of adapters is wanted, where a run has adapters. Raises ModelError where a folder
    of adapters belongs to another base.
    """
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

    def is_base(path: str, dtype: str) -> bool:
        own = config.student.path, compute_dtype(config.student.dtype)
        return frozen is not None and (path, compute_dtype(dtype)) == own

    def place(path: str, dtype: str, model: models.ModelConfig, role: str) -> models.Params:
        weights = frozen if is_base(path, dtype) else None
        if weights is None:
            weights = load(path, dtype, shardings_of(model, role))
        return mesh.reshard(weights, role)

    frozen, base_hash = None, ""
    if setup.low_rank is not None and base:
        base_hash = multihost.from_first(lambda: fingerprint(config.student.path))
        if setup.adapters is not None:
            hf_adapters.require_base(setup.adapters, base_hash)
        frozen = load(
            config.student.path, config.student.dtype, shardings_of(setup.student, "student")
        )
    teacher = scorer = reference = None
    if setup.teacher is not None and config.teacher.follow == "frozen":
        teacher = scorer = place(
            config.teacher.path, config.teacher.dtype, setup.teacher, "teacher"
        )
        if alignment.head_rows is not None:
            scorer = mesh.reshard(scorer_of(unwrapped(teacher), alignment.head_rows), "teacher")
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
            reference = place(path, dtype, setup.reference, "reference")
    masters = None
    if student and setup.low_rank is not None:
        masters = _adapters(setup, setup.low_rank)
    elif student:
        shardings = mesh.masters(decoder.abstract_params(setup.student))
        masters = load(config.student.path, "float32", shardings)
    others = tuple(by_path[other.path] for other in setup.others)
    if frozen is not None:
        frozen = mesh.reshard(frozen, "student")
    return Weights(masters, teacher, scorer, reference, others, host, frozen, base_hash)


def _adapters(setup: Setup, spec: LowRank) -> models.Params:
    """Return the adapters that a run starts from, laid out as masters: those of a folder, or new ones."""
    mesh = setup.mesh
    shardings = mesh.masters(low_rank.abstract_adapters(setup.student, spec))
    if setup.adapters is None:
        make = partial(low_rank.init, config=setup.student, low_rank=spec)
        key = key_for(setup.config.seed, 0, Stream.ADAPTERS)
        return jax.jit(make, out_shardings=shardings if mesh.devices else None)(key)
    found = hf_adapters.load(setup.adapters, setup.student)
    if mesh.devices is None:
        return jax.tree.map(jnp.asarray, found)
    return jax.tree.map(
        lambda w, sharding: jax.make_array_from_callback(w.shape, sharding, w.__getitem__),
        found,
        shardings,
    )


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
