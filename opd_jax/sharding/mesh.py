"""Device mesh `data x fsdp x tensor`: shardings of weights and batches, reductions over replicas.

The batch is sharded along data x fsdp. Each such shard belongs to one replica, which computes on it with
its own copy of the compute weights and communicates with no other replica. `tensor` shards the heads and
the MLP within a replica. The float32 masters, the optimiser's state and the moving average are sharded
over the replicas as well (ZeRO-1, arXiv 1910.02054): once a step the compute weights are gathered from
them, and the gradient, which stays unreduced until the last micro-batch, is reduce-scattered to them.

On a single device JAX receives no shardings: the functions here return their arguments unchanged.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax.aot import Program
from opd_jax.sharding import partition
from opd_jax.sharding.partition import (
    AXES,
    DATA,
    DIVIDED,
    FSDP,
    REPLICAS,
    ROLES,
    TENSOR,
    Slice,
    manual_specs,
    unreduced_axes,
    unwrapped,
)

Tree = TypeVar("Tree")
# Partitioning of the arguments and results of shard_map. ROWS: split along the batch. WHOLE: replicated
# (the local slice of a `Slice`). UNREDUCED: one entry per replica along a leading axis. SUMS: UNREDUCED
# for every weight of a tree.
ROWS, WHOLE, UNREDUCED, SUMS = "rows", "whole", "unreduced", "sums"


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The devices of a run; a static argument of jitted functions.

    Attributes:
      devices: JAX's mesh, or None on a single device.
      sharded: roles whose compute weights are sharded along `fsdp`.
    """

    devices: jax.sharding.Mesh | None = None
    sharded: tuple[str, ...] = ()

    @property
    def replicated(self) -> NamedSharding | None:
        """The replicated sharding; None on one device."""
        return None if self.devices is None else NamedSharding(self.devices, P())

    @property
    def replicas(self) -> int:
        """The number of shards of the batch."""
        return self._sizes[DATA] * self._sizes[FSDP]

    def rows(self, rows: Tree) -> Tree:
        """Place host arrays [B, ...] on the devices, sharded along B; the replicas must divide B.

        On one device it returns when they are there: a program whose inputs are still being copied runs in
        a thread of JAX's own on a CPU, where its memory is not kept (host_memory.py).
        """
        if self.devices is None:
            return jax.block_until_ready(jax.device_put(rows))
        place = partial(_place, sharding=NamedSharding(self.devices, P(REPLICAS)))
        return jax.tree.map(lambda x: place(np.asarray(x)), rows)

    def weights(self, params: Any) -> Any:
        """Return the shardings of compute weights (arrays or shapes, stacked or not); Nones on one device."""
        return self._shardings(params, self._weight_spec)

    def slices(self, params: Any, role: str) -> Any:
        """Wrap in `Slice` every weight (array or shape) of `role` that `fsdp` shards."""
        if self.devices is None or role not in self.sharded:
            return params

        def one(path: tuple, weight: Any) -> Any:
            axis = partition.slice_axis(path, weight.shape, self._sizes)
            return weight if axis is None else Slice(weight, axis)

        return jax.tree_util.tree_map_with_path(one, params)

    def reshard(self, params: Any, role: str) -> Any:
        """Reshard `params` to the layout of `role`'s compute weights."""
        if self.devices is None:
            return params
        params = self.slices(params, role)

        def one(weight: jax.Array, sharding: NamedSharding) -> jax.Array:
            equal = weight.sharding.is_equivalent_to(sharding, weight.ndim)
            return weight if equal else jax.device_put(weight, sharding)

        return jax.tree.map(one, params, self.weights(params))

    def masters(self, tree: Any) -> Any:
        """Return the shardings of float32 masters, or of a tree that contains them (a train state)."""
        return self._shardings(tree, self._master_spec)

    def unreduced(self, params: Any) -> Any:
        """Return the shardings of unreduced gradients, one per replica, from the weights."""
        return self._shardings(
            params, lambda path, shape: P(unreduced_axes(path), *self._weight_spec(path, shape))
        )

    def slots(self, head_axis: int | None = None) -> NamedSharding | None:
        """Return the sharding of an array [B, ...] of decode slots; `head_axis` is its axis of key heads."""
        if self.devices is None:
            return None
        if head_axis is None:
            return NamedSharding(self.devices, P(REPLICAS))
        unsharded = (None,) * (head_axis - 1)
        return NamedSharding(self.devices, P(REPLICAS, *unsharded, DIVIDED["kv_heads"]))

    def constrain(self, tree: Tree, shardings: Any) -> Tree:
        """Constrain the tree to these shardings; inside a jitted function."""
        if self.devices is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, shardings)

    def structs(self, tree: Any, shardings: Any = None) -> Any:
        """Return shapes, dtypes and shardings of a tree (its own by default), for compiling ahead of time."""

        def one(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        if self.devices is None:
            return jax.eval_shape(lambda tree: tree, tree)
        if shardings is None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
        return jax.tree.map(one, tree, shardings)

    def row_structs(self, rows: Any) -> Any:
        """Return the `structs` of the arrays that `rows` would place."""
        if self.devices is None:
            return rows
        sharding = NamedSharding(self.devices, P(REPLICAS))
        return self.structs(rows, jax.tree.map(lambda _: sharding, rows))

    def per_replica(
        self, function: Callable, in_kinds: Sequence[str], out_kinds: str | tuple[str, ...]
    ) -> Callable:
        """Wrap `function` in shard_map over (data, fsdp): it runs once per replica, on its shard.

        Call the result under jit.

        Args:
          function: takes and returns the arrays of one replica.
          in_kinds: ROWS, WHOLE, UNREDUCED or SUMS, one per argument.
          out_kinds: one per result, and not WHOLE. A result of SUMS has the tree of the one argument of SUMS.
        """
        if self.devices is None:
            return function

        def on_replica(*args: Any) -> Any:
            kinds = zip(args, in_kinds, strict=True)
            out = function(*(_first(x) if k in (UNREDUCED, SUMS) else x for x, k in kinds))
            if isinstance(out_kinds, str):
                return _as_entry(out) if out_kinds == UNREDUCED else out
            kinds = zip(out, out_kinds, strict=True)
            return tuple(_as_entry(x) if k in (UNREDUCED, SUMS) else x for x, k in kinds)

        def call(*args: Any) -> Any:
            in_specs = tuple(_spec(x, kind) for x, kind in zip(args, in_kinds, strict=True))
            kinds = (out_kinds,) if isinstance(out_kinds, str) else out_kinds
            assert WHOLE not in kinds, "nothing guarantees that the replicas' results are equal"
            sums = [spec for spec, kind in zip(in_specs, in_kinds, strict=True) if kind == SUMS]
            assert SUMS not in kinds or len(sums) == 1, (
                "a result of SUMS needs one argument of SUMS"
            )
            specs = tuple(sums[0] if kind == SUMS else P(REPLICAS) for kind in kinds)
            out_specs = specs[0] if isinstance(out_kinds, str) else specs
            return self._shard_map(on_replica, in_specs, out_specs)(*args)

        return call

    def init_masters(self, function: Callable, params: Any) -> Any:
        """Return function(params), computed and stored in the masters' sharding; donates `params`."""
        if self.devices is None:
            return function(params)
        shardings = self.masters(jax.eval_shape(function, params))
        return jax.jit(function, donate_argnums=0, out_shardings=shardings)(params)

    def zeros(self, params: Any) -> Any:
        """Return float32 zeros like the weights, one tree per replica: the initial gradient sums."""
        return _zeros_like(params, mesh=self)

    def reduce(self, grads: Tree) -> Tree:
        """Reduce-scatter unreduced gradients to the masters' shardings."""
        return grads if self.devices is None else _summed(grads, mesh=self)

    def gradient_programs(self, params: Any) -> tuple[list[Program], Any]:
        """Return the programs that `zeros` and `reduce` compile, and the unreduced gradients as shapes."""
        static = {"mesh": self}
        grads = jax.eval_shape(partial(_zeros_like, mesh=self), params)
        grads = self.structs(grads, self.unreduced(params))
        programs = [Program("zero gradients", _zeros_like, (params,), static)]
        if self.devices is not None:
            programs.append(Program("sum of gradients", _summed, (grads,), static))
        return programs, grads

    def weight_programs(self, masters: Any, dtype: jnp.dtype) -> list[Program]:
        """Return the programs that `compute_weights` compiles."""
        if self.devices is None:
            return []
        static = {"dtype": dtype, "role": "student", "mesh": self}
        return [Program("compute weights", _compute, (masters,), static)]

    def total(self, values: Tree) -> Tree:
        """Sum values [replicas, ...] over the replicas; every device and process can read the result."""
        return values if self.devices is None else _total(values, mesh=self)

    def compute_weights(self, masters: Any, dtype: jnp.dtype) -> Any:
        """Return the compute weights in `dtype`; one device does not copy weights that have it already."""
        if self.devices is None:
            return jax.tree.map(lambda w: w if w.dtype == dtype else w.astype(dtype), masters)
        return _compute(masters, dtype=dtype, role="student", mesh=self)

    def fetch(self, tree: Any) -> Any:
        """Copy a tree of arrays to the host, however it is sharded; waits for the arrays."""
        addressable = all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))
        return jax.device_get(tree if addressable else _replicated(tree, mesh=self))

    def check(self, role: str, model: Any) -> None:
        """Raise ConfigError for a model that `tensor` does not divide."""
        partition.check(role, model, self._sizes, sharded=role in self.sharded)

    def describe(self) -> str:
        """Describe the devices in one line, for the start of a run."""
        if self.devices is None:
            return f"devices: one {jax.devices()[0].device_kind}"
        sizes = " x ".join(f"{name} {self._sizes[name]}" for name in AXES)
        kind, processes = jax.devices()[0].device_kind, jax.process_count()
        of_run = f" in {processes} processes" if processes > 1 else ""
        return f"devices: {self.devices.size} {kind}{of_run}, {sizes}"

    @property
    def _sizes(self) -> Mapping[str, int]:
        return dict.fromkeys(AXES, 1) if self.devices is None else self.devices.shape

    def _shard_map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Wrap `function` in shard_map; `tensor`, where it shards anything, is left to the compiler."""
        return jax.shard_map(
            function,
            mesh=self.devices,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(REPLICAS if self._sizes[TENSOR] > 1 else AXES),
            check_vma=False,
        )

    def _shardings(self, tree: Any, spec: Callable[[tuple, tuple[int, ...]], P]) -> Any:
        devices = self.devices
        if devices is None:
            return jax.tree.map(lambda _: None, tree)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(devices, spec(path, leaf.shape)), tree
        )

    def _weight_spec(self, path: tuple, shape: tuple[int, ...]) -> P:
        return partition.weight_spec(path, shape, self._sizes)

    def _master_spec(self, path: tuple, shape: tuple[int, ...]) -> P:
        sharded = "student" in self.sharded
        return partition.master_spec(path, shape, self._sizes, sharded=sharded)


ONE = Mesh()


def make_mesh(section: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh of the config section `mesh` over all devices.

    Raises ConfigError: the number of devices does not fit data x fsdp x tensor.
    """
    devices = jax.devices() if devices is None else devices
    data = partition.data_size(section, len(devices))
    if len(devices) == 1:
        return ONE
    shape = (data, section.fsdp, section.tensor)
    # Auto is explicit because JAX's default has changed before. shard_map keeps unreduced values so.
    types = (AxisType.Auto,) * len(AXES)
    sharded = tuple(role for role in ROLES if section.get(role) == "sharded")
    return Mesh(jax.make_mesh(shape, AXES, axis_types=types, devices=devices), sharded)


