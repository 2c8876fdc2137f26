"""The programs of a run from its config alone, with abstract arguments: no weights, tokenizer or device.

They come from `make_step_functions`, as in training, and can be lowered for devices that are not there.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from opd_jax import data
from opd_jax.aot import Program
from opd_jax.memory_plan import resident
from opd_jax.memory_plan.workload import Workload
from opd_jax.models import attention
from opd_jax.sharding.mesh import ONE, Mesh
from opd_jax.training.step_functions import make_step_functions
from opd_jax.training.step_spec import StepSpec
from opd_jax.training.terms import make_terms

Place = Callable[[Any], Any]


def programs(config: ConfigDict, workload: Workload, mesh: Mesh = ONE) -> list[Program]:
    """Return every program of the training steps of `config`, for the kind of devices of `workload`."""
    with attention.BACKEND("gpu" if workload.fused else attention.BACKEND.value):
        return _programs(config, workload, mesh)


def _programs(config: ConfigDict, workload: Workload, mesh: Mesh) -> list[Program]:
    alignment = data.alone(workload.vocabulary, workload.student.eos_token_ids or (0,))
    if workload.teacher_vocabulary:
        assert workload.teacher is not None
        ends = workload.teacher.eos_token_ids or (0,)
        theirs = data.alone(workload.teacher_vocabulary, ends)
        ids = np.arange(min(workload.vocabulary, workload.teacher_vocabulary), dtype=np.int32)
        shared = np.stack([ids, ids])  # at most so many
        alignment = dataclasses.replace(alignment, teacher=theirs, shared=shared)
    spec = StepSpec(
        config=config, terms=make_terms(config), student=workload.student, teacher=workload.teacher,
        reference=workload.reference or workload.student, alignment=alignment,
        dtype=jnp.dtype(_dtype(workload.itemsize)), teacher_width=workload.teacher_width, mesh=mesh,
        replayed=workload.replayed, tile=workload.tile, others=workload.turns.others,
    )  # fmt: skip
    teacher = reference = None
    if workload.teacher is not None and workload.teacher_follows == "frozen":
        teacher = resident.weights(workload, "teacher", mesh)
    if workload.reference is not None:
        reference = resident.weights(workload, "reference", mesh)
    others = [resident.weights(one, "teacher", mesh) for one in workload.taught[1:]]
    return make_step_functions(spec).programs(teacher, reference, spec.terms.weights, others)


def compile_for(
    program: Program, place: Place | None, *, fused: bool = False
) -> jax.stages.Compiled:
    """Compile the program with its arguments where `place` puts them, or with their own shardings.

    `fused`: whether attention in 16 bits is one kernel of cuDNN, as by default on GPUs.
    """
    with attention.BACKEND("gpu" if fused else attention.BACKEND.value):
        return (program if place is None else placed(program, place)).compile()


def placed(program: Program, place: Place) -> Program:
    """Return the program with its arguments where `place` puts them; keyword arguments are static."""
    return Program(program.name, program.function, place(program.args), program.kwargs)


def on_gpu(target: pathlib.Path) -> Place:
    """Return a function that places arguments on a GPU that is not there.

    `target` is XLA's description of the GPU (tests/h200/target_config.txtpb: that of an H200).
    Needs JAX's CUDA plug-in.
    """
    mesh = jax.sharding.Mesh(gpus(target, 1), ("data",))
    return partial(jax.tree.map, partial(_placed, mesh=mesh))


def gpus(target: pathlib.Path, devices: int) -> list[jax.Device]:
    """Return so many GPUs that are not there."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target.read_text(), topology=f"1x1x{devices}"
    )
    return topology.devices


def _placed(leaf: Any, *, mesh: jax.sharding.Mesh) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec())
    if isinstance(leaf, float):
        return jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding, weak_type=True)
    if not hasattr(leaf, "shape"):
        return leaf  # a static argument
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def _dtype(itemsize: int) -> Any:
    return jnp.float32 if itemsize == 4 else jnp.bfloat16
