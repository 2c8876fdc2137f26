"""Adapters of low rank beside frozen weights: LoRA (arXiv 2106.09685, Eq. 3).

    y = x W + s (x A) B        A [in, rank], B [rank, out], s = alpha / rank^power

The tree of adapters mirrors the targeted matrices alone, stacked over the layers as they are:
`layers.query.lora_a` [L, in, rank] and `layers.query.lora_b` [L, rank, out]. `join` puts it beside the
kernels of a base, and the decoder's linear layer reads both. Without adapters the same base is the
reference, or a teacher.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.errors import ModelError
from opd_jax.models import decoder
from opd_jax.models.config import ModelConfig
from opd_jax.models.decoder import LORA_A as A
from opd_jax.models.decoder import LORA_B as B
from opd_jax.models.decoder import Params

# A matrix as adapter files and configs call it -> as the parameter tree does.
TARGETS = {
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What decides the adapters of a model.

    Attributes:
      rank: columns of A and rows of B.
      alpha, power: s = alpha / rank^power. Power 1 is the paper's, 0.5 that of arXiv 2312.03732.
      targets: names of `TARGETS`, in their order.
    """

    rank: int
    alpha: float
    power: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """s of x W + s (x A) B."""
        return float(self.alpha / self.rank**self.power)


def init(key: jax.Array, config: ModelConfig, low_rank: LowRank) -> Params:
    """Return new adapters, float32: A uniform in +-1 / sqrt(in), B 0, so that the model is its base.

    A is PyTorch's Kaiming uniform with a = sqrt(5), as PEFT draws it.
    """
    abstract = abstract_adapters(config, low_rank)
    layers = {}
    for i, (name, pair) in enumerate(abstract["layers"].items()):
        shape = pair[A].shape
        bound = shape[1] ** -0.5
        drawn = jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-bound, maxval=bound)
        layers[name] = {A: drawn, B: jnp.zeros(pair[B].shape)}
    return {"layers": layers}


def abstract_adapters(config: ModelConfig, low_rank: LowRank) -> Params:
    """Return shapes and dtypes of `init`'s tree. Raises ModelError for a rank above a matrix."""
    kernels = decoder.abstract_params(config)["layers"]
    layers = {}
    for target in low_rank.targets:
        name = TARGETS[target]
        count, rows, columns = kernels[name]["kernel"].shape
        if low_rank.rank > min(rows, columns):
            raise ModelError(
                f"lora.rank={low_rank.rank} is more than {target} has, a matrix of {rows} x {columns}; "
                f"set --config.lora.rank={min(rows, columns)} or less, or leave {target} out of lora.targets"
            )
        layers[name] = {
            A: jax.ShapeDtypeStruct((count, rows, low_rank.rank), jnp.float32),
            B: jax.ShapeDtypeStruct((count, low_rank.rank, columns), jnp.float32),
        }
    return {"layers": layers}


def join(base: Params, adapters: Params) -> Params:
    """Return the base with the adapters beside its kernels; no array is copied."""
    layers = {
        name: weights | adapters["layers"].get(name, {}) for name, weights in base["layers"].items()
    }
    return base | {"layers": layers}


def adapters_of(params: Params) -> Params:
    """Return the adapters of a joined tree."""
    return {
        "layers": {
            name: {A: weights[A], B: weights[B]}
            for name, weights in params["layers"].items()
            if A in weights
        }
    }


def merge(tree: Any, scale: float) -> Any:
    """Replace each kernel that has adapters beside it by W + s A B, at any depth of the tree.

    The product and the sum are float32; the result has the kernel's dtype.
    """
    if isinstance(tree, tuple):
        return tuple(merge(part, scale) for part in tree)
    if not isinstance(tree, dict):
        return tree
    if A in tree:
        rest = {name: leaf for name, leaf in tree.items() if name not in (A, B)}
        return rest | {"kernel": _merged(tree["kernel"], tree[A], tree[B], scale)}
    return {name: merge(part, scale) for name, part in tree.items()}


def _merged(kernel: Any, a: Any, b: Any, scale: float) -> jax.Array:
    product = jnp.matmul(a, b, preferred_element_type=jnp.float32)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)
