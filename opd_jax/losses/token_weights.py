"""Reduction of per-token losses to one number: the weight of each token, computed over the global batch."""

import jax
import jax.numpy as jnp
import numpy as np

AGGREGATIONS = ("token", "sequence", "constant")


def token_weights(
    mask_BT: jax.Array | np.ndarray, aggregation: str, *, length: int | None = None
) -> jax.Array:
    """Return each token's weight in the mean over the global batch; float32 [B, T], 0 outside the mask.

    "token":    1 / sum_i |o_i|     every token has the same weight
    "sequence": 1 / (N |o_i|)       every response has the same weight; 2604.08527, Eq. (1)
    "constant": 1 / (B L)           B rows, L = `length`: a long response weighs more; Dr.GRPO, 2503.20783

    N counts responses with at least one token in the mask. The first two sum to 1 (0 if no token counts).
    The weights are computed once over the global batch, so splitting it into micro-batches changes nothing.
    """
    mask_BT = jnp.asarray(mask_BT)
    length_B1 = jnp.sum(mask_BT, axis=1, keepdims=True).astype(jnp.float32)
    if aggregation == "token":
        share = 1.0 / jnp.maximum(jnp.sum(length_B1), 1.0)
    elif aggregation == "sequence":
        responses = jnp.sum(length_B1 > 0).astype(jnp.float32)
        share = 1.0 / (jnp.maximum(length_B1, 1.0) * jnp.maximum(responses, 1.0))
    else:
        assert length is not None
        share = jnp.float32(1.0 / (mask_BT.shape[0] * length))
    return jnp.where(mask_BT, share, 0.0).astype(jnp.float32)
