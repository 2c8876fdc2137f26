"""Causal attention over right-padded rows. For one query against a cache see kv_cache.py.

Lengths count from index 0 (right padding), as cuDNN's fused kernels require. cuDNN computes
bfloat16/float16 on GPU; every other case takes `blocked`, which is plain JAX.

Axes besides the usual ones: R, the queries of one block and key head; S, the keys they attend to.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from opd_jax.sharding.partition import over_heads

KINDS = ("auto", "plain")
# The backend whose attention programs have, where it is not the one that this process runs on: to compile for
# another (memory_plan/programs.py), or to do without cuDNN. jit retraces where it changes: it is part of the
# key of JAX's caches.
BACKEND = jax.make_user_context(None)
BLOCK = 48  # positions in a block of queries, or more; the last block and short rows may have fewer
MOST_BLOCKS = 8  # blocks per row; each adds code to every layer
MASKED = -1e30  # logit of an unseen position; finite, so that the difference of two is not nan


def attend_causal(
    query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Return causal grouped-query attention over right-padded rows, softmax in float32; [B, T, N, H].

    Under a causal mask no real token attends to padding on the right, so `length` only lets a fused
    kernel skip it.
    """
    if fused(query_BTNH.dtype):
        return over_heads(_one_kernel)(query_BTNH, key_BTKH, value_BTKH, length_B)
    return blocked(query_BTNH, key_BTKH, value_BTKH)


def _one_kernel(
    query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, length_B: jax.Array
) -> jax.Array:
    return jax.nn.dot_product_attention(
        query_BTNH, key_BTKH, value_BTKH, is_causal=True, query_seq_lengths=length_B,
        key_value_seq_lengths=length_B, implementation="cudnn",
    )  # fmt: skip


def fused(dtype: jnp.dtype) -> bool:
    """Return whether attention in this dtype is one cuDNN kernel here."""
    return (BACKEND.value or jax.default_backend()) == "gpu" and dtype in (
        jnp.bfloat16,
        jnp.float16,
    )


def choose(kind: str) -> None:
    """Let every program from here on have this kind of attention: "auto", or "plain" JAX also on a GPU."""
    BACKEND.set_global("cpu" if kind == "plain" else None)


@jax.custom_vjp
def blocked(query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array) -> jax.Array:
    """Return causal grouped-query attention, a block of queries at a time; [B, T, N, H].

    A block of queries is multiplied only with the keys up to its last position, which saves almost half
    of the products, and in short rows its weights fit into a cache. The backward pass recomputes them from
    the saved logsumexp, so no array [B, N, T, T] is kept (arXiv 2205.14135, Algorithms 1 and 4, without
    the blocks of keys). Softmax and sums are float32.
    """
    return _forward(query_BTNH, key_BTKH, value_BTKH)[0]


