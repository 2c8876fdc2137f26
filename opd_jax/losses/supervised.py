"""The supervised loss on golden solutions."""

import jax


def sft_nll(*, logprob_BT: jax.Array) -> jax.Array:
    """-log p(y_t|x, y_<t) of golden tokens. [B, T]. (L_SFT in Eq. 5)."""
    return -logprob_BT
