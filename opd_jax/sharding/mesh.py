"""The devices of a run as a mesh `data x fsdp x tensor`: what lies where, and what replicas add up.

Rows are divided over data x fsdp: each such part is a replica, which works on its own rows with its own
copy of the compute weights and hears nothing of the others. `tensor` divides heads and MLP of every
replica. float32 masters, the optimiser's state and the moving average are divided among the replicas
as well (ZeRO-1, arXiv 1910.02054): compute weights are made of them once a step, and the gradient, kept
apart on every replica until all micro-batches are through, is summed into their parts once a step.

On one device nothing of this is said to JAX: functions here hand back what they are given.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax.aot import Program
from opd_jax.errors import ConfigError
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
    apart_axes,
    manual_specs,
    unwrapped,
)

Tree = TypeVar("Tree")
# What a replica gets of an argument, or makes of a result: its own rows; all of it (of a `Slice` its
# slice); one of its own, where the array has an entry a replica; such a one of each weight.
ROWS, WHOLE, APART, SUMS = "rows", "whole", "apart", "sums"


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The devices of a run; static in jitted functions. `devices` is None where there is but one.

    `sharded`: roles whose compute weights are slices along `fsdp`.
    """

    devices: jax.sharding.Mesh | None = None
    sharded: tuple[str, ...] = ()

    @property
    def whole(self) -> NamedSharding | None:
        """The sharding of what every device holds all of."""
        return None if self.devices is None else NamedSharding(self.devices, P())

    @property
    def replicas(self) -> int:
        """How many parts rows are divided into."""
        return self._sizes[DATA] * self._sizes[FSDP]

    def rows(self, rows: Tree) -> Tree:
        """Host arrays [B, ...] on the devices, each replica's rows on its own; B divides among them."""
        if self.devices is None:
            return rows
        place = partial(_placed, sharding=NamedSharding(self.devices, P(REPLICAS)))
        return jax.tree.map(lambda x: place(np.asarray(x)), rows)

    def weights(self, params: Any) -> Any:
        """Shardings of compute weights, stacked or not, from arrays or shapes; Nones on one device."""
        return self._shardings(params, self._weight_spec)

    def slices(self, params: Any, role: str) -> Any:
        """The tree with a `Slice` around each weight of the role that is to be one; arrays or shapes."""
        if self.devices is None or role not in self.sharded:
            return params

        def one(path: tuple, weight: Any) -> Any:
            axis = partition.slice_axis(path, weight.shape, self._sizes)
            return weight if axis is None else Slice(weight, axis)

        return jax.tree_util.tree_map_with_path(one, params)

    def lend(self, params: Any, role: str) -> Any:
        """Global arrays as the role's compute weights, each where it belongs."""
        if self.devices is None:
            return params
        params = self.slices(params, role)

        def one(weight: jax.Array, place: NamedSharding) -> jax.Array:
            there = weight.sharding.is_equivalent_to(place, weight.ndim)
            return weight if there else jax.device_put(weight, place)

        return jax.tree.map(one, params, self.weights(params))

    def masters(self, tree: Any) -> Any:
        """Shardings of float32 weights, or of a tree that holds such (optimiser, whole state)."""
        return self._shardings(tree, self._master_spec)

    def apart(self, params: Any) -> Any:
        """Shardings of one gradient a replica, from the weights'."""
        return self._shardings(
            params, lambda path, shape: P(apart_axes(path), *self._weight_spec(path, shape))
        )

    def slots(self, head_axis: int | None = None) -> NamedSharding | None:
        """The sharding of an array [B, ...] of decode slots, of which an axis may be key heads."""
        if self.devices is None:
            return None
        if head_axis is None:
            return NamedSharding(self.devices, P(REPLICAS))
        whole = (None,) * (head_axis - 1)
        return NamedSharding(self.devices, P(REPLICAS, *whole, DIVIDED["kv_heads"]))

    def constrain(self, tree: Tree, shardings: Any) -> Tree:
        """Inside a jitted function: the tree, and where it lies."""
        if self.devices is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, shardings)

    def structs(self, tree: Any, shardings: Any = None) -> Any:
        """Shapes, dtypes and places of a tree, as programs are compiled for; default: where it lies."""

        def one(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        if self.devices is None:
            return jax.eval_shape(lambda tree: tree, tree)
        if shardings is None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
        return jax.tree.map(one, tree, shardings)

    def row_structs(self, rows: Any) -> Any:
        """`structs` of what `rows` would place."""
        if self.devices is None:
            return rows
        sharding = NamedSharding(self.devices, P(REPLICAS))
        return self.structs(rows, jax.tree.map(lambda _: sharding, rows))

    def each(
        self, function: Callable, given: Sequence[str], made: str | tuple[str, ...]
    ) -> Callable:
        """`function` on every replica by itself. Inside a jitted function.

        `given`: ROWS, WHOLE, APART or SUMS, for each argument. `made`: the same for each result, but
        not WHOLE; a result of SUMS has the tree of the one argument of SUMS.
        """
        if self.devices is None:
            return function

        def own(*args: Any) -> Any:
            kinds = zip(args, given, strict=True)
            out = function(*(_first(x) if k in (APART, SUMS) else x for x, k in kinds))
            if isinstance(made, str):
                return _as_entry(out) if made == APART else out
            kinds = zip(out, made, strict=True)
            return tuple(_as_entry(x) if k in (APART, SUMS) else x for x, k in kinds)

        def call(*args: Any) -> Any:
            asked = tuple(_spec(x, kind) for x, kind in zip(args, given, strict=True))
            kinds = (made,) if isinstance(made, str) else made
            assert WHOLE not in kinds, "nothing says that the replicas' results are equal"
            sums = [spec for spec, kind in zip(asked, given, strict=True) if kind == SUMS]
            assert SUMS not in kinds or len(sums) == 1, "a result of SUMS has one argument's tree"
            specs = tuple(sums[0] if kind == SUMS else P(REPLICAS) for kind in kinds)
            results = specs[0] if isinstance(made, str) else specs
            return self._apart_from_each_other(own, asked, results)(*args)

        return call

    def masters_of(self, function: Callable, params: Any) -> Any:
        """function(params), every part of it on its own device; takes the params over."""
        if self.devices is None:
            return function(params)
        places = self.masters(jax.eval_shape(function, params))
        return jax.jit(function, donate_argnums=0, out_shardings=places)(params)

    def zeros(self, params: Any) -> Any:
        """float32 zeros like the weights, one tree a replica: where gradients are summed."""
        return _zeros_like(params, mesh=self)

    def summed(self, apart: Tree) -> Tree:
        """The sum of gradients that replicas have apart, each part where its master lies."""
        return apart if self.devices is None else _summed(apart, mesh=self)

    def gradient_programs(self, params: Any) -> tuple[list[Program], Any]:
        """What `zeros` and `summed` compile, and what they make and take, as shapes."""
        like = {"mesh": self}
        grads = jax.eval_shape(partial(_zeros_like, mesh=self), params)
        grads = self.structs(grads, self.apart(params))
        programs = [Program("zero gradients", _zeros_like, (params,), like)]
        if self.devices is not None:
            programs.append(Program("sum of gradients", _summed, (grads,), like))
        return programs, grads

    def weight_programs(self, masters: Any, dtype: jnp.dtype) -> list[Program]:
        """What `compute` compiles."""
        if self.devices is None:
            return []
        how = {"dtype": dtype, "role": "student", "mesh": self}
        return [Program("compute weights", _compute, (masters,), how)]

    def total(self, apart: Tree) -> Tree:
        """The sums of numbers that replicas have apart, for every device and process to read."""
        return apart if self.devices is None else _total(apart, mesh=self)

    def compute(self, masters: Any, dtype: jnp.dtype) -> Any:
        """The compute weights in `dtype`; on one device the very same arrays where that is theirs."""
        if self.devices is None:
            return jax.tree.map(lambda w: w if w.dtype == dtype else w.astype(dtype), masters)
        return _compute(masters, dtype=dtype, role="student", mesh=self)

    def fetch(self, tree: Any) -> Any:
        """Host copies of a tree of arrays, wherever they lie; waits for them."""
        here = all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))
        return jax.device_get(tree if here else _replicated(tree, mesh=self))

    def check(self, role: str, model: Any) -> None:
        """Raises ConfigError for a model that does not divide over `tensor`."""
        partition.check(role, model, self._sizes, sharded=role in self.sharded)

    def describe(self) -> str:
        """One line for the start of a run."""
        if self.devices is None:
            return f"devices: one {jax.devices()[0].device_kind}"
        sizes = " x ".join(f"{name} {self._sizes[name]}" for name in AXES)
        kind, processes = jax.devices()[0].device_kind, jax.process_count()
        where = f" in {processes} processes" if processes > 1 else ""
        return f"devices: {self.devices.size} {kind}{where}, {sizes}"

    @property
    def _sizes(self) -> Mapping[str, int]:
        return dict.fromkeys(AXES, 1) if self.devices is None else self.devices.shape

    def _apart_from_each_other(self, function: Callable, given: Any, made: Any) -> Callable:
        """`function` under shard_map; only `tensor`, where it divides anything, is left to the compiler."""
        return jax.shard_map(
            function,
            mesh=self.devices,
            in_specs=given,
            out_specs=made,
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
    """The mesh of the config section `mesh` over all devices.

    Raises ConfigError: as many devices as the section asks for are not there.
    """
    devices = jax.devices() if devices is None else devices
    count, rest = len(devices), section.fsdp * section.tensor
    data = count // rest if section.data == -1 else section.data
    if data * rest != count:
        asked = f"mesh.data={section.data}, mesh.fsdp={section.fsdp}, mesh.tensor={section.tensor}"
        wanted = f"a multiple of {rest}" if section.data == -1 else str(data * rest)
        fits = math.gcd(count, section.tensor)
        fix = "--config.mesh.data=-1"
        if count % rest:
            fix += f" --config.mesh.fsdp=1 --config.mesh.tensor={fits}"
        raise ConfigError(
            f"{asked} asks for {wanted} devices, here are {count}; set {fix}, or start on as many"
        )
    if count == 1:
        return ONE
    shape = (data, section.fsdp, section.tensor)
    # Auto, said explicitly: the default has changed before. What may be apart is kept so by shard_map.
    types = (AxisType.Auto,) * len(AXES)
    sharded = tuple(role for role in ROLES if section.get(role) == "sharded")
    return Mesh(jax.make_mesh(shape, AXES, axis_types=types, devices=devices), sharded)


def _spec(x: Any, kind: str) -> Any:
    """The partitioning of an argument of `Mesh.each`."""
    return manual_specs(x, apart=kind == SUMS) if kind in (WHOLE, SUMS) else P(REPLICAS)


def _first(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x[0], tree)


def _as_entry(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x[None], tree)


def _placed(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array that every process has, on the devices of all of them."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


@partial(jax.jit, static_argnames=("mesh",))
def _zeros_like(params: Any, *, mesh: Mesh) -> Any:
    if mesh.devices is None:
        return jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)

    def one(path: tuple, weight: Any) -> jax.Array:
        apart = math.prod(map(mesh._sizes.__getitem__, apart_axes(path)))
        return jnp.zeros((apart, *weight.shape), jnp.float32)

    return mesh.constrain(jax.tree_util.tree_map_with_path(one, params), mesh.apart(params))


@partial(jax.jit, static_argnames=("mesh",))
def _summed(apart: Any, *, mesh: Mesh) -> Any:
    params = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), apart)
    masters = jax.tree.map(lambda sharding: sharding.spec, mesh.masters(unwrapped(params)))

    def add(apart: Any) -> Any:
        kept = jax.tree_util.tree_map_with_path(lambda path, _: _Axes(apart_axes(path)), params)
        return jax.tree.map(
            lambda gradient, axes, spec: _scattered(gradient[0], axes.names, spec),
            unwrapped(apart), unwrapped(kept), masters,
        )  # fmt: skip

    # Of all axes, `tensor` too: the compiler would gather what it divides before a reduction.
    places = jax.tree.map(lambda sharding: sharding.spec, mesh.apart(params))
    return jax.shard_map(
        add, mesh=mesh.devices, in_specs=(places,), out_specs=masters, check_vma=False
    )(apart)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Names of axes as one leaf of a tree."""

    names: tuple[str, ...]


def _scattered(gradient: jax.Array, among: tuple[str, ...], spec: P) -> jax.Array:
    """The sum among the devices of these axes, of which each keeps its part."""
    axes = [axis if isinstance(axis, tuple) else (axis,) for axis in spec]
    if among not in axes:
        return jax.lax.psum(gradient, among)
    return jax.lax.psum_scatter(gradient, among, scatter_dimension=axes.index(among), tiled=True)


@partial(jax.jit, static_argnames=("mesh",))
def _total(apart: Any, *, mesh: Mesh) -> Any:
    return _whole(jax.tree.map(lambda x: jnp.sum(x, axis=0), apart), mesh)


@partial(jax.jit, static_argnames=("mesh",))
def _replicated(tree: Any, *, mesh: Mesh) -> Any:
    return _whole(tree, mesh)


def _whole(tree: Any, mesh: Mesh) -> Any:
    return jax.lax.with_sharding_constraint(tree, mesh.whole)


@partial(jax.jit, static_argnames=("dtype", "role", "mesh"))
def _compute(masters: Any, *, dtype: jnp.dtype, role: str, mesh: Mesh) -> Any:
    cast = jax.tree.map(lambda w: w.astype(dtype), masters)
    cast = mesh.constrain(cast, mesh.masters(cast))  # gathered in the dtype to compute in
    cast = mesh.slices(cast, role)
    return mesh.constrain(cast, mesh.weights(cast))
