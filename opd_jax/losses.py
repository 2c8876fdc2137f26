"""The papers' equations, one function each: arrays in, per-token arrays out, reduced by the caller.

Symbols: p = pi_theta the student, q = pi_T the teacher, ref = pi_ref the reference, y_t the token
that was sampled, s_t its prefix. Log-probs are natural and float32. "Constant" = no gradient.
Equation numbers are those of arXiv 2604.08527 (Stable-OPD).
"""

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.shapes import check_shapes

ESTIMATORS = ("full", "k1", "k2", "k3")
AGGREGATIONS = ("token", "sequence")
DIRECTIONS = ("reverse", "forward", "jsd")


def opd_advantage(*, teacher_logprob_BT: jax.Array, student_logprob_BT: jax.Array) -> jax.Array:
    """A_t = log q(y_t|s_t) - log p(y_t|s_t), a constant. [B, T]. (2604.08527, reward and advantage)

    No normalisation, discount or group baseline: its mean over rollouts is -KL(p || q).
    """
    check_shapes(teacher_logprob_BT=teacher_logprob_BT, student_logprob_BT=student_logprob_BT)
    return jax.lax.stop_gradient(teacher_logprob_BT - student_logprob_BT)


def clipped_surrogate(
    *,
    logprob_BT: jax.Array,
    sampler_logprob_BT: jax.Array,
    advantage_BT: jax.Array,
    clip_low: float,
    clip_high: float,
) -> jax.Array:
    """-min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t), rho_t = p(y_t|s_t) / p_old(y_t|s_t). [B, T].

    2604.08527, Eq. (1) with the token-level advantage. With one update per rollout rho = 1 and the
    clip never acts; the gradient is then -A_t grad log p(y_t|s_t), Eq. (3).
    """
    check_shapes(
        logprob_BT=logprob_BT, sampler_logprob_BT=sampler_logprob_BT, advantage_BT=advantage_BT
    )
    advantage_BT = jax.lax.stop_gradient(advantage_BT)
    ratio_BT = jnp.exp(logprob_BT - jax.lax.stop_gradient(sampler_logprob_BT))
    clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
    return -jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)


def sft_nll(*, logprob_BT: jax.Array) -> jax.Array:
    """-log p(y_t|x, y_<t) of golden tokens. [B, T]. (2604.08527, L_SFT in Eq. 5)."""
    return -logprob_BT


def exact_kl(*, p_logprob_BTV: jax.Array, q_logprob_BTV: jax.Array) -> jax.Array:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)) at every prefix. [B, T]; gradient through p only.

    With q the reference: the per-prefix KL of 2604.08527, Eq. (6). With q the teacher: reverse KL.
    Ids that p gives no mass (log p = -inf) contribute 0, and 0 to the gradient.
    """
    check_shapes(p_logprob_BTV=p_logprob_BTV, q_logprob_BTV=q_logprob_BTV)
    possible = p_logprob_BTV > -jnp.inf  # chosen before the product: -inf * 0 is nan, backwards too
    log_p = jnp.where(possible, p_logprob_BTV, 0.0)
    log_q = jnp.where(possible, jax.lax.stop_gradient(q_logprob_BTV), 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1)


def forward_kl(*, p_logprob_BTV: jax.Array, q_logprob_BTV: jax.Array) -> jax.Array:
    """KL(q || p) = sum_v q(v) (log q(v) - log p(v)) at every prefix. [B, T]; gradient through p only.

    Its gradient in the student's logits is p - q: ids that the student hardly ever samples are
    pulled up at once, where reverse KL pulls them in proportion to p.
    """
    check_shapes(p_logprob_BTV=p_logprob_BTV, q_logprob_BTV=q_logprob_BTV)
    q_logprob_BTV = jax.lax.stop_gradient(q_logprob_BTV)
    possible = q_logprob_BTV > -jnp.inf
    log_q = jnp.where(possible, q_logprob_BTV, 0.0)
    log_p = jnp.where(possible, p_logprob_BTV, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(log_q) * (log_q - log_p), 0.0), axis=-1)


def generalised_jsd(
    *, p_logprob_BTV: jax.Array, q_logprob_BTV: jax.Array, beta: float
) -> jax.Array:
    """JSD_b = b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p, 0 < b < 1. [B, T].

    The convention of TRL's GKD, as OPSD uses it with b = 1/2; gradient through p, in m as well.
    """
    check_shapes(p_logprob_BTV=p_logprob_BTV, q_logprob_BTV=q_logprob_BTV)
    log_q = jnp.maximum(jax.lax.stop_gradient(q_logprob_BTV), -1e30)  # 0 * -inf would be nan
    log_p = jnp.maximum(p_logprob_BTV, -1e30)
    log_m = jnp.logaddexp(log_q + jnp.log(beta), log_p + jnp.log1p(-beta))
    from_q_BTV = jnp.exp(log_q) * (log_q - log_m)
    from_p_BTV = jnp.exp(log_p) * (log_p - log_m)
    return jnp.sum(beta * from_q_BTV + (1.0 - beta) * from_p_BTV, axis=-1)


def divergence(
    *, p_logprob_BTV: jax.Array, q_logprob_BTV: jax.Array, direction: str, jsd_beta: float
) -> jax.Array:
    """D(student, teacher) over the full vocabulary by the named direction. [B, T]."""
    if direction == "jsd":
        return generalised_jsd(
            p_logprob_BTV=p_logprob_BTV, q_logprob_BTV=q_logprob_BTV, beta=jsd_beta
        )
    named = {"reverse": exact_kl, "forward": forward_kl}[direction]
    return named(p_logprob_BTV=p_logprob_BTV, q_logprob_BTV=q_logprob_BTV)


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


def kl_k3(*, logprob_BT: jax.Array, reference_logprob_BT: jax.Array) -> jax.Array:
    """exp(-d) - 1 + d, d = log p(y_t) - log ref(y_t): unbiased for KL(p || ref), never negative. [B, T]."""
    d_BT = kl_k1(logprob_BT=logprob_BT, reference_logprob_BT=reference_logprob_BT)
    return jnp.exp(-d_BT) - 1.0 + d_BT


def entropy(*, logprob_BTV: jax.Array) -> jax.Array:
    """H = -sum_v p(v) log p(v), in nats. [B, T]."""
    possible = logprob_BTV > -jnp.inf
    log_p = jnp.where(possible, logprob_BTV, 0.0)
    return -jnp.sum(jnp.where(possible, jnp.exp(log_p) * log_p, 0.0), axis=-1)


def token_weights(mask_BT: jax.Array | np.ndarray, aggregation: str) -> jax.Array:
    """Each token's share in the mean over the global batch; float32 [B, T], sums to 1 (0 if no token).

    "token":    1 / sum_i |o_i|            every token counts the same
    "sequence": 1 / (N |o_i|)              every response counts the same; 2604.08527, Eq. (1)

    Computed once over the whole batch, so splitting it into micro-batches changes nothing.
    """
    mask_BT = jnp.asarray(mask_BT)
    length_B1 = jnp.sum(mask_BT, axis=1, keepdims=True).astype(jnp.float32)
    if aggregation == "token":
        share = 1.0 / jnp.maximum(jnp.sum(length_B1), 1.0)
    else:
        responses = jnp.sum(length_B1 > 0).astype(jnp.float32)
        share = 1.0 / (jnp.maximum(length_B1, 1.0) * jnp.maximum(responses, 1.0))
    return jnp.where(mask_BT, share, 0.0).astype(jnp.float32)
