"""The supervised loss on golden solutions, and the fall of a golden term's weight over a run."""

import math

import jax


def sft_nll(*, logprob_BT: jax.Array) -> jax.Array:
    """-log p(y_t|x, y_<t) of golden tokens. [B, T]. (L_SFT in Eq. 5)."""
    return -logprob_BT


def annealed(step: int, *, weight: float, steps: int) -> float:
    """w (1 + cos(pi min((t - 1) / n, 1))) / 2 at step t = 1, 2, ...; w = `weight`, n = `steps`.

    It is `weight` at step 1, half of it at step n / 2 + 1, and exactly 0 from step n + 1 on; n = 0 keeps it
    constant. TrOPD (2606.01249, second-hand) lets the weight of its divergence on golden solutions fall so.
    """
    if not steps:
        return weight
    return weight * 0.5 * (1.0 + math.cos(math.pi * min((step - 1) / steps, 1.0)))
