"""Bytes of the arrays of a run on one device, counted from abstract trees and their shardings.

Shapes and dtypes come from the functions that make the arrays in a run (`decoder.abstract_params`,
`update.init_state`, `kv_cache.init`), shardings from the same `Mesh`, over devices that are abstract.
Nothing is allocated, and no device needs to be there. Arrays without a dimension (the optimizer's
counters) are left out.
"""

import functools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from opd_jax.memory_plan.workload import Workload
from opd_jax.models import ModelConfig, decoder, kv_cache, low_rank
from opd_jax.models.low_rank import LowRank
from opd_jax.sharding.mesh import Mesh
from opd_jax.training import update
from opd_jax.types import TrainState


def bytes_on_device(tree: Any) -> float:
    """Return the bytes that one device holds of arrays given as shapes, dtypes and shardings."""
    return float(sum(size * leaf.dtype.itemsize for leaf, size in _sizes(tree)))


def state(workload: Workload) -> TrainState:
    """Return shapes, dtypes and shardings of the train state: masters, optimizer, moving average."""
    average = workload.teacher_follows == "average"
    return _state(
        workload.student, workload.low_rank, workload.optimizer, average, workload.layout.mesh
    )


def masters(workload: Workload) -> float:
    """Return the bytes of the float32 weights that are trained; a gradient that is reduced takes as many."""
    return bytes_on_device(state(workload).params)


def weights(workload: Workload, role: str, mesh: Mesh | None = None) -> Any:
    """Return shapes, dtypes and shardings of a role's compute weights; of the teacher those that score.

    `mesh` is that of the workload's layout unless another one of the same sizes is given.
    """
    follows = role == "teacher" and workload.teacher_follows != "frozen"
    head_rows = workload.vocabulary if role == "teacher" and workload.renumbered else 0
    mesh = workload.layout.mesh if mesh is None else mesh
    source = (
        "student" if follows else role
    )  # a teacher that follows is made as the student's weights are
    plain = _weights(getattr(workload, role), workload.itemsize_of(role), head_rows, source, mesh)
    if workload.low_rank is None or source != "student":
        return plain
    return low_rank.join(plain, _adapters(workload, mesh))


def adapter_bytes(workload: Workload) -> float:
    """Return the bytes of the compute weights of adapters; 0 where there are none."""
    return bytes_on_device(_adapters(workload, workload.layout.mesh)) if workload.low_rank else 0.0


def base_bytes(workload: Workload) -> float:
    """Return the bytes of the frozen weights that adapters stand beside; 0 where there are none."""
    if workload.low_rank is None:
        return 0.0
    return weight_bytes(workload, "student") - adapter_bytes(workload)


def weight_bytes(workload: Workload, role: str) -> float:
    """Return the bytes of a role's compute weights; of the teacher those that score."""
    return bytes_on_device(weights(workload, role))


def teacher_bytes(workload: Workload) -> float:
    """Return the bytes of a frozen teacher: where its ids are renumbered, both of its output matrices."""
    assert workload.teacher is not None
    plain = _weights(
        workload.teacher, workload.teacher_itemsize, 0, "teacher", workload.layout.mesh
    )
    second = teacher_head(workload) if workload.renumbered else 0.0
    return bytes_on_device(plain) + second


def teacher_head(workload: Workload) -> float:
    """Return the bytes of the output matrix that the teacher scores with."""
    return bytes_on_device(decoder.head_alone(weights(workload, "teacher")))


def gathered_head(workload: Workload, role: str) -> float:
    """Return the bytes of a role's output matrix made whole where a device has a slice of it, else 0."""
    head = decoder.head_alone(weights(workload, role))
    ((leaf, size),) = _sizes(head)
    return float(leaf.size * leaf.dtype.itemsize) if size < leaf.size else 0.0


def gradients(workload: Workload) -> float:
    """Return the bytes of the running sum: whole beside replicated weights, sharded as sharded ones are."""
    mesh = workload.layout.mesh
    if workload.low_rank is not None:
        return bytes_on_device(mesh.gradient_programs(_adapters(workload, mesh))[1])
    return _gradient_bytes(workload.student, workload.itemsize, mesh)


def largest_cast(workload: Workload) -> float:
    """Return the bytes of the largest master weight in the dtype of the compute weights."""
    itemsize = workload.itemsize
    return max(itemsize * float(size) for _, size in _sizes(state(workload).params))


