"""The policy-gradient loss: the clipped surrogate."""

import jax
import jax.numpy as jnp

from opd_jax.shapes import check_shapes

_LARGEST = 40.0  # largest exponent for exp: the squares in a gradient norm overflow at 44


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

    It is computed as -A_t clip(rho_t, low_t, high_t): the bounds are 0 and 1 + high where A_t >= 0, and
    1 - low and c where A_t < 0. The clip applies to logarithms, so a ratio beyond its bound is never
    computed, and an unbounded one continues along its tangent from e^40 on: value, gradient and the
    gradient's norm are finite for the log-probs of any model.
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


def _exp(x: jax.Array) -> jax.Array:
    """e^x, continued beyond `_LARGEST` by its tangent there, so that value and gradient are finite."""
    inside = jnp.minimum(x, _LARGEST)
    return jnp.exp(inside) * (1.0 + (x - inside))