def make_abstract_mesh(sizes: partition.Sizes, sharded: Sequence[str]) -> Mesh:
    """Return a mesh of devices that need not be there: it has shardings and shapes, and runs nothing."""
    shape = tuple(sizes[name] for name in AXES)
    if math.prod(shape) == 1:
        return ONE
    devices: Any = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Mesh(devices, tuple(sharded))


def _spec(x: Any, kind: str) -> Any:
    """Return the partitioning of an argument of `Mesh.per_replica`."""
    return manual_specs(x, unreduced=kind == SUMS) if kind in (WHOLE, SUMS) else P(REPLICAS)


def _first(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x[0], tree)


def _as_entry(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x[None], tree)


def _place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Place a host array that every process holds on the devices of all processes."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


@partial(jax.jit, static_argnames=("mesh",))
def _zeros_like(params: Any, *, mesh: Mesh) -> Any:
    if mesh.devices is None:
        return jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)

    def one(path: tuple, weight: Any) -> jax.Array:
        entries = math.prod(map(mesh._sizes.__getitem__, unreduced_axes(path)))
        return jnp.zeros((entries, *weight.shape), jnp.float32)

    return mesh.constrain(jax.tree_util.tree_map_with_path(one, params), mesh.unreduced(params))


@partial(jax.jit, static_argnames=("mesh",))
def _summed(grads: Any, *, mesh: Mesh) -> Any:
    params = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), grads)
    masters = jax.tree.map(lambda sharding: sharding.spec, mesh.masters(unwrapped(params)))

    def add(grads: Any) -> Any:
        axes = jax.tree_util.tree_map_with_path(lambda path, _: _Axes(unreduced_axes(path)), params)
        return jax.tree.map(
            lambda gradient, axes, spec: _reduce(gradient[0], axes.names, spec),
            unwrapped(grads), unwrapped(axes), masters,
        )  # fmt: skip

    # shard_map takes all axes, `tensor` included: left to the compiler, an array that `tensor` shards
    # would be gathered before its reduction.
    specs = jax.tree.map(lambda sharding: sharding.spec, mesh.unreduced(params))
    return jax.shard_map(
        add, mesh=mesh.devices, in_specs=(specs,), out_specs=masters, check_vma=False
    )(grads)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Names of mesh axes as one leaf of a tree."""

    names: tuple[str, ...]


def _reduce(gradient: jax.Array, among: tuple[str, ...], spec: P) -> jax.Array:
    """Sum over the devices of these axes; each keeps its own part where `spec` shards over them."""
    axes = [axis if isinstance(axis, tuple) else (axis,) for axis in spec]
    if among not in axes:
        return jax.lax.psum(gradient, among)
    return jax.lax.psum_scatter(gradient, among, scatter_dimension=axes.index(among), tiled=True)


@partial(jax.jit, static_argnames=("mesh",))
def _total(values: Any, *, mesh: Mesh) -> Any:
    return _replicate(jax.tree.map(lambda x: jnp.sum(x, axis=0), values), mesh)


@partial(jax.jit, static_argnames=("mesh",))
def _replicated(tree: Any, *, mesh: Mesh) -> Any:
    return _replicate(tree, mesh)


def _replicate(tree: Any, mesh: Mesh) -> Any:
    return jax.lax.with_sharding_constraint(tree, mesh.replicated)


@partial(jax.jit, static_argnames=("dtype", "role", "mesh"))
def _compute(masters: Any, *, dtype: jnp.dtype, role: str, mesh: Mesh) -> Any:
    cast = jax.tree.map(lambda w: w.astype(dtype), masters)
    cast = mesh.constrain(cast, mesh.masters(cast))  # cast first: the gather moves fewer bytes
    cast = mesh.slices(cast, role)
    return mesh.constrain(cast, mesh.weights(cast))
