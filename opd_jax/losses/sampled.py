"""Terms of sampled tokens: the clipped surrogate, the supervised loss, estimates of KL; entropy."""

import jax
import jax.numpy as jnp

from opd_jax.shapes import check_shapes

ESTIMATORS = ("full", "k1", "k2", "k3")
_LARGEST = 40.0  # exponent up to which exp is taken: the squares of a gradient norm overflow at 44


def clipped_surrogate(
    *,
    logprob_BT: jax.Array,
    sampler_logprob_BT: jax.Array,
    advantage_BT: jax.Array,
    clip_low: float,
    clip_high: float,
    dual_clip: float = float("inf"),
) -> jax.Array:
    """-min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t), rho_t = p(y_t|s_t) / p_old(y_t|s_t). [B, T].

    Eq. (1) with the token-level advantage. With one update per rollout rho = 1 and the clip never
    acts; the gradient is then -A_t grad log p(y_t|s_t), Eq. (3). `dual_clip` = c > 1 bounds the loss
    of a token with A_t < 0 to -c A_t, however large its ratio (1912.09729; verl's default is 3).

    Computed as -A_t clip(rho_t, low_t, high_t): the bounds are 0 and 1 + high where A_t >= 0, and
    1 - low and c where A_t < 0. Logarithms are clipped, so a ratio beyond its bound is never computed,
    and an unbounded one grows by its tangent from e^40 on: value, gradient and the gradient's norm are
    finite for the log-probs of any model.
    """
    check_shapes(
        logprob_BT=logprob_BT, sampler_logprob_BT=sampler_logprob_BT, advantage_BT=advantage_BT
    )
    advantage_BT = jax.lax.stop_gradient(advantage_BT)
    log_ratio_BT = logprob_BT - jax.lax.stop_gradient(sampler_logprob_BT)
    negative_BT = advantage_BT < 0
    low_BT = jnp.where(negative_BT, jnp.log1p(-clip_low), -jnp.inf)
    high_BT = jnp.where(negative_BT, jnp.log(dual_clip), jnp.log1p(clip_high))
    return -advantage_BT * _exp(jnp.clip(log_ratio_BT, low_BT, high_BT))


def sft_nll(*, logprob_BT: jax.Array) -> jax.Array:
    """-log p(y_t|x, y_<t) of golden tokens. [B, T]. (L_SFT in Eq. 5)."""
    return -logprob_BT


def kl_k1(*, logprob_BT: jax.Array, reference_logprob_BT: jax.Array) -> jax.Array:
    """d = log p(y_t) - log ref(y_t): unbiased for KL(p || ref), any sign. [B, T].

    As a loss its gradient is grad log p(y_t), which is 0 in expectation: it measures, it does not pull.
    """
    return logprob_BT - jax.lax.stop_gradient(reference_logprob_BT)


def kl_k2(*, logprob_BT: jax.Array, reference_logprob_BT: jax.Array) -> jax.Array:
    """d^2 / 2 with d = log p(y_t) - log ref(y_t). [B, T].

    Biased as a number; on samples of p its gradient d grad log p equals that of KL(p || ref) in expectation.
    """
    return 0.5 * kl_k1(logprob_BT=logprob_BT, reference_logprob_BT=reference_logprob_BT) ** 2


def kl_k3(
    *, logprob_BT: jax.Array, reference_logprob_BT: jax.Array, clamp: float = float("inf")
) -> jax.Array:
    """exp(-d) - 1 + d, d = log p(y_t) - log ref(y_t): unbiased for KL(p || ref), never negative. [B, T].

    Its gradient (1 - ref / p) grad log p is in expectation over samples of p that of KL(ref || p), the
    forward KL, not that of the value. It is not bounded: a sampled token that the reference finds
    likely and the student does not has ref / p = exp(-d). `clamp` bounds the value, as verl does at 10;
    a token beyond it has no gradient, on either side: with 10 where ref / p is above 13.6, and also
    where p / ref is above e^11, although the gradient is bounded there.
    """
    d_BT = kl_k1(logprob_BT=logprob_BT, reference_logprob_BT=reference_logprob_BT)
    return jnp.minimum(_exp(-d_BT) - 1.0 + d_BT, clamp)


def entropy(*, logprob_BTV: jax.Array) -> jax.Array:
    """H = -sum_v p(v) log p(v), in nats. [B, T]."""
    possible = logprob_BTV > -jnp.inf
    log_p = jnp.where(possible, logprob_BTV, 0.0)
    return -jnp.sum(jnp.where(possible, jnp.exp(log_p) * log_p, 0.0), axis=-1)


def _exp(x: jax.Array) -> jax.Array:
    """e^x; beyond `_LARGEST` its tangent there, so that value and gradient are finite."""
    inside = jnp.minimum(x, _LARGEST)
    return jnp.exp(inside) * (1.0 + (x - inside))
