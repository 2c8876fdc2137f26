"""Shapes of the teacher's advantage: pure functions of the two log-probs of a sampled token.

l_t = log q(y_t) - log p(y_t) is the log-ratio and u_t = q(y_t) / p(y_t) its exponential. A shape replaces
l_t before the clamp and the discount are applied. Every shape returns a constant, and values that are
finite for all finite log-probs. "Second-hand" means that the formula was read in notes or in
re-implementations, not in the paper itself.

Why a shape changes more than the scale: for a convex f with f(1) = 0, the gradient of E_p[f(q / p)] is
-E_p[w_f(u) grad log p] with w_f(u) = u f'(u) - f(u) (OPD+, 2606.01039). The three divergences below have
this weight as their exact advantage. A reward of -f(u) alone, which looks natural, has it for reverse KL
only.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from opd_jax.losses.policy_gradient import _LARGEST
from opd_jax.shapes import check_shapes


def with_baseline(*, log_ratio_BT: jax.Array, reverse_kl_BT: jax.Array) -> jax.Array:
    """l_t + KL(p || q) at the prefix of y_t: the exact mean of -l_t as a baseline. [B, T].

    vOPD, 2605.07865 (second-hand, three sources; checked here). E_p[A_t] = 0 at every prefix, and the
    expected gradient does not change, because the baseline does not depend on y_t: only the variance falls.
    This holds for tokens sampled at the temperature at which they are scored.
    """
    return log_ratio_BT + reverse_kl_BT


def power_difference(
    *, teacher_logprob_BT: jax.Array, student_logprob_BT: jax.Array, power: float
) -> jax.Array:
    """q^a - p^a, a = `power` > 0: bounded by 1, with the sign of l_t. [B, T].

    PowerOPD, 2606.17199 (the properties found in its abstract; the formula second-hand, two codes). For
    small a it tends to a l_t. A note on the paper has (u^a - 1) / a, which is not bounded and not meant.
    """
    return jnp.exp(power * teacher_logprob_BT) - jnp.exp(power * student_logprob_BT)


def soft_log(*, log_ratio_BT: jax.Array) -> jax.Array:
    """sign(l_t) ln(1 + |l_t|): l_t near 0, logarithmic in the tails. [B, T]. (2607.13399; second-hand)"""
    return jnp.sign(log_ratio_BT) * jnp.log1p(jnp.abs(log_ratio_BT))


def floored(*, log_ratio_BT: jax.Array, share: float) -> jax.Array:
    """max(l_t, ln(share / (1 - share))), 0 < share < 1/2. [B, T].

    REOPOLD, 2603.11137, Eq. 7 (second-hand, two sources). Only the negative side is bounded. The paper also
    masks by entropy and trains in stages, whose thresholds are unknown; neither is part of this function.
    """
    return jnp.maximum(log_ratio_BT, jnp.log(share) - jnp.log1p(-share))


def skewed(
    *, teacher_logprob_BT: jax.Array, student_logprob_BT: jax.Array, skew: float
) -> jax.Array:
    """ln(a p + (1 - a) q) - ln p, a = `skew`, 0 < a < 1: at least ln a. [B, T].

    2402.03898 (DistiLLM; found) has the divergence, this is one sample of it: the mean over tokens of p is
    -KL(p || a p + (1 - a) q). Its expected gradient treats the mixture as a constant, so it differs from
    `skewed_reverse_kl`, whose gradient also flows through p in the mixture.
    """
    mixture_BT = jnp.logaddexp(
        student_logprob_BT + jnp.log(skew), teacher_logprob_BT + jnp.log1p(-skew)
    )
    return mixture_BT - student_logprob_BT


def f_reverse(*, log_ratio_BT: jax.Array) -> jax.Array:
    """l_t - 1: w_f of f(u) = -ln u, reverse KL. [B, T]. (OPD+, 2606.01039; second-hand, three sources)

    The - 1 is a constant baseline: the expected gradient is that of l_t.
    """
    return log_ratio_BT - 1.0


def f_forward(*, log_ratio_BT: jax.Array) -> jax.Array:
    """u_t = q / p: w_f of f(u) = u ln u, forward KL. [B, T]. (OPD+, 2606.01039; second-hand, three sources)

    It is never negative and not bounded: a token that the student finds unlikely and the teacher likely has
    all the weight. It is cut at e^40, so that it stays finite, and so does its product with a gradient.
    """
    return jnp.exp(jnp.minimum(log_ratio_BT, _LARGEST))


def f_jsd(*, log_ratio_BT: jax.Array) -> jax.Array:
    """1/2 ln((1 + u_t) / 2): w_f of the Jensen-Shannon divergence (b = 1/2). [B, T].

    OPD+, 2606.01039 (second-hand, three sources). It is at least -1/2 ln 2 and grows like l_t / 2.
    """
    return 0.5 * (jnp.logaddexp(0.0, log_ratio_BT) - jnp.log(2.0))


def f_total_variation(*, log_ratio_BT: jax.Array) -> jax.Array:
    """1/2 sign(l_t): w_f of f(u) = |u - 1| / 2, the total variation distance. [B, T].

    Second-hand (two notes have "sign(l), alpha .5" and disagree on what alpha multiplies). That it is w_f
    of this f, hence the factor 1/2, is inferred: u f'(u) - f(u) = (u s - s (u - 1)) / 2 with s = sign(u - 1).
    """
    return 0.5 * jnp.sign(log_ratio_BT)


def unlikely(*, student_logprob_BT: jax.Array, probability: float) -> jax.Array:
    """-1 where p(y_t) < `probability`, 0 elsewhere: a control that does not read the teacher. [B, T].

    2608.31046 claims that one fixed negative advantage on tokens of low log-prob matches the teacher's
    advantage (second-hand, one note). Its threshold and its number are unknown: the number here is -1, times
    the coefficient of the teacher's advantage.
    """
    return -(student_logprob_BT < jnp.log(probability)).astype(student_logprob_BT.dtype)


# Shapes that are functions of the log-ratio alone: the teacher need not be a normalised distribution.
_OF_RATIO: dict[str, Callable[..., jax.Array]] = {
    "soft_log": soft_log,
    "f_reverse": f_reverse,
    "f_forward": f_forward,
    "f_jsd": f_jsd,
    "f_total_variation": f_total_variation,
}
ADVANTAGE_SHAPES = ("log_ratio", "baseline", "power", "floor", "skew", "unlikely", *_OF_RATIO)


def shaped(
    *,
    teacher_logprob_BT: jax.Array,
    student_logprob_BT: jax.Array,
    shape: str,
    value: float = 0.0,
    reverse_kl_BT: jax.Array | None = None,
) -> jax.Array:
    """Return the teacher's advantage in one of `ADVANTAGE_SHAPES`, a constant. [B, T].

    `value` is the number of the shapes that have one: power's exponent, the floor's share, the skew, the
    probability of `unlikely`. Shape "baseline" needs `reverse_kl_BT`, KL(p || q) at each prefix.
    """
    check_shapes(teacher_logprob_BT=teacher_logprob_BT, student_logprob_BT=student_logprob_BT)
    pair = {"teacher_logprob_BT": teacher_logprob_BT, "student_logprob_BT": student_logprob_BT}
    log_ratio_BT = teacher_logprob_BT - student_logprob_BT
    if shape == "log_ratio":
        out_BT = log_ratio_BT
    elif shape == "baseline":
        assert reverse_kl_BT is not None
        out_BT = with_baseline(log_ratio_BT=log_ratio_BT, reverse_kl_BT=reverse_kl_BT)
    elif shape == "power":
        out_BT = power_difference(**pair, power=value)
    elif shape == "floor":
        out_BT = floored(log_ratio_BT=log_ratio_BT, share=value)
    elif shape == "skew":
        out_BT = skewed(**pair, skew=value)
    elif shape == "unlikely":
        out_BT = unlikely(student_logprob_BT=student_logprob_BT, probability=value)
    else:
        out_BT = _OF_RATIO[shape](log_ratio_BT=log_ratio_BT)
    return jax.lax.stop_gradient(out_BT)
