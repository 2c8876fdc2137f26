"""The loss of a run: which terms, with which weights, on which rows.

    L = w_pg L_PG  +  w_div D(student, teacher)  +  beta_kl KL(student || reference)    on rollouts
      + lambda_gold L_SFT                                                 on golden solutions

A method is a set of numbers. A term whose weight is 0 is not traced: no forward pass, no memory.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from opd_jax import losses, scoring
from opd_jax.models import decoder
from opd_jax.models.architecture import ModelConfig
from opd_jax.types import Array, Frozen, GoldenRows, RolloutRows

RolloutLoss = Callable[
    [decoder.Params, Frozen, RolloutRows], tuple[jax.Array, dict[str, jax.Array]]
]
GoldenLoss = Callable[[decoder.Params, GoldenRows], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Terms:
    """The numbers of the loss; fields as in the config section `loss`."""

    pg_weight: float
    divergence_weight: float
    direction: str
    jsd_beta: float
    lambda_gold: float
    beta_kl: float
    kl_estimator: str
    clip_low: float
    clip_high: float

    @property
    def needs_rollouts(self) -> bool:
        """Whether any term is taken on the student's own rollouts."""
        return self.needs_teacher or self.beta_kl != 0

    @property
    def needs_teacher(self) -> bool:
        """Whether any term asks the teacher."""
        return self.pg_weight != 0 or self.divergence_weight != 0


def make_rollout_loss(
    terms: Terms,
    config: ModelConfig,
    frozen_configs: Frozen,
    *,
    vocabulary: int,
    token_chunk: int,
    remat: bool,
    scored_V: Array | None = None,
) -> RolloutLoss:
    """loss(params, frozen, rows) -> (w_pg L_PG + w_div D + beta_kl KL, its parts), sums of weighted tokens.

    `frozen` holds the reference where beta_kl is not 0 and the teacher where divergence_weight is
    not; `frozen_configs` their architectures. Log-probs are normalised over `scored_V`.
    """
    beside = [
        name
        for name, weight in (("teacher", terms.divergence_weight), ("reference", terms.beta_kl))
        if weight
    ]

    def token_terms(
        student_CV: jax.Array,
        *others_CV: jax.Array,
        token_C: jax.Array,
        counts: jax.Array,
        advantage: jax.Array,
        sampler_logprob: jax.Array,
    ) -> dict[str, jax.Array]:
        logprob_C = jnp.where(counts, scoring.take(student_CV, token_C), 0.0)
        out = {}
        if terms.pg_weight:
            out["opd"] = losses.clipped_surrogate(
                logprob_BT=logprob_C[None],
                sampler_logprob_BT=sampler_logprob[None],
                advantage_BT=advantage[None],
                clip_low=terms.clip_low,
                clip_high=terms.clip_high,
            )[0]
        other = dict(zip(beside, others_CV, strict=True))
        if "teacher" in other:
            out["divergence"] = losses.divergence(
                p_logprob_BTV=student_CV[None],
                q_logprob_BTV=other["teacher"][None],
                direction=terms.direction,
                jsd_beta=terms.jsd_beta,
            )[0]
        if "reference" in other:
            out["reference_kl"] = _reference_kl(
                terms.kl_estimator, student_CV, other["reference"], logprob_C, token_C, counts
            )
        return out

    def loss(
        params: decoder.Params, frozen: Frozen, rows: RolloutRows
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        heads = [decoder.head(params)[:vocabulary]]
        hiddens = [
            decoder.hidden_states(params, config, rows.tokens_BT, rows.length_B, remat=remat)
        ]
        for name in beside:
            weights = getattr(frozen, name)
            hidden = scoring.teacher_states(
                weights, getattr(frozen_configs, name), rows.tokens_BT, rows.length_B,
                rows.teacher if name == "teacher" else None,
            )  # fmt: skip
            heads.append(jax.lax.stop_gradient(decoder.head(weights)[:vocabulary]))
            hiddens.append(jax.lax.stop_gradient(hidden))
        counts_BT = rows.weight_BT > 0  # inf elsewhere would be 0 * inf = nan in the gradient
        parts = scoring.map_tokens(
            token_terms,
            tuple(heads),
            tuple(hiddens),
            rows.tokens_BT,
            {
                "counts": counts_BT,
                "advantage": jnp.where(counts_BT, rows.advantage_BT, 0.0),
                "sampler_logprob": jnp.where(counts_BT, rows.sampler_logprob_BT, 0.0),
            },
            token_chunk=token_chunk,
            scored_V=scored_V,
        )
        sums = {name: _weighted_sum(x_BT, rows.weight_BT) for name, x_BT in parts.items()}
        weight_of = {
            "opd": terms.pg_weight,
            "divergence": terms.divergence_weight,
            "reference_kl": terms.beta_kl,
        }
        return sum((weight_of[name] * x for name, x in sums.items()), jnp.zeros(())), sums

    return loss


def make_golden_loss(
    terms: Terms, config: ModelConfig, *, vocabulary: int, token_chunk: int, remat: bool
) -> GoldenLoss:
    """loss(params, rows) -> (lambda_gold L_SFT, its parts), sums of weighted tokens."""

    def loss(params: decoder.Params, rows: GoldenRows) -> tuple[jax.Array, dict[str, jax.Array]]:
        parts = scoring.map_tokens(
            lambda student_CV, token_C: {
                "sft": losses.sft_nll(logprob_BT=scoring.take(student_CV, token_C))
            },
            (decoder.head(params)[:vocabulary],),
            (decoder.hidden_states(params, config, rows.tokens_BT, rows.length_B, remat=remat),),
            rows.tokens_BT,
            token_chunk=token_chunk,
        )
        sft = _weighted_sum(parts["sft"], rows.weight_BT)
        return terms.lambda_gold * sft, {"sft": sft}

    return loss


def _reference_kl(
    estimator: str,
    student_CV: jax.Array,
    reference_CV: jax.Array,
    logprob_C: jax.Array,
    token_C: jax.Array,
    counts_C: jax.Array,
) -> jax.Array:
    """KL(student || reference) of a chunk of tokens by the named estimator. [C]; 0 where none counts."""
    if estimator == "full":
        return losses.exact_kl(p_logprob_BTV=student_CV[None], q_logprob_BTV=reference_CV[None])[0]
    sampled = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}[estimator]
    reference_C = jnp.where(counts_C, scoring.take(reference_CV, token_C), 0.0)
    return sampled(logprob_BT=logprob_C, reference_logprob_BT=reference_C)


def _weighted_sum(values_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
    """Sum of weight * value over tokens with weight; others may hold anything, inf included."""
    return jnp.sum(
        jnp.where(weight_BT > 0, weight_BT * jnp.where(weight_BT > 0, values_BT, 0.0), 0.0)
    )
