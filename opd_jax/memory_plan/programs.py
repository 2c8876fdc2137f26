"""The programs of a run from its config alone: abstract arguments, no weights, no tokenizer, no device.

They are those that training compiles (a test compares the two lists); they can be lowered for devices
that are not there.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from opd_jax import data
from opd_jax.aot import Program
from opd_jax.memory_plan.workload import Job
from opd_jax.models import attention, decoder
from opd_jax.models.end_tokens import Events
from opd_jax.sharding.mesh import ONE, Mesh
from opd_jax.training import objective, precompile, setup, update
from opd_jax.training.experience import Collector
from opd_jax.training.objective import Terms
from opd_jax.training.setup import Setup
from opd_jax.types import Frozen

Place = Callable[[Any], Any]


def programs(config: ConfigDict, job: Job, mesh: Mesh = ONE) -> list[Program]:
    """Every program of the training steps of `config`, for devices of the job's kind; see `make_mesh`."""
    with compiling_for("gpu" if job.fused else None):
        return _programs(config, job, mesh)


def _programs(config: ConfigDict, job: Job, mesh: Mesh) -> list[Program]:
    blank = blank_setup(config, job, mesh)
    terms = blank.terms
    collector = Collector(blank, cast(Any, None))
    dtype = jnp.dtype(_dtype(job.itemsize))
    tx = update.make_optimizer(config.optim, config.steps)
    shared: dict[str, Any] = {
        "vocabulary": job.vocabulary,
        "token_chunk": config.optim.token_chunk,
        "remat": config.optim.remat,
    }
    rollout_loss = golden_loss = None
    if terms.needs_rollouts:
        rollout_loss = objective.make_rollout_loss(
            terms, job.student, blank.reference, events=collector.events, **shared
        )
    if terms.needs_golden:
        golden_loss = objective.make_golden_loss(job.student, **shared)
    accumulate = update.make_accumulate(
        rollout_loss, golden_loss,
        microbatch_tokens=config.optim.microbatch_tokens, dtype=dtype, mesh=mesh,
    )  # fmt: skip
    begin = partial(update.init_state, tx=tx, average=job.teacher_follows == "average")
    state = jax.eval_shape(begin, decoder.abstract_params(job.student))
    state = mesh.structs(state, mesh.masters(state))
    lend = partial(_lent, mesh=mesh)
    student = lend(_weights(job.student, job.itemsize), "student")
    teacher = reference = None
    if job.teacher is not None:
        teacher = _weights(job.teacher, job.teacher_itemsize)
        if job.renumbered:
            teacher = jax.eval_shape(
                decoder.with_head_rows, teacher, jnp.zeros(job.vocabulary, jnp.int32)
            )
        teacher = lend(teacher, "teacher" if job.teacher_follows == "frozen" else "student")
    if job.reference is not None:
        reference = lend(_weights(job.reference, job.reference_itemsize), "reference")
    rollout_rows = golden_rows = None
    out = mesh.weight_programs(state.params, dtype)
    if terms.needs_rollouts:
        rollout_rows = precompile.blank_rollout_rows(blank, student, teacher, collector.scoring)
        out += collector.programs(student, teacher)
    if terms.needs_golden:
        golden_rows = precompile.blank_golden_rows(blank)
    beside = decoder.head_alone(teacher) if teacher and terms.over_vocabulary else None
    frozen = Frozen(reference, beside)
    own = state.params if mesh.devices is None else student
    given = (own, frozen, rollout_rows, golden_rows, terms.weights)
    after = update.make_update(tx, accumulate, decay=config.teacher.decay, mesh=mesh)
    return [*out, *accumulate.programs(*given), after.program(state)]


def blank_setup(config: ConfigDict, job: Job, mesh: Mesh) -> Setup:
    """A setup of the right shapes, without tokenizers and data."""
    terms: Terms = setup.make_terms(config)
    alignment = data.alone(job.vocabulary, job.student.eos_token_ids or (0,))
    styles = setup.prompt_styles(config.data)
    missing = cast(Any, None)
    return Setup(
        config=config, mesh=mesh, terms=terms, student=job.student, teacher=job.teacher,
        reference=job.reference or job.student, reference_section=config.student,
        tokenizer=missing, teacher_tokenizer=missing, student_style=styles[0],
        teacher_style=styles[1], separate_prompts=job.teacher_width > 0, alignment=alignment,
        first_pieces=(), golden_end=0, width=job.width, teacher_width=job.teacher_width,
        train=[], held_out=[], prompts=[], teacher_prompts=[], notes=[],
    )  # fmt: skip


def compile_for(program: Program, place: Place | None, *, gpu: bool = False) -> jax.stages.Compiled:
    """The program compiled where `place` puts its arguments, or, where it is None, where they are said
    to lie; `gpu`: whether that is on GPUs."""
    with compiling_for("gpu" if gpu else None):
        return (program if place is None else placed(program, place)).compile()


def placed(program: Program, place: Place) -> Program:
    """The program with its arguments where `place` puts them; settings that are no arrays stay."""
    kwargs = {
        name: place(value) if hasattr(value, "shape") or isinstance(value, Events) else value
        for name, value in program.kwargs.items()
    }
    return Program(program.name, program.function, place(program.args), kwargs)


def on_gpu(target: pathlib.Path) -> Place:
    """Arguments on a GPU that is not there; `target` is XLA's description of it.

    Needs JAX's CUDA plug-in. tests/h200/target_config.txtpb is that of an H200.
    """
    mesh = jax.sharding.Mesh(gpus(target, 1), ("data",))
    return partial(jax.tree.map, partial(_placed, mesh=mesh))


def gpus(target: pathlib.Path, devices: int) -> list[jax.Device]:
    """So many GPUs that are not there."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target.read_text(), topology=f"1x1x{devices}"
    )
    return topology.devices


@contextlib.contextmanager
def compiling_for(backend: str | None) -> Iterator[None]:
    """Models are traced as on this backend; None: on the process's own."""
    token = attention.BACKEND.set(backend)
    try:
        yield
    finally:
        attention.BACKEND.reset(token)


def _placed(leaf: Any, *, mesh: jax.sharding.Mesh) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec())
    if isinstance(leaf, float):
        return jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding, weak_type=True)
    if not hasattr(leaf, "shape"):
        return leaf  # a static argument
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def _weights(model: Any, itemsize: int) -> Any:
    dtype = _dtype(itemsize)
    params = decoder.abstract_params(model)
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, dtype), params)


def _lent(params: Any, role: str, *, mesh: Mesh) -> Any:
    """Shapes as the role's compute weights, each where it belongs."""
    params = mesh.slices(params, role)
    return mesh.structs(params, mesh.weights(params))


def _dtype(itemsize: int) -> Any:
    return jnp.float32 if itemsize == 4 else jnp.bfloat16
