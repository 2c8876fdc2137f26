"""Partitioning of weights over a mesh `data x fsdp x tensor`: one table, and the specs that follow from it.

Compute weights are replicated over data x fsdp, or sharded along fsdp; `tensor` shards heads and MLP.
float32 masters and trees like them are sharded over the replicas (data x fsdp) as well.
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

# Logical axis -> mesh axis that shards it in compute weights; the other axes are not sharded. Neither is
# the vocabulary: top-k and sampling need all logits of a token on one device.
DIVIDED = {"heads": TENSOR, "kv_heads": TENSOR, "mlp": TENSOR}
# Weight -> its logical axes, after the axis of layers where these are stacked.
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
    "query.lora_a": ("embed", "rank"),
    "query.lora_b": ("rank", "heads"),
    "key.lora_a": ("embed", "rank"),
    "key.lora_b": ("rank", "kv_heads"),
    "value.lora_a": ("embed", "rank"),
    "value.lora_b": ("rank", "kv_heads"),
    "output.lora_a": ("heads", "rank"),
    "output.lora_b": ("rank", "embed"),
    "gate.lora_a": ("embed", "rank"),
    "gate.lora_b": ("rank", "mlp"),
    "up.lora_a": ("embed", "rank"),
    "up.lora_b": ("rank", "mlp"),
    "down.lora_a": ("mlp", "rank"),
    "down.lora_b": ("rank", "embed"),
    "norm.scale": ("embed",),
    "head.kernel": ("vocab", "embed"),
}


class Slice(flax.struct.PyTreeNode):
    """A compute weight that is sharded along `fsdp`; a replica gathers it before it uses it.

    Attributes:
      value: the global array; inside shard_map the local slice.
      axis: the sharded axis, counted from the last, so that it is the same for one layer of stacked weights.
    """

    value: Any
    axis: int = flax.struct.field(pytree_node=False)


def gather(tree: Any) -> Any:
    """All-gather FSDP-sharded leaves (inside shard_map)."""

    def one(weight: Any) -> jax.Array:
        if not isinstance(weight, Slice):
            return weight
        axis = weight.value.ndim + weight.axis
        return jax.lax.all_gather(weight.value, FSDP, axis=axis, tiled=True)

    return jax.tree.map(one, tree, is_leaf=is_slice)


def over_heads(function: Callable) -> Callable:
    """Wrap `function(query, key, value, length [B])` in shard_map over the heads along `tensor`.

    Its first three arguments and its result are [B, T, heads, H]. The compiler cannot partition a kernel
    that is not its own, and would not find out by itself that the heads are independent.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if TENSOR not in mesh.auto_axes or mesh.shape[TENSOR] == 1:
        return function
    heads = P(None, None, TENSOR)
    return jax.shard_map(
        function, axis_names={TENSOR}, in_specs=(heads, heads, heads, P()), out_specs=heads,
        check_vma=False,
    )  # fmt: skip


def has_slices(tree: Any) -> bool:
    """Return whether any weight is a `Slice`."""
    return any(map(is_slice, jax.tree.leaves(tree, is_leaf=is_slice)))


def unwrapped(tree: Any) -> Any:
    """Replace every `Slice` by its global array."""
    return jax.tree.map(lambda w: w.value if is_slice(w) else w, tree, is_leaf=is_slice)


def is_slice(leaf: Any) -> bool:
    """Return whether a leaf is a `Slice`."""
    return isinstance(leaf, Slice)


def data_size(section: Any, devices: int) -> int:
    """Devices along `data`, where the config section `mesh` is laid over so many devices.

    Raises ConfigError: its axes do not multiply to that number.
    """
    rest = section.fsdp * section.tensor
    data = devices // rest if section.data == -1 else section.data
    if data * rest != devices:
        axes = f"mesh.data={section.data}, mesh.fsdp={section.fsdp}, mesh.tensor={section.tensor}"
        wanted = f"a multiple of {rest}" if section.data == -1 else str(data * rest)
        fits = math.gcd(devices, section.tensor)
        fix = "--config.mesh.data=-1"
        if devices % rest:
            fix += f" --config.mesh.fsdp=1 --config.mesh.tensor={fits}"
        raise ConfigError(
            f"{axes} needs {wanted} devices, and this run has {devices}; set {fix}, or start it on that "
            "many devices"
        )
    return data


