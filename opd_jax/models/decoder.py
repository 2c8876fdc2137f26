"""The decoder: one Linen definition of a layer, used as pure functions for training and decoding.

Parameters are a plain tree:

    embed.embedding [V, D]   layers.* [L, ...] (stacked)   norm.scale [D]   head.kernel [V, D] (untied)

Training scans one layer over the stacked weights (an update unrolls few layers). Decoding takes the same
weights as a tuple of layers (`unstack`, once per rollout) and a tuple of caches, so that the token loop
copies neither.
The compute dtype is that of the parameters (that of norm.scale where the embedding and the head are
float32 masters); norms, rotations, softmax and logits are float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from opd_jax.models import kv_cache, layer_gradients, rope
from opd_jax.models.attention import attend_causal
from opd_jax.models.config import ModelConfig
from opd_jax.models.kv_cache import Cache
from opd_jax.models.projection import project
from opd_jax.models.remat import checkpointed
from opd_jax.sharding.partition import gather, has_slices
from opd_jax.types import Array

Params = dict[str, Any]
LORA_A, LORA_B = "lora_a", "lora_b"  # adapters beside a kernel (low_rank.py)
SHALLOW = 4  # layers up to which an update without recomputation is not a loop
EXCLUDED = -1e30  # a finite logit without mass: its exp is exactly 0, and 0 * EXCLUDED is not nan
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Model(flax.struct.PyTreeNode):
    """A model: its architecture, which is static under jit, and its parameters.

    Attributes:
      config: the architecture.
      params: weights, stacked or as a tuple of layers; shapes and dtypes where programs are compiled
        ahead.
    """

    config: ModelConfig = flax.struct.field(pytree_node=False)
    params: Params


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32; keeps the dtype of x."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [..., D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * jnp.broadcast_to(scale.astype(x.dtype), x.shape)


class Linear(nn.Module):
    """x W + b, and + s (x A) B where there are adapters of low rank beside W (low_rank.py)."""

    features: int
    use_bias: bool = False
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., D] to [..., F]."""
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        y = project(x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y += jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
        if self.has_variable("params", LORA_A):
            a: jax.Array = self.get_variable("params", LORA_A)
            b: jax.Array = self.get_variable("params", LORA_B)
            y = y + self.scale * project(project(x, a), b)
        return y


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU. `attend` is an argument, so that every mode shares the layer."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, tables: tuple[jax.Array, jax.Array], attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Return the new residual stream [B, T, D] and the second result of `attend`."""
        c = self.config

        def linear(features: int, name: str, bias: bool = False) -> Linear:
            return Linear(features, bias, c.lora_scale, name=name)

        def heads(y: jax.Array, name: str, count: int) -> jax.Array:
            y = linear(count * c.head_dim, name, c.qkv_bias)(y)
            return y.reshape(*y.shape[:-1], count, c.head_dim)

        with jax.named_scope("attention"):
            y = RMSNorm(c.rms_norm_eps, name="attention_norm")(x_BTD)
            query_BTNH = heads(y, "query", c.num_heads)
            key_BTKH = heads(y, "key", c.num_kv_heads)
            value_BTKH = heads(y, "value", c.num_kv_heads)
            if c.qk_norm:
                query_BTNH = RMSNorm(c.rms_norm_eps, name="query_norm")(query_BTNH)
                key_BTKH = RMSNorm(c.rms_norm_eps, name="key_norm")(key_BTKH)
            query_BTNH, key_BTKH = rope.rotate(query_BTNH, tables), rope.rotate(key_BTKH, tables)
            with jax.named_scope("attend"):
                attended_BTNH, kept = attend(query_BTNH, key_BTKH, value_BTKH)
            attended = attended_BTNH.reshape(*x_BTD.shape[:2], c.num_heads * c.head_dim)
            x_BTD = x_BTD + linear(c.hidden_size, "output")(attended)

        with jax.named_scope("mlp"):
            y = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x_BTD)
            gate = nn.silu(linear(c.intermediate_size, "gate")(y))
            up = linear(c.intermediate_size, "up")(y)
            return x_BTD + linear(c.hidden_size, "down")(gate * up), kept


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Return random float32 parameters (normal, 0.02), initialised as in the Qwen and Llama families."""
    embed_key, head_key, layers_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, config.hidden_size), jnp.float32)
    tables = rope.rotary(config, jnp.zeros((1, 1), jnp.int32))

    def init_layer(key: jax.Array) -> Params:
        return Layer(config).init(key, x, tables, lambda q, k, v: (q, None))["params"]

    shape = (config.vocab_size, config.hidden_size)
    params: Params = {
        "embed": {"embedding": 0.02 * jax.random.normal(embed_key, shape)},
        "layers": jax.vmap(init_layer)(jax.random.split(layers_key, config.num_layers)),
        "norm": {"scale": jnp.ones((config.hidden_size,))},
    }
    if not config.tie_embeddings:
        params["head"] = {"kernel": 0.02 * jax.random.normal(head_key, shape)}
    return params


def abstract_params(config: ModelConfig) -> Params:
    """Return shapes and dtypes of `init`'s tree, without arrays."""
    return jax.tree.map(lambda leaf: leaf, _abstract_params(config))  # the caller's own dicts


