"""Keys and values of what has been read, laid out as the attention that reads them wants it.

cuDNN takes [B, S, K, H] and stops at each row's length. The plain form takes [B, K, S, H], so that
each head's positions lie together, and walks over blocks of positions up to the longest live row:
its cost follows what is there, not the budget. Only this file knows which of the two a cache is.
"""

import jax
import jax.numpy as jnp

from opd_jax.models import attention
from opd_jax.models.architecture import ModelConfig

Cache = tuple[jax.Array, jax.Array]  # keys, values
BLOCK = 128  # positions of the plain form that are read at one time
_MASKED = -1e30  # finite: the difference of two is no nan


def init(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> tuple[Cache, ...]:
    """Zeroed caches of at least `slots` positions, a pair a layer. Zeros: 0 * nan is nan under a mask."""
    if attention.fused(dtype):
        shape = (batch, slots, config.num_kv_heads, config.head_dim)
    else:
        whole = -(-slots // BLOCK) * BLOCK if slots > BLOCK else slots
        shape = (batch, config.num_kv_heads, whole, config.head_dim)
    return tuple(
        (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers)
    )


def append(cache: Cache, key_BKH: jax.Array, value_BKH: jax.Array, position_B: jax.Array) -> Cache:
    """The cache with one more token a row, at `position`."""
    rows = jnp.arange(position_B.shape[0])

    def put(array: jax.Array, new_BKH: jax.Array) -> jax.Array:
        new_BKH = new_BKH.astype(array.dtype)
        if attention.fused(array.dtype):
            return array.at[rows, position_B].set(new_BKH)
        return array.at[rows, :, position_B].set(new_BKH)

    return put(cache[0], key_BKH), put(cache[1], value_BKH)


def place(cache: Cache, key_BTKH: jax.Array, value_BTKH: jax.Array, slot_B: jax.Array) -> Cache:
    """The cache with whole prompts in its rows `slot`, from position 0; rows it has not are dropped."""
    width = key_BTKH.shape[1]

    def put(array: jax.Array, new_BTKH: jax.Array) -> jax.Array:
        new_BTKH = new_BTKH.astype(array.dtype)
        if attention.fused(array.dtype):
            return array.at[slot_B, :width].set(new_BTKH, mode="drop")
        return array.at[slot_B, :, :width].set(new_BTKH.swapaxes(1, 2), mode="drop")

    return put(cache[0], key_BTKH), put(cache[1], value_BTKH)


def attend(query_BNH: jax.Array, cache: Cache, length_B: jax.Array) -> jax.Array:
    """One query a row against its first `length` (1 or more) positions; [B, N, H], softmax in float32.

    The N/K = G query heads that share a key head stand together, so each key and value is read once
    for all of them.
    """
    keys, values = cache
    batch, heads, size = query_BNH.shape
    if not attention.fused(query_BNH.dtype):
        return _attend_blocks(query_BNH, keys, values, length_B)
    kv_heads = keys.shape[2]
    grouped_BGKH = query_BNH.reshape(batch, kv_heads, heads // kv_heads, size).swapaxes(1, 2)
    attended_BGKH = jax.nn.dot_product_attention(
        grouped_BGKH,  # the group in the place of time: rows of one key head
        keys,
        values,
        query_seq_lengths=jnp.full_like(length_B, heads // kv_heads),
        key_value_seq_lengths=length_B,
        implementation="cudnn",
    )
    return attended_BGKH.swapaxes(1, 2).reshape(batch, heads, size)


def _attend_blocks(
    query_BNH: jax.Array, key_BKSH: jax.Array, value_BKSH: jax.Array, length_B: jax.Array
) -> jax.Array:
    """`attend` over blocks of positions, with a running maximum and sum of the softmax.

    A block beyond a row's length changes nothing of it, to the bit: its neighbours do not matter.
    """
    batch, kv_heads, positions, size = key_BKSH.shape
    query_BKGH = query_BNH.reshape(batch, kv_heads, -1, size)
    block = min(BLOCK, positions)

    def add_block(i: jax.Array, state: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        top_BKG, sum_BKG, out_BKGH = state
        keys, values = (
            jax.lax.dynamic_slice_in_dim(array, i * block, block, axis=2)
            for array in (key_BKSH, value_BKSH)
        )
        score_BKGS = size**-0.5 * jnp.einsum(
            "BKGH,BKSH->BKGS", query_BKGH, keys, preferred_element_type=jnp.float32
        )
        there_BS = i * block + jnp.arange(block)[None] < length_B[:, None]
        score_BKGS = jnp.where(there_BS[:, None, None], score_BKGS, _MASKED)
        new_BKG = jnp.maximum(top_BKG, jnp.max(score_BKGS, axis=-1))
        weight_BKGS = jnp.exp(score_BKGS - new_BKG[..., None])
        kept_BKG = jnp.exp(top_BKG - new_BKG)
        added_BKGH = jnp.einsum(
            "BKGS,BKSH->BKGH",
            weight_BKGS.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return (
            new_BKG,
            sum_BKG * kept_BKG + jnp.sum(weight_BKGS, axis=-1),
            out_BKGH * kept_BKG[..., None] + added_BKGH,
        )

    heads = query_BKGH.shape[:3]
    state = (
        jnp.full(heads, _MASKED, jnp.float32),
        jnp.zeros(heads, jnp.float32),
        jnp.zeros(query_BKGH.shape, jnp.float32),
    )
    blocks = (jnp.max(length_B) + block - 1) // block
    _, sum_BKG, out_BKGH = jax.lax.fori_loop(0, blocks, add_block, state)
    return (out_BKGH / sum_BKG[..., None]).astype(query_BNH.dtype).reshape(query_BNH.shape)
