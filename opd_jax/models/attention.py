"""Causal attention over right-padded rows. For one query against a cache see kv_cache.py.

Lengths count from index 0 (right padding), as cuDNN's fused kernels require. cuDNN computes
bfloat16/float16 on GPU; every other case takes the plain XLA implementation.
"""

import jax
import jax.numpy as jnp

from opd_jax.sharding.partition import over_heads

# The backend that programs are compiled for, where this process runs on another (memory_plan/programs.py).
# jit retraces where it changes: it is part of the key of JAX's caches.
BACKEND = jax.make_user_context(None)


def attend_causal(
    query_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Return causal grouped-query attention over right-padded rows, softmax in float32; [B, T, N, H].

    Under a causal mask no real token attends to padding on the right, so `length` only lets a fused
    kernel skip it.
    """
    if fused(query_BTNH.dtype):
        return over_heads(_one_kernel)(query_BTNH, key_BTKH, value_BTKH, length_B)
    return jax.nn.dot_product_attention(
        query_BTNH, key_BTKH, value_BTKH, is_causal=True, implementation="xla"
    )


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