def unstacked(workload: Workload) -> Any:
    """Return shapes, dtypes and shardings of the student's weights as the token loop reads them."""
    return _unstacked(workload.student, workload.itemsize, workload.layout.mesh)


def cache_bytes(workload: Workload, slots: int) -> float:
    """Return the bytes of keys and values of a device's slots, each as long as a whole row."""
    model, layout = workload.student, workload.layout
    return slots * _cache_bytes(model, workload.width, workload.itemsize, layout.mesh)


@functools.lru_cache(256)
def parameters(model: ModelConfig, mesh: Mesh) -> float:
    """Return how many numbers of replicated compute weights a device holds: `tensor` divides the layers."""
    replicated = Mesh(mesh.devices)
    params = _weights(model, 4, 0, "student", replicated)
    return float(sum(size for _, size in _sizes(params)))


def trained(workload: Workload) -> float:
    """Return how many numbers that are trained a device holds, where the student's weights are replicated."""
    if workload.low_rank is None:
        return parameters(workload.student, workload.layout.mesh)
    replicated = Mesh(workload.layout.mesh.devices)
    return bytes_on_device(_adapters(workload, replicated)) / workload.itemsize


def _sizes(tree: Any) -> list[tuple[Any, int]]:
    """Return each array that has a dimension, and how many of its numbers one device holds."""
    out = []
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        if shape:
            out.append((leaf, math.prod(shape)))
    return out


def _adapters(workload: Workload, mesh: Mesh) -> Any:
    """Return shapes, dtypes and shardings of the compute weights of adapters."""
    assert workload.low_rank is not None
    return _adapter_weights(workload.student, workload.low_rank, workload.itemsize, mesh)


@functools.lru_cache(64)
def _adapter_weights(model: ModelConfig, spec: LowRank, itemsize: int, mesh: Mesh) -> Any:
    params = mesh.slices(_cast(low_rank.abstract_adapters(model, spec), itemsize), "student")
    return mesh.structs(params, mesh.weights(params))


@functools.lru_cache(64)
def _abstract_params(model: ModelConfig) -> Any:
    return decoder.abstract_params(model)


@functools.lru_cache(64)
def _state(
    student: ModelConfig,
    spec: LowRank | None,
    optimizer: optax.GradientTransformation,
    average: bool,
    mesh: Mesh,
) -> TrainState:
    begin = partial(update.init_state, tx=optimizer, average=average)
    trained = low_rank.abstract_adapters(student, spec) if spec else _abstract_params(student)
    found = jax.eval_shape(begin, trained)
    return mesh.structs(found, mesh.masters(found))


@functools.lru_cache(256)
def _weights(model: ModelConfig, itemsize: int, head_rows: int, role: str, mesh: Mesh) -> Any:
    params = _cast(_abstract_params(model), itemsize)
    if head_rows:
        ids = jax.ShapeDtypeStruct((head_rows,), jnp.int32)
        params = jax.eval_shape(decoder.with_head_rows, params, ids)
    params = mesh.slices(params, role)
    return mesh.structs(params, mesh.weights(params))


@functools.lru_cache(64)
def _unstacked(model: ModelConfig, itemsize: int, mesh: Mesh) -> Any:
    layers = jax.eval_shape(decoder.unstack, _cast(_abstract_params(model), itemsize))
    return mesh.structs(layers, mesh.weights(layers))


@functools.lru_cache(64)
def _gradient_bytes(student: ModelConfig, itemsize: int, mesh: Mesh) -> float:
    _, grads = mesh.gradient_programs(_weights(student, itemsize, 0, "student", mesh))
    return bytes_on_device(grads)


@functools.lru_cache(256)
def _cache_bytes(model: ModelConfig, tokens: int, itemsize: int, mesh: Mesh) -> float:
    """Return the bytes of one slot: of a mesh with one slot a replica."""
    init = partial(kv_cache.init, model, mesh.replicas, tokens, _dtype(itemsize))
    caches = jax.eval_shape(init)
    places = jax.tree.map(lambda x: mesh.slots(kv_cache.head_axis(x.dtype)), caches)
    return bytes_on_device(mesh.structs(caches, places))


def _cast(params: Any, itemsize: int) -> Any:
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, _dtype(itemsize)), params)


def _dtype(itemsize: int) -> Any:
    return jnp.dtype(jnp.float32 if itemsize == 4 else jnp.bfloat16)
