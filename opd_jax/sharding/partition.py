"""What a mesh `data x fsdp x tensor` divides: one table of weights, and the places that follow from it.

Compute weights are whole over data x fsdp, or slices along fsdp; `tensor` divides heads and MLP. float32
masters and what is like them are divided among the replicas (data x fsdp) as well.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
from jax.sharding import PartitionSpec as P

from opd_jax.errors import ConfigError

AXES = DATA, FSDP, TENSOR = ("data", "fsdp", "tensor")
REPLICAS = (DATA, FSDP)
ROLES = ("student", "teacher", "reference")
Sizes = Mapping[str, int]  # devices along each axis of `AXES`

# Logical axis -> mesh axis that divides it in compute weights; the others are whole. The vocabulary is
# whole: top-k and sampling want all logits of a token in one place.
DIVIDED = {"heads": TENSOR, "kv_heads": TENSOR, "mlp": TENSOR}
# Weight -> its logical axes, behind that of the layers where they are stacked.
_WEIGHTS = {
    "embed.embedding": ("vocab", "embed"),
    "attention_norm.scale": ("embed",),
    "query.kernel": ("embed", "heads"),
    "query.bias": ("heads",),
    "key.kernel": ("embed", "kv_heads"),
    "key.bias": ("kv_heads",),
    "value.kernel": ("embed", "kv_heads"),
    "value.bias": ("kv_heads",),
    "query_norm.scale": ("head_size",),
    "key_norm.scale": ("head_size",),
    "output.kernel": ("heads", "embed"),
    "mlp_norm.scale": ("embed",),
    "gate.kernel": ("embed", "mlp"),
    "up.kernel": ("embed", "mlp"),
    "down.kernel": ("mlp", "embed"),
    "norm.scale": ("embed",),
    "head.kernel": ("vocab", "embed"),
}


class Slice(flax.struct.PyTreeNode):
    """A compute weight of which each device along `fsdp` holds a slice. A replica gathers it to use it.

    Attributes:
      value: the whole array, divided; on a replica its slice.
      axis: that is divided, counted from the last: a layer of stacked weights has the same.
    """

    value: Any
    axis: int = flax.struct.field(pytree_node=False)


def whole(tree: Any) -> Any:
    """On a replica: weights to compute with, each gathered where it is a slice."""

    def one(weight: Any) -> jax.Array:
        if not isinstance(weight, Slice):
            return weight
        axis = weight.value.ndim + weight.axis
        return jax.lax.all_gather(weight.value, FSDP, axis=axis, tiled=True)

    return jax.tree.map(one, tree, is_leaf=is_slice)


def over_heads(function: Callable) -> Callable:
    """`function(query, key, value, length [B])`, of each device along `tensor` with its own heads.

    Its first three arguments and its result are [B, T, heads, H]. Says what the compiler would have to
    find out, and cannot of a kernel that is not its own.
    """
    around = jax.sharding.get_abstract_mesh()
    if TENSOR not in around.auto_axes or around.shape[TENSOR] == 1:
        return function
    heads = P(None, None, TENSOR)
    return jax.shard_map(
        function, axis_names={TENSOR}, in_specs=(heads, heads, heads, P()), out_specs=heads,
        check_vma=False,
    )  # fmt: skip


def sliced(tree: Any) -> bool:
    """Whether any of the weights is."""
    return any(map(is_slice, jax.tree.leaves(tree, is_leaf=is_slice)))


def unwrapped(tree: Any) -> Any:
    """The same global arrays in a plain tree, wherever they lie."""
    return jax.tree.map(lambda w: w.value if is_slice(w) else w, tree, is_leaf=is_slice)


def is_slice(leaf: Any) -> bool:
    """Whether a leaf is a `Slice`."""
    return isinstance(leaf, Slice)


def data_size(section: Any, devices: int) -> int:
    """Devices along `data`, where the config section `mesh` is laid over so many devices.

    Raises ConfigError: its axes do not multiply to that number.
    """
    rest = section.fsdp * section.tensor
    data = devices // rest if section.data == -1 else section.data
    if data * rest != devices:
        asked = f"mesh.data={section.data}, mesh.fsdp={section.fsdp}, mesh.tensor={section.tensor}"
        wanted = f"a multiple of {rest}" if section.data == -1 else str(data * rest)
        fits = math.gcd(devices, section.tensor)
        fix = "--config.mesh.data=-1"
        if devices % rest:
            fix += f" --config.mesh.fsdp=1 --config.mesh.tensor={fits}"
        raise ConfigError(
            f"{asked} asks for {wanted} devices, here are {devices}; set {fix}, or start on as many"
        )
    return data


def check(role: str, model: Any, sizes: Sizes, *, sharded: bool) -> None:
    """Raises ConfigError for a model that does not divide over `tensor`, or is to be divided twice."""
    size = sizes[TENSOR]
    if sharded and size > 1:
        raise ConfigError(
            f"mesh.{role}='sharded' with mesh.tensor={size}, wanted one of the two; "
            f"set --config.mesh.{role}=replicated or --config.mesh.tensor=1"
        )
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        if (count := getattr(model, name)) % size:
            fits = max(n for n in range(1, size + 1) if divides(model, n))
            raise ConfigError(
                f"mesh.tensor={size} does not divide the {role}'s {name}={count}; "
                f"set --config.mesh.tensor={fits}"
            )


def divides(model: Any, size: int) -> bool:
    """Whether `tensor` of this size divides a model's heads and MLP."""
    counts = (model.num_heads, model.num_kv_heads, model.intermediate_size)
    return all(count % size == 0 for count in counts)