def _forward(
    query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    query_BKRH = _by_key_head(query_BTNH, key_BTKH.shape[2])
    key_BKSH, value_BKSH = key_BTKH.swapaxes(1, 2), value_BTKH.swapaxes(1, 2)
    outs, logsumexps = [], []
    for end, rows in _blocks(query_BTNH, key_BTKH):
        logit_BKRS = _logits(query_BKRH[:, :, rows], key_BKSH[:, :, :end], rows)
        top_BKR1 = jnp.max(logit_BKRS, axis=-1, keepdims=True)
        weight_BKRS = jnp.exp(logit_BKRS - top_BKR1)
        sum_BKR1 = jnp.sum(weight_BKRS, axis=-1, keepdims=True)
        weight_BKRS = weight_BKRS.astype(value_BKSH.dtype)
        outs.append(_dot("BKRS,BKSH->BKRH", weight_BKRS, value_BKSH[:, :, :end]) / sum_BKR1)
        logsumexps.append(top_BKR1 + jnp.log(sum_BKR1))
    out_BKRH = jnp.concatenate(outs, axis=2).astype(query_BTNH.dtype)
    residuals = (query_BTNH, key_BTKH, value_BTKH, out_BKRH, jnp.concatenate(logsumexps, axis=2))
    return _by_position(out_BKRH, query_BTNH.shape), residuals


def _backward(
    residuals: tuple[jax.Array, ...], cotangent_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """With A = softmax(Q K^T / sqrt(H)), O = A V and G the cotangent of O:

    dV = A^T G,   dZ = A * (G V^T - rowsum(G * O)),   dQ = dZ K / sqrt(H),   dK = dZ^T Q / sqrt(H).
    """
    query_BTNH, key_BTKH, value_BTKH, out_BKRH, logsumexp_BKR1 = residuals
    dtype, scale = query_BTNH.dtype, query_BTNH.shape[-1] ** -0.5
    query_BKRH = _by_key_head(query_BTNH, key_BTKH.shape[2])
    cotangent_BKRH = _by_key_head(cotangent_BTNH, key_BTKH.shape[2])
    key_BKSH, value_BKSH = key_BTKH.swapaxes(1, 2), value_BTKH.swapaxes(1, 2)
    inner_BKR1 = jnp.sum(
        cotangent_BKRH.astype(jnp.float32) * out_BKRH.astype(jnp.float32), -1, keepdims=True
    )
    d_queries = []
    d_key = d_value = jnp.zeros(key_BKSH.shape, jnp.float32)
    for end, rows in _blocks(query_BTNH, key_BTKH):
        queries_BKRH, cotangents_BKRH = query_BKRH[:, :, rows], cotangent_BKRH[:, :, rows]
        keys_BKSH, values_BKSH = key_BKSH[:, :, :end], value_BKSH[:, :, :end]
        weight_BKRS = jnp.exp(_logits(queries_BKRH, keys_BKSH, rows) - logsumexp_BKR1[:, :, rows])
        d_weight_BKRS = _dot("BKRH,BKSH->BKRS", cotangents_BKRH, values_BKSH)
        d_logit_BKRS = (weight_BKRS * (d_weight_BKRS - inner_BKR1[:, :, rows]) * scale).astype(
            dtype
        )
        d_queries.append(_dot("BKRS,BKSH->BKRH", d_logit_BKRS, keys_BKSH))
        d_keys = _dot("BKRS,BKRH->BKSH", d_logit_BKRS, queries_BKRH)
        d_values = _dot("BKRS,BKRH->BKSH", weight_BKRS.astype(dtype), cotangents_BKRH)
        d_key, d_value = d_key.at[:, :, :end].add(d_keys), d_value.at[:, :, :end].add(d_values)
    d_query_BTNH = _by_position(jnp.concatenate(d_queries, axis=2), query_BTNH.shape)
    d_key_BTKH, d_value_BTKH = d_key.swapaxes(1, 2), d_value.swapaxes(1, 2)
    return (
        d_query_BTNH.astype(dtype),
        d_key_BTKH.astype(key_BTKH.dtype),
        d_value_BTKH.astype(value_BTKH.dtype),
    )


blocked.defvjp(_forward, _backward)


def block_size(length: int) -> int:
    """Return the positions of a block of queries in rows of `length`; the last block may have fewer."""
    return -(-length // min(max(length // BLOCK, 1), MOST_BLOCKS))


def _blocks(query_BTNH: jax.Array, key_BTKH: jax.Array) -> Iterator[tuple[int, slice]]:
    """Yield the end position of every block of queries, and its rows in `_by_key_head`."""
    length, group = query_BTNH.shape[1], query_BTNH.shape[2] // key_BTKH.shape[2]
    size = block_size(length)
    for start in range(0, length, size):
        end = min(start + size, length)
        yield end, slice(start * group, end * group)


def _logits(query_BKRH: jax.Array, key_BKSH: jax.Array, rows: slice) -> jax.Array:
    """Return masked float32 logits of the queries in `rows` against the keys from position 0."""
    length = key_BKSH.shape[2]  # of the positions up to the last query
    position_R = jnp.arange(rows.start, rows.stop) // (rows.stop // length)
    seen_RS = position_R[:, None] >= jnp.arange(length)[None]
    logit_BKRS = _dot("BKRH,BKSH->BKRS", query_BKRH, key_BKSH) * query_BKRH.shape[-1] ** -0.5
    return jnp.where(seen_RS[None, None], logit_BKRS, MASKED)


def _by_key_head(x_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """Group query heads by their key head: [B, T, N, H] -> [B, K, T * N / K, H]."""
    batch, length, heads, size = x_BTNH.shape
    group = heads // kv_heads
    x_BTKGH = x_BTNH.reshape(batch, length, kv_heads, group, size)
    return x_BTKGH.swapaxes(1, 2).reshape(batch, kv_heads, length * group, size)


def _by_position(x_BKRH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `_by_key_head`; `shape` is [B, T, N, H]."""
    batch, length, heads, size = shape
    kv_heads = x_BKRH.shape[1]
    x_BKTGH = x_BKRH.reshape(batch, kv_heads, length, heads // kv_heads, size)
    return x_BKTGH.swapaxes(1, 2).reshape(shape)


def _dot(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
