"""Divergences between student and teacher at each prefix, over the vocabulary or over a support.

Arrays have one more axis than tokens have: V for the vocabulary, X for a support. Entries of -inf are
outside (in both models) and contribute nothing, neither value nor gradient. Over a support the log-probs
are still those of the full vocabulary, so the probabilities sum to less than 1; `form` selects how this
is treated. Gradients flow through p only.
"""

import jax
import jax.numpy as jnp

from opd_jax.shapes import check_shapes

DIRECTIONS = ("reverse", "forward", "jsd", "skewed_reverse", "skewed_forward", "mixture")
FORMS = ("raw", "renormalised", "tail", "stop_gradient", "teacher_renormalised")
_NEVER = -1e30  # a finite log-prob without mass: its product with 0 is 0


def exact_kl(*, p_logprob_BTV: jax.Array, q_logprob_BTV: jax.Array) -> jax.Array:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)) at every prefix. [B, T]; gradient through p only.

    With q the reference this is the per-prefix KL of 2604.08527, Eq. (6); with q the teacher, reverse KL.
    Ids without mass in p (log p = -inf) contribute 0, and 0 to the gradient.
    """
    check_shapes(p_logprob_BTV=p_logprob_BTV, q_logprob_BTV=q_logprob_BTV)
    possible = p_logprob_BTV > -jnp.inf  # masked before the product: -inf * 0 is nan, backwards too
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


def stop_gradient_reverse_kl(*, p_logprob_BTV: jax.Array, q_logprob_BTV: jax.Array) -> jax.Array:
    """sum_v p(v) (sg[log p(v)] - log q(v)): the value of `exact_kl`, with another gradient. [B, T].

    2605.11182, "notail_sg". The gradient is sum_v p (log p - log q) grad log p. That of `exact_kl` has
    log p - log q + 1 there; the + 1 cancels where the p(v) sum to 1. Over a support, where they do not, it
    decreases the probability of every id of the support, whatever the teacher's probabilities are.
    """
    check_shapes(p_logprob_BTV=p_logprob_BTV, q_logprob_BTV=q_logprob_BTV)
    possible = p_logprob_BTV > -jnp.inf
    log_p = jnp.where(possible, p_logprob_BTV, 0.0)
    log_q = jnp.where(possible, q_logprob_BTV, 0.0)
    ratio = jax.lax.stop_gradient(log_p - log_q)
    return jnp.sum(jnp.where(possible, jnp.exp(log_p) * ratio, 0.0), axis=-1)


def generalised_jsd(
    *, p_logprob_BTV: jax.Array, q_logprob_BTV: jax.Array, beta: float
) -> jax.Array:
    """JSD_b = b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p, 0 < b < 1. [B, T].

    The convention of TRL's GKD, as OPSD uses it with b = 1/2; gradient through p, in m as well.
    """
    check_shapes(p_logprob_BTV=p_logprob_BTV, q_logprob_BTV=q_logprob_BTV)
    log_p, log_q = _possible(p_logprob_BTV, q_logprob_BTV)
    log_m = _mixture(log_q, log_p, beta)
    from_q_BTV = jnp.exp(log_q) * (log_q - log_m)
    from_p_BTV = jnp.exp(log_p) * (log_p - log_m)
    return jnp.sum(beta * from_q_BTV + (1.0 - beta) * from_p_BTV, axis=-1)


def skewed_reverse_kl(
    *, p_logprob_BTV: jax.Array, q_logprob_BTV: jax.Array, skew: float
) -> jax.Array:
    """KL(p || (1 - a) q + a p), a = `skew`, 0 < a < 1. [B, T]; gradient through p, in the mixture as well.

    2402.03898 (DistiLLM), skew reverse KL; bounded by -log a where the teacher gives an id no mass.
    """
    check_shapes(p_logprob_BTV=p_logprob_BTV, q_logprob_BTV=q_logprob_BTV)
    log_p, log_q = _possible(p_logprob_BTV, q_logprob_BTV)
    return jnp.sum(jnp.exp(log_p) * (log_p - _mixture(log_p, log_q, skew)), axis=-1)


def skewed_forward_kl(
    *, p_logprob_BTV: jax.Array, q_logprob_BTV: jax.Array, skew: float
) -> jax.Array:
    """KL(q || (1 - a) p + a q), a = `skew`, 0 < a < 1. [B, T]; gradient through p. (2402.03898)"""
    check_shapes(p_logprob_BTV=p_logprob_BTV, q_logprob_BTV=q_logprob_BTV)
    log_p, log_q = _possible(p_logprob_BTV, q_logprob_BTV)
    return jnp.sum(jnp.exp(log_q) * (log_q - _mixture(log_q, log_p, skew)), axis=-1)


def mixed_kl(*, p_logprob_BTV: jax.Array, q_logprob_BTV: jax.Array, share: float) -> jax.Array:
    """share KL(p || q) + (1 - share) KL(q || p), 0 <= share <= 1. [B, T]; gradient through p only.

    2605.16826 (second-hand), on the student's prefixes; the paper's best share is not known. A direction
    whose weight is 0 is not computed, so that the ends are exactly `exact_kl` and `forward_kl`.
    """
    pair = {"p_logprob_BTV": p_logprob_BTV, "q_logprob_BTV": q_logprob_BTV}
    if share == 1:
        return exact_kl(**pair)
    if share == 0:
        return forward_kl(**pair)
    return share * exact_kl(**pair) + (1.0 - share) * forward_kl(**pair)


def renormalised(logprob_BTX: jax.Array) -> jax.Array:
    """log p^(v) = log p(v) - log sum_{u in S} p(u): the distribution restricted to the support. [B, T, X].

    2604.13016, Eq. (5); 2603.25562. Entries of -inf stay -inf, also in a support without any id.
    """
    member = logprob_BTX > -jnp.inf
    some = jnp.any(member, axis=-1, keepdims=True)
    safe = jnp.where(some, logprob_BTX, 0.0)  # the gradient of an empty logsumexp is nan
    mass = jax.nn.logsumexp(safe, axis=-1, keepdims=True)
    return jnp.where(member, jnp.where(member, safe, 0.0) - mass, -jnp.inf)


def with_rest(logprob_BTX: jax.Array, rest_BT: jax.Array) -> jax.Array:
    """Append an entry for the tail: the log of the total mass of all ids outside the support. [B, T, X + 1].

    This is the tail bucket of 2605.11182: the probabilities sum to 1 again.
    """
    return jnp.concatenate([logprob_BTX, rest_BT[..., None]], axis=-1)


def divergence(
    *,
    p_logprob_BTV: jax.Array,
    q_logprob_BTV: jax.Array,
    direction: str,
    form: str,
    p_rest_BT: jax.Array | None = None,
    q_rest_BT: jax.Array | None = None,
    share: float | None = None,
) -> jax.Array:
    """D(student, teacher) over the last axis, by the named direction and form. [B, T].

    form "raw": sums over the support without correction. "renormalised": of `renormalised` distributions.
    "tail": of those `with_rest`, whose log-masses are `p_rest_BT`, `q_rest_BT`. "stop_gradient":
    `stop_gradient_reverse_kl`, for direction "reverse". "teacher_renormalised": q alone is divided by its
    mass on the support, and p stays that of the full vocabulary (EOPD's code, 2603.07079); the forward KL
    is then the renormalised one minus log p(S), which also pulls the student's mass onto the support.
    Over the full vocabulary all five agree.

    `share` is the number of a direction that has one, 0 to 1: `beta` of "jsd", `skew` of the skewed ones,
    and the share of reverse KL in "mixture".
    """
    q_logprob_BTV = jax.lax.stop_gradient(q_logprob_BTV)
    if form == "renormalised":
        p_logprob_BTV, q_logprob_BTV = renormalised(p_logprob_BTV), renormalised(q_logprob_BTV)
    elif form == "teacher_renormalised":
        q_logprob_BTV = renormalised(q_logprob_BTV)
    elif form == "tail":
        assert p_rest_BT is not None
        assert q_rest_BT is not None
        p_logprob_BTV = with_rest(p_logprob_BTV, p_rest_BT)
        q_logprob_BTV = with_rest(q_logprob_BTV, jax.lax.stop_gradient(q_rest_BT))
    pair = {"p_logprob_BTV": p_logprob_BTV, "q_logprob_BTV": q_logprob_BTV}
    if form == "stop_gradient":
        return stop_gradient_reverse_kl(**pair)
    if direction in ("reverse", "forward"):
        return {"reverse": exact_kl, "forward": forward_kl}[direction](**pair)
    assert share is not None, f"direction {direction!r} needs share"
    if direction == "jsd":
        return generalised_jsd(**pair, beta=share)
    if direction == "mixture":
        return mixed_kl(**pair, share=share)
    skewed = {"skewed_reverse": skewed_reverse_kl, "skewed_forward": skewed_forward_kl}
    return skewed[direction](**pair, skew=share)


def _possible(p_logprob: jax.Array, q_logprob: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return log-probs without -inf, the teacher's as constants, because 0 * -inf is nan."""
    return jnp.maximum(p_logprob, _NEVER), jnp.maximum(jax.lax.stop_gradient(q_logprob), _NEVER)


def _mixture(first: jax.Array, second: jax.Array, share: float) -> jax.Array:
    """log(share * first + (1 - share) * second), where both arguments are logs."""
    return jnp.logaddexp(first + jnp.log(share), second + jnp.log1p(-share))