def weight_spec(path: tuple, shape: tuple[int, ...], sizes: Sizes) -> P:
    """Of a compute weight, stacked or not, by its key path; a `Slice` has an axis over fsdp."""
    logical = _WEIGHTS.get(_name(path), ())
    axes: list = [None] * (len(shape) - len(logical))
    divided = DIVIDED if sizes[TENSOR] > 1 else {}
    axes += [divided.get(name) for name in logical]
    if _in_slice(path) and (axis := slice_axis(path, shape, sizes)) is not None:
        axes[axis] = FSDP
    return P(*axes)


def slice_axis(path: tuple, shape: tuple[int, ...], sizes: Sizes) -> int | None:
    """Which axis of a matrix `fsdp` divides, counted from the last; None for a vector."""
    logical = _WEIGHTS.get(_name(path), ())
    if len(logical) < 2 or sizes[FSDP] == 1:
        return None
    first = divided_dimension([None] * len(logical), shape[-len(logical) :], sizes[FSDP])
    return None if first is None else first - len(logical)


def master_spec(path: tuple, shape: tuple[int, ...], sizes: Sizes, *, sharded: bool) -> P:
    """As the compute weight, and its first whole dimension that divides is divided among replicas.

    Where the student's weights are slices (`sharded`), `fsdp` divides the masters as it does them,
    and only `data` is left to divide another dimension.
    """
    axes: list = list(weight_spec(path, shape, sizes))
    if _name(path) not in _WEIGHTS:
        return P(*axes)
    among: tuple[str, ...] = REPLICAS
    if sharded and (axis := slice_axis(path, shape, sizes)) is not None:
        axes[axis], among = FSDP, (DATA,)
    divided = divided_dimension(axes, shape, math.prod(sizes[axis] for axis in among))
    if divided is not None:
        axes[divided] = among
    return P(*axes)


def divided_dimension(axes: Sequence, shape: Sequence[int], count: int) -> int | None:
    """The first dimension without a mesh axis that divides among `count`."""
    whole = (i for i, axis in enumerate(axes) if axis is None and shape[i] % count == 0)
    return next(whole, None)


def _name(path: tuple) -> str:
    """`query.kernel` of a key path into params, an optimiser's state, or unstacked layers."""
    names: list[str] = []
    for key in reversed(path[:-1] if _in_slice(path) else path):
        if not isinstance(key, jax.tree_util.DictKey) or key.key == "layers":
            break
        names.insert(0, str(key.key))
    return ".".join(names)


def _in_slice(path: tuple) -> bool:
    return path[-1:] == (jax.tree_util.GetAttrKey("value"),)


def apart_axes(path: tuple) -> tuple[str, ...]:
    """The axes along which gradients of a weight are kept apart: those of slices are summed along `fsdp`."""
    return (DATA,) if _in_slice(path) else REPLICAS


def manual_specs(tree: Any, *, apart: bool) -> Any:
    """For shard_map, of its own axes alone: what a replica gets of weights, or of one gradient a replica."""

    def one(path: tuple, leaf: Any, axis: int | None = None) -> P:
        axes: list = [None] * (leaf.ndim - apart)
        if axis is not None:
            axes[axis] = FSDP
        return P(*([apart_axes(path)] * apart), *axes)

    def weight(path: tuple, leaf: Any) -> Any:
        if not is_slice(leaf):
            return one(path, leaf)
        key = jax.tree_util.GetAttrKey("value")
        return leaf.replace(value=one((*path, key), leaf.value, leaf.axis))

    return jax.tree_util.tree_map_with_path(weight, tree, is_leaf=is_slice)