@functools.lru_cache(64)
def _abstract_params(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda: init(jax.random.key(0), config))


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    *,
    remat: str = "none",
    sums: Params | None = None,
) -> jax.Array:
    """Return the final normed hidden states [B, T, D] of right-padded rows, in the final norm's dtype.

    Position t attends to tokens 0..t of its row; entries at t >= length are finite and meaningless.
    `remat` names the activations that each layer saves for the backward pass (models/remat.py). With
    `sums`, float32 and shaped like `params["layers"]`, the layers compute in the final norm's dtype; the
    gradient of `sums` is then `sums` plus the gradient of the layers, whose own gradient is 0.
    """
    x_BTD = _embedded(params, tokens_BT).astype(params["norm"]["scale"].dtype)
    tables = rope.rotary(config, jnp.arange(tokens_BT.shape[1])[None])
    length_B = jnp.maximum(length_B, 1)  # fused attention over an empty row would be nan

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return attend_causal(q, k, v, length_B), None

    def layer(carry: tuple, inputs: tuple[jax.Array, Params]) -> tuple[tuple, None]:
        (x_BTD, sums), (index, weights) = carry, inputs
        weights, sums = layer_gradients.add_to_sums(x_BTD.dtype, weights, sums, index)
        x_BTD, _ = _apply(config, gather(weights), x_BTD, tables, attend)
        return (x_BTD, sums), None

    def plain(x_BTD: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        return _apply(config, gather(weights), x_BTD, tables, attend)

    if has_slices(params) and remat == "none":
        remat = "slices"
    if sums is not None:
        layers = (jnp.arange(config.num_layers), params["layers"])
        shallow = config.num_layers <= SHALLOW and remat == "none"
        (x_BTD, carried), _ = jax.lax.scan(
            checkpointed(layer, remat), (x_BTD, sums), layers, unroll=shallow
        )
        x_BTD = layer_gradients.seed_sums(x_BTD, carried, jax.lax.stop_gradient(sums))
    else:
        x_BTD, _ = jax.lax.scan(checkpointed(plain, remat), x_BTD, params["layers"])
    return _final_norm(params, config, x_BTD)


def head(params: Params) -> jax.Array:
    """Return the output matrix [V, D], which is the embedding where the two are tied."""
    return gather(params["head"]["kernel"] if "head" in params else params["embed"]["embedding"])


def head_alone(params: Params) -> Params:
    """Return only the parameters that `head` reads."""
    name = "head" if "head" in params else "embed"
    return {name: params[name]}


def with_head_rows(params: Params, ids_V: jax.Array) -> Params:
    """Renumber the ids of a model: return it with the rows `ids_V` of its output matrix, in that order."""
    return params | {"head": {"kernel": head(params)[ids_V]}}


def logits(head_VD: jax.Array, hidden: jax.Array, allowed_V: Array | None = None) -> jax.Array:
    """Return hidden @ head^T, accumulated and returned in float32: [..., D], [V, D] -> [..., V].

    Ids outside `allowed_V` (bool) get `EXCLUDED`: no mass, and 0 in p log p and in p (log p - log q).
    """
    out = jnp.einsum("...D,VD->...V", hidden, head_VD, preferred_element_type=jnp.float32)
    return out if allowed_V is None else exclude(out, allowed_V)


def exclude(logits: jax.Array, allowed_V: Array) -> jax.Array:
    """Replace logits [..., V] of ids that are not allowed by `EXCLUDED`."""
    return jnp.where(jnp.expand_dims(allowed_V, range(logits.ndim - 1)), logits, EXCLUDED)


def forward(
    params: Params, config: ModelConfig, tokens_BT: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Return all logits [B, T, V], float32, for tests and small inputs: training never holds this array."""
    return logits(head(params), hidden_states(params, config, tokens_BT, length_B))


def unstack(params: Params) -> Params:
    """Return the parameters with `layers` as a tuple of one tree per layer, as decoding takes them."""
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return params | {
        "layers": tuple(jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(count))
    }


def prefill(
    params: Params, config: ModelConfig, tokens_BT: jax.Array, length_B: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Return keys and values [B, T, K, H] of every layer for right-padded prompts, for `kv_cache.place`.

    `params` are unstacked.
    """
    x_BTD = _embedded(params, tokens_BT)
    tables = rope.rotary(config, jnp.arange(tokens_BT.shape[1])[None])
    pairs = []
    for weights in params["layers"]:
        x_BTD, pair = _apply(
            config,
            weights,
            x_BTD,
            tables,
            lambda q, k, v: (attend_causal(q, k, v, length_B), (k, v)),
        )
        pairs.append(pair)
    return tuple(pairs)


def decode(
    params: Params,
    config: ModelConfig,
    token_B: jax.Array,
    position_B: jax.Array,
    caches: tuple[Cache, ...],
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Decode one token per row: write its key and value at `position`, attend to 0..position.

    Return normed hidden states [B, D] and the caches, which are updated in place when donated. `params`
    are unstacked.
    """
    x_BTD = _embedded(params, token_B)[:, None]
    tables = rope.rotary(config, position_B[:, None])
    new_caches = []
    for weights, before in zip(params["layers"], caches, strict=True):

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, before: Cache = before
        ) -> tuple[jax.Array, Cache]:
            after = kv_cache.append(before, k[:, 0], v[:, 0], position_B)
            return kv_cache.attend(q[:, 0], after, position_B + 1)[:, None], after

        x_BTD, after = _apply(config, weights, x_BTD, tables, attend)
        new_caches.append(after)
    return _final_norm(params, config, x_BTD)[:, 0], tuple(new_caches)


@jax.named_scope("embed")
def _embedded(params: Params, tokens: jax.Array) -> jax.Array:
    return gather(params["embed"]["embedding"])[tokens]


def _apply(
    config: ModelConfig,
    weights: Params,
    x_BTD: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    attend: Attend,
) -> tuple[jax.Array, Any]:
    """Apply one layer as a function of its weights."""
    out: Any = Layer(config).apply({"params": weights}, x_BTD, tables, attend)
    return out


def _final_norm(params: Params, config: ModelConfig, x_BTD: jax.Array) -> jax.Array:
    normed: Any = RMSNorm(config.rms_norm_eps).apply({"params": params["norm"]}, x_BTD)
    return normed