def check(role: str, model: Any, sizes: Sizes, *, sharded: bool) -> None:
    """Raise ConfigError for a model that `tensor` does not divide, or that is sharded twice."""
    size = sizes[TENSOR]
    if sharded and size > 1:
        raise ConfigError(
            f"mesh.{role}='sharded' does not go together with mesh.tensor={size}; "
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
    """Return whether a `tensor` axis of this size divides a model's heads and MLP."""
    counts = (model.num_heads, model.num_kv_heads, model.intermediate_size)
    return all(count % size == 0 for count in counts)


def weight_spec(path: tuple, shape: tuple[int, ...], sizes: Sizes) -> P:
    """Return the spec of a compute weight, stacked or not, by its key path; `fsdp` shards a `Slice`."""
    logical = _WEIGHTS.get(_name(path), ())
    axes: list = [None] * (len(shape) - len(logical))
    divided = DIVIDED if sizes[TENSOR] > 1 else {}
    axes += [divided.get(name) for name in logical]
    if _in_slice(path) and (axis := slice_axis(path, shape, sizes)) is not None:
        axes[axis] = FSDP
    return P(*axes)


def slice_axis(path: tuple, shape: tuple[int, ...], sizes: Sizes) -> int | None:
    """Return the axis of a matrix that `fsdp` shards, counted from the last; None for a vector."""
    logical = _WEIGHTS.get(_name(path), ())
    if len(logical) < 2 or sizes[FSDP] == 1:
        return None
    first = divided_dimension([None] * len(logical), shape[-len(logical) :], sizes[FSDP])
    return None if first is None else first - len(logical)


def master_spec(path: tuple, shape: tuple[int, ...], sizes: Sizes, *, sharded: bool) -> P:
    """Return the spec of a float32 master: the compute weight's, with a further axis sharded over replicas.

    That axis is the first one that is not sharded and that the number of replicas divides. Where the
    student's compute weights are sharded along fsdp (`sharded`), the masters are sharded like them, and
    only `data` is left for the further axis.
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
    """Return the first unsharded dimension that `count` divides; None where there is none."""
    candidates = (i for i, axis in enumerate(axes) if axis is None and shape[i] % count == 0)
    return next(candidates, None)


def _name(path: tuple) -> str:
    """Return the name, such as `query.kernel`, of a key path into params, optimiser state, or one layer."""
    names: list[str] = []
    for key in reversed(path[:-1] if _in_slice(path) else path):
        if not isinstance(key, jax.tree_util.DictKey) or key.key == "layers":
            break
        names.insert(0, str(key.key))
    return ".".join(names)


def _in_slice(path: tuple) -> bool:
    return path[-1:] == (jax.tree_util.GetAttrKey("value"),)


def unreduced_axes(path: tuple) -> tuple[str, ...]:
    """Return the axes along which a weight's gradient is unreduced: data and fsdp, or data for a `Slice`."""
    return (DATA,) if _in_slice(path) else REPLICAS


def manual_specs(tree: Any, *, unreduced: bool) -> Any:
    """Return the specs for shard_map over the replicas: of weights, or of one gradient per replica."""

    def one(path: tuple, leaf: Any, axis: int | None = None) -> P:
        axes: list = [None] * (leaf.ndim - unreduced)
        if axis is not None:
            axes[axis] = FSDP
        return P(*([unreduced_axes(path)] * unreduced), *axes)

    def weight(path: tuple, leaf: Any) -> Any:
        if not is_slice(leaf):
            return one(path, leaf)
        key = jax.tree_util.GetAttrKey("value")
        return leaf.replace(value=one((*path, key), leaf.value, leaf.axis))

    return jax.tree_util.tree_map_with_path(weight, tree, is_leaf=is_slice)
