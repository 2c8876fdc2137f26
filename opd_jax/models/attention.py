"""How queries meet keys: causal attention over rows, and one query against a cache.

Both count lengths from index 0 (right padding), which is what cuDNN's fused kernels want. cuDNN
runs bfloat16/float16 on GPU; everything else takes the plain XLA form.
"""

import jax
import jax.numpy as jnp


def attend_causal(
    query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Causal grouped-query attention over right-padded rows, softmax in float32; [B, T, N, H].

    With a causal mask padding on the right is never seen by a real token, so `length` only lets a
    fused kernel skip it.
    """
    if _fused(query_BTNH):
        return jax.nn.dot_product_attention(
            query_BTNH,
            key_BTKH,
            value_BTKH,
            is_causal=True,
            query_seq_lengths=length_B,
            key_value_seq_lengths=length_B,
            implementation="cudnn",
        )
    return jax.nn.dot_product_attention(
        query_BTNH, key_BTKH, value_BTKH, is_causal=True, implementation="xla"
    )


def attend_cached(
    query_B1NH: jax.Array, key_BSKH: jax.Array, value_BSKH: jax.Array, length_B: jax.Array
) -> jax.Array:
    """One query a row against the first `length` cache entries; [B, 1, N, H].

    The query heads that share a key head are laid out as rows of that head (B, N/K, K, H), so each
    key and value is read once for the whole group.
    """
    batch, _, heads, size = query_B1NH.shape
    kv_heads = key_BSKH.shape[2]
    grouped = query_B1NH.reshape(batch, kv_heads, heads // kv_heads, size).swapaxes(1, 2)
    if _fused(query_B1NH):
        attended = jax.nn.dot_product_attention(
            grouped,
            key_BSKH,
            value_BSKH,
            key_value_seq_lengths=length_B,
            query_seq_lengths=jnp.full_like(length_B, heads // kv_heads),
            implementation="cudnn",
        )
    else:
        score = jnp.einsum("BGKH,BSKH->BKGS", grouped, key_BSKH, preferred_element_type=jnp.float32)
        live = jnp.arange(key_BSKH.shape[1])[None, None, None] < length_B[:, None, None, None]
        score = jnp.where(live, score * size**-0.5, -jnp.inf)
        weight = jax.nn.softmax(score, axis=-1).astype(value_BSKH.dtype)
        attended = jnp.einsum("BKGS,BSKH->BGKH", weight, value_BSKH)
    return attended.swapaxes(1, 2).reshape(batch, 1, heads, size)


def _fused(x: jax.Array) -> bool:
    return jax.default_backend() == "gpu" and x.dtype in (jnp.bfloat16, jnp.float16)
