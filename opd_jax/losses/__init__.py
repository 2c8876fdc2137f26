"""The papers' equations, one function each: arrays in, per-token arrays out; the caller reduces them.

Symbols: p = pi_theta the student, q = pi_T the teacher, ref = pi_ref the reference, y_t the sampled
token, s_t its prefix, S_t a support (a set of ids at a prefix). Log-probs are natural and float32; ids
outside a support have log-prob -inf. "Constant" means no gradient. Eq. (n) without a paper refers to
arXiv 2604.08527 (Stable-OPD).
"""

from opd_jax.losses.advantage import (
    SUPPORT_WEIGHTS,
    discounted,
    evidence_weight,
    extrapolated,
    group_advantage,
    opd_advantage,
    share_at,
    support_advantage,
    truncated_importance,
)
from opd_jax.losses.advantage_shape import ADVANTAGE_SHAPES, shaped
from opd_jax.losses.divergence import (
    DIRECTIONS,
    FORMS,
    divergence,
    exact_kl,
    forward_kl,
    generalised_jsd,
    mixed_kl,
    renormalised,
    skewed_forward_kl,
    skewed_reverse_kl,
    stop_gradient_reverse_kl,
    with_rest,
)
from opd_jax.losses.gates import GATES, ROLLOUT_GATES
from opd_jax.losses.kl import ESTIMATORS, entropy, kl_k1, kl_k2, kl_k3
from opd_jax.losses.outcome import OUTCOMES
from opd_jax.losses.policy_gradient import clipped_surrogate
from opd_jax.losses.supervised import annealed, sft_nll
from opd_jax.losses.token_factors import TOKEN_WEIGHTS, WEIGHTED
from opd_jax.losses.token_weights import AGGREGATIONS, token_weights

__all__ = [
    "ADVANTAGE_SHAPES",
    "AGGREGATIONS",
    "DIRECTIONS",
    "ESTIMATORS",
    "FORMS",
    "GATES",
    "OUTCOMES",
    "ROLLOUT_GATES",
    "SUPPORT_WEIGHTS",
    "TOKEN_WEIGHTS",
    "WEIGHTED",
    "annealed",
    "clipped_surrogate",
    "discounted",
    "divergence",
    "entropy",
    "evidence_weight",
    "exact_kl",
    "extrapolated",
    "forward_kl",
    "generalised_jsd",
    "group_advantage",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "mixed_kl",
    "opd_advantage",
    "renormalised",
    "sft_nll",
    "shaped",
    "share_at",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "stop_gradient_reverse_kl",
    "support_advantage",
    "token_weights",
    "truncated_importance",
    "with_rest",
]
