"""Estimators of KL(student || reference) from sampled tokens, and the entropy."""

import jax
import jax.numpy as jnp

from opd_jax.losses.policy_gradient import _exp

ESTIMATORS = ("full", "k1", "k2", "k3")


def kl_k1(*, logprob_BT: jax.Array, reference_logprob_BT: jax.Array) -> jax.Array:
    """d = log p(y_t) - log ref(y_t): unbiased for KL(p || ref), any sign. [B, T].

    As a loss its gradient is grad log p(y_t), which is 0 in expectation: it measures the KL, but does not
    reduce it.
    """
    return logprob_BT - jax.lax.stop_gradient(reference_logprob_BT)


def kl_k2(*, logprob_BT: jax.Array, reference_logprob_BT: jax.Array) -> jax.Array:
    """d^2 / 2 with d = log p(y_t) - log ref(y_t). [B, T].

    Its value is biased; on samples of p its gradient d grad log p equals that of KL(p || ref) in expectation.
    """
    return 0.5 * kl_k1(logprob_BT=logprob_BT, reference_logprob_BT=reference_logprob_BT) ** 2


def kl_k3(
    *, logprob_BT: jax.Array, reference_logprob_BT: jax.Array, clamp: float = float("inf")
) -> jax.Array:
    """exp(-d) - 1 + d, d = log p(y_t) - log ref(y_t): unbiased for KL(p || ref), never negative. [B, T].

    Its gradient (1 - ref / p) grad log p is, in expectation over samples of p, that of KL(ref || p), the
    forward KL, and not that of its value. It is unbounded: a sampled token that is likely under the
    reference and unlikely under the student has a large ref / p = exp(-d). `clamp` bounds the value, as verl
    does at 10. A token beyond it has no gradient, on either side: with 10 where ref / p is above 13.6, and
    also where p / ref is above e^11, although the gradient is bounded there.
    """
    d_BT = kl_k1(logprob_BT=logprob_BT, reference_logprob_BT=reference_logprob_BT)
    return jnp.minimum(_exp(-d_BT) - 1.0 + d_BT, clamp)


def entropy(*, logprob_BTV: jax.Array) -> jax.Array:
    """H = -sum_v p(v) log p(v), in nats. [B, T]."""
    possible = logprob_BTV > -jnp.inf
    log_p = jnp.where(possible, logprob_BTV, 0.0)
    return -jnp.sum(jnp.where(possible, jnp.exp(log_p) * log_p, 0.0), axis=-1)
