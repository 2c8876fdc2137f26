"""The KV cache, in the layout of the attention that reads it.

cuDNN takes keys and values as one array [B, S, K, H] each, and stops at each row's length. The plain
implementation keeps a few blocks of positions as separate arrays, keys [B, K, H, S] and values
[B, K, S, H]: a matrix product reads a block without a copy, and blocks beyond the longest live row are
not read, so that the cost follows the live tokens and not the budget. Only this file knows which of the
two layouts a cache has.
"""

import jax
import jax.numpy as jnp

from opd_jax.models import attention
from opd_jax.models.config import ModelConfig
from opd_jax.sharding.partition import over_heads

Cache = tuple[tuple[jax.Array, jax.Array], ...]  # blocks of keys and values
BLOCK = 128  # least number of positions in a block of the plain layout
MOST_BLOCKS = 4  # blocks per row; each adds code to every layer


def init(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> tuple[Cache, ...]:
    """Return caches of `slots` positions, one per layer; zeros, because 0 * nan is nan under a mask."""
    kv_heads, size = config.num_kv_heads, config.head_dim
    if attention.fused(dtype):
        shapes = [((batch, slots, kv_heads, size),) * 2]
    else:
        shapes = [
            ((batch, kv_heads, size, width), (batch, kv_heads, width, size))
            for width in block_widths(slots)
        ]
    return tuple(
        tuple((jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for keys, values in shapes)
        for _ in range(config.num_layers)
    )


def head_axis(dtype: jnp.dtype) -> int:
    """Return the axis of key heads in a cache's keys and values."""
    return 2 if attention.fused(dtype) else 1


def block_widths(slots: int) -> list[int]:
    """Return the widths of the blocks: equal and a multiple of `BLOCK`, except for the last."""
    width = -(-slots // (BLOCK * MOST_BLOCKS)) * BLOCK
    return [min(width, slots - start) for start in range(0, slots, width)]


def append(cache: Cache, key_BKH: jax.Array, value_BKH: jax.Array, position_B: jax.Array) -> Cache:
    """Return the cache with one more token per row, at `position`."""
    rows = jnp.arange(position_B.shape[0])
    key_BKH, value_BKH = (x.astype(cache[0][0].dtype) for x in (key_BKH, value_BKH))
    if attention.fused(key_BKH.dtype):
        ((keys, values),) = cache
        # Known to be unique, 16-bit elements are stored; else XLA for GPUs exchanges them atomically.
        keys = keys.at[rows, position_B].set(key_BKH, unique_indices=True)
        values = values.at[rows, position_B].set(value_BKH, unique_indices=True)
        return ((keys, values),)
    out, start = [], 0
    for keys, values in cache:
        width = values.shape[2]
        inside_B = (position_B >= start) & (position_B < start + width)
        at_B = jnp.where(inside_B, position_B - start, width)  # beyond the end means dropped
        out.append(
            (
                keys.at[rows, :, :, at_B].set(key_BKH, mode="drop"),
                values.at[rows, :, at_B].set(value_BKH, mode="drop"),
            )
        )
        start += width
    return tuple(out)


def place(cache: Cache, key_BTKH: jax.Array, value_BTKH: jax.Array, slot_B: jax.Array) -> Cache:
    """Return the cache with prompts in its rows `slot`, from position 0; slots that it lacks are dropped."""
    key_BTKH, value_BTKH = (x.astype(cache[0][0].dtype) for x in (key_BTKH, value_BTKH))
    if attention.fused(key_BTKH.dtype):
        ((keys, values),) = cache
        at = (slot_B, slice(key_BTKH.shape[1]))
        keys = keys.at[at].set(key_BTKH, mode="drop", unique_indices=True)
        values = values.at[at].set(value_BTKH, mode="drop", unique_indices=True)
        return ((keys, values),)
    out, start = [], 0
    for keys, values in cache:
        part = slice(start, start + values.shape[2])
        key_BKHS = key_BTKH[:, part].transpose(0, 2, 3, 1)
        value_BKSH = value_BTKH[:, part].swapaxes(1, 2)
        if width := value_BKSH.shape[2]:
            keys = keys.at[slot_B, :, :, :width].set(key_BKHS, mode="drop")
            values = values.at[slot_B, :, :width].set(value_BKSH, mode="drop")
        out.append((keys, values))
        start = part.stop
    return tuple(out)


def attend(query_BNH: jax.Array, cache: Cache, length_B: jax.Array) -> jax.Array:
    """Attend with one query per row to its first `length` (1 or more) positions; [B, N, H], float32 softmax.

    The N/K = G query heads that share a key head are grouped, so that each key and value is read once
    for all of them.
    """
    batch, heads, size = query_BNH.shape
    if not attention.fused(query_BNH.dtype):
        return _attend_blocks(query_BNH, cache, length_B)
    ((keys, values),) = cache
    kv_heads = keys.shape[2]
    grouped_BGKH = query_BNH.reshape(batch, kv_heads, heads // kv_heads, size).swapaxes(1, 2)
    attended_BGKH = over_heads(_one_kernel)(grouped_BGKH, keys, values, length_B)
    return attended_BGKH.swapaxes(1, 2).reshape(batch, heads, size)


def _one_kernel(
    query_BGKH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Attend with the group of query heads in the place of time: the rows share one key head."""
    return jax.nn.dot_product_attention(
        query_BGKH, keys_BSKH, values_BSKH, implementation="cudnn", key_value_seq_lengths=length_B,
        query_seq_lengths=jnp.full_like(length_B, query_BGKH.shape[1]),
    )  # fmt: skip


def _attend_blocks(query_BNH: jax.Array, cache: Cache, length_B: jax.Array) -> jax.Array:
    """Compute `attend` block by block, with a running maximum and sum of the softmax.

    A block beyond a row's length does not change the row by a single bit, so a row's result does not
    depend on the other rows.
    """
    batch, kv_heads, size, _ = cache[0][0].shape
    query_BKGH = query_BNH.reshape(batch, kv_heads, -1, size)
    heads = query_BKGH.shape[:3]
    state = (
        jnp.full(heads, attention.MASKED, jnp.float32),
        jnp.zeros(heads, jnp.float32),
        jnp.zeros(query_BKGH.shape, jnp.float32),
    )
    longest, start = jnp.max(length_B), 0
    for keys, values in cache:
        valid_BS = start + jnp.arange(values.shape[2])[None] < length_B[:, None]
        state = jax.lax.cond(
            longest > start,
            _add_block,
            lambda state, *_: state,
            *(state, query_BKGH, keys, values, valid_BS),
        )
        start += values.shape[2]
    _, sum_BKG, out_BKGH = state
    return (out_BKGH / sum_BKG[..., None]).astype(query_BNH.dtype).reshape(query_BNH.shape)


def _add_block(
    state: tuple[jax.Array, jax.Array, jax.Array],
    query_BKGH: jax.Array,
    key_BKHS: jax.Array,
    value_BKSH: jax.Array,
    valid_BS: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Update (maximum, sum of weights, weighted values) with one more block of positions."""
    top_BKG, sum_BKG, out_BKGH = state
    score_BKGS = query_BKGH.shape[-1] ** -0.5 * jnp.einsum(
        "BKGH,BKHS->BKGS", query_BKGH, key_BKHS, preferred_element_type=jnp.float32
    )
    score_BKGS = jnp.where(valid_BS[:, None, None], score_BKGS, attention.MASKED)
    new_BKG = jnp.maximum(top_BKG, jnp.max(score_BKGS, axis=-1))
    weight_BKGS = jnp.exp(score_BKGS - new_BKG[..., None])
    kept_BKG = jnp.exp(top_BKG - new_BKG)
    added_BKGH = jnp.einsum(
        "BKGS,BKSH->BKGH",
        weight_BKGS.astype(value_BKSH.dtype),
        value_BKSH,
        preferred_element_type=jnp.float32,
    )
    return (
        new_BKG,
        sum_BKG * kept_BKG + jnp.sum(weight_BKGS, axis=-1),
        out_BKGH * kept_BKG[..., None] + added_BKGH,
    )
