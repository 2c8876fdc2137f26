"""The terms of a run's loss: which of them, over what, on which rows. Their weights come at the update.

    L = w_pg L_PG  +  w_div D(student, teacher)  +  beta_kl KL(student || reference)    on rollouts
      + lambda_gold L_SFT                                                 on golden solutions

A method is a set of numbers. A term whose weight is 0 is not traced: no forward pass, no memory.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from opd_jax import losses, scoring
from opd_jax.config import default, guard_limits
from opd_jax.models import decoder
from opd_jax.models.config import ModelConfig
from opd_jax.models.end_tokens import EVERY_ID, Events
from opd_jax.scoring import topk
from opd_jax.types import Frozen, GoldenRows, RolloutRows

Parts = dict[str, jax.Array]  # by the name of the term: its mean over the tokens that count
RolloutLoss = Callable[[decoder.Params, Frozen, RolloutRows], Parts]
GoldenLoss = Callable[[decoder.Params, GoldenRows], Parts]
ON_ROLLOUTS = ("opd", "divergence", "reference_kl")
ON_GOLDEN = ("sft",)


@dataclasses.dataclass(frozen=True)
class Terms:
    """The numbers of the loss; fields as in the config section `loss`, whose table has the defaults.

    `raised` names terms that are traced although their weight is 0: something may raise it.
    """

    pg_weight: float
    teacher_coef: float
    group_coef: float
    group_normalise: bool
    advantage: str
    advantage_clamp: float
    discount: float
    support_weight: str
    clip_low: float
    clip_high: float
    dual_clip: float
    importance_cap: float
    divergence_weight: float
    support: str
    top_k: int
    direction: str
    form: str
    jsd_beta: float
    skew: float
    lambda_gold: float
    beta_kl: float
    kl_estimator: str
    kl_clamp: float
    raised: tuple[str, ...] = ()

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term by its name in `loss/NAME`."""
        return {
            "opd": self.pg_weight,
            "divergence": self.divergence_weight,
            "reference_kl": self.beta_kl,
            "sft": self.lambda_gold,
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The terms that are there."""
        return tuple(name for name, w in self.weights.items() if w or name in self.raised)

    @property
    def needs_rollouts(self) -> bool:
        """Whether any term is taken on the student's own rollouts."""
        return any(name in ON_ROLLOUTS for name in self.names)

    @property
    def needs_golden(self) -> bool:
        """Whether golden solutions are needed."""
        return any(name in ON_GOLDEN for name in self.names)

    @property
    def needs_reference(self) -> bool:
        """Whether the reference is needed."""
        return "reference_kl" in self.names

    @property
    def needs_teacher(self) -> bool:
        """Whether any term asks the teacher."""
        return bool(self.pg_weight and self.teacher_coef) or self.divergence_weight != 0

    @property
    def needs_reward(self) -> bool:
        """Whether any term asks which rollouts are right."""
        return bool(self.pg_weight and self.group_coef)

    @property
    def on_support(self) -> bool:
        """Whether the surrogate is taken over the ids of a support."""
        return bool(self.pg_weight and self.teacher_coef) and self.advantage == "support"

    @property
    def scored_support(self) -> tuple[str, int] | None:
        """The support that the scorer is to take down, for `scoring.score`; None where no term has one."""
        if self.support == "full" or not (self.on_support or self.divergence_weight):
            return None
        return self.support, self.top_k

    @property
    def over_vocabulary(self) -> bool:
        """Whether the update takes the teacher's whole distribution: its hidden states and its head."""
        return self.divergence_weight != 0 and self.support == "full"


def warnings(terms: Terms) -> list[str]:
    """What the papers found not to work and these terms ask for all the same, a line each."""
    notes = []
    if terms.divergence_weight and terms.support != "full":
        if terms.form == "raw" and terms.direction == "reverse":
            notes.append(
                "note: the raw reverse KL over a support pushes all of its ids down, which made runs "
                "collapse (2603.25562, 2605.11182); loss.form renormalised, tail and stop_gradient do not"
            )
        if terms.top_k == 1:
            notes.append(
                "note: loss.top_k=1 was the one size that did clearly worse (2604.13016, 6.3)"
            )
    if terms.beta_kl and terms.kl_estimator == "k1":
        notes.append(
            "note: the gradient of loss.kl_estimator=k1 is 0 in expectation: it measures the KL and "
            "does not hold the student back; full, k2 and k3 do"
        )
    return notes


def make_rollout_loss(
    terms: Terms,
    config: ModelConfig,
    reference_config: ModelConfig | None = None,
    *,
    vocabulary: int,
    token_chunk: int,
    remat: str,
    events: Events = EVERY_ID,
) -> RolloutLoss:
    """loss(params, frozen, rows) -> the terms on rollouts, unweighted, each a sum of weighted tokens.

    `frozen` holds the reference where that term is there (`reference_config` is its architecture) and
    the teacher's head where `terms.over_vocabulary`: its hidden states are those of the rows.
    Log-probs are normalised over `events`.
    """
    names = [name for name in terms.names if name in ON_ROLLOUTS]
    beside = ["teacher"] * terms.over_vocabulary + ["reference"] * ("reference_kl" in names)

    def token_terms(
        student_CV: jax.Array,
        *others_CV: jax.Array,
        token_C: jax.Array,
        counts: jax.Array,
        **given: jax.Array,
    ) -> Parts:
        logprob_C = jnp.where(counts, scoring.take(student_CV, token_C), 0.0)
        other = dict(zip(beside, others_CV, strict=True))
        out = {}
        if "opd" in names:
            out["opd"] = _surrogate(terms, student_CV, logprob_C, given)
        if "divergence" in names:
            out["divergence"] = _divergence(terms, student_CV, other.get("teacher"), given)
        if "reference_kl" in names:
            out["reference_kl"] = _reference_kl(
                terms, student_CV, other["reference"], logprob_C, token_C, counts
            )
        return out

    def loss(params: decoder.Params, frozen: Frozen, rows: RolloutRows) -> Parts:
        heads = [decoder.head(params)]
        hiddens = [
            decoder.hidden_states(params, config, rows.tokens_BT, rows.length_B, remat=remat)
        ]
        if "teacher" in beside:
            heads.append(decoder.head(frozen.teacher))
            hiddens.append(rows.teacher_hidden_BTD)
        if "reference" in beside:
            assert reference_config is not None
            heads.append(decoder.head(frozen.reference))
            hiddens.append(
                decoder.hidden_states(
                    frozen.reference, reference_config, rows.tokens_BT, rows.length_B
                )
            )
        parts = scoring.map_tokens(
            token_terms,
            (heads[0], *jax.lax.stop_gradient(heads[1:])),
            (hiddens[0], *jax.lax.stop_gradient(hiddens[1:])),
            rows.tokens_BT,
            _per_token(terms, rows),
            token_chunk=token_chunk,
            vocabulary=vocabulary,
            events=events,
            names=("student", *beside),
        )
        return {name: _weighted_sum(x_BT, rows.weight_BT) for name, x_BT in parts.items()}

    return loss


def make_golden_loss(
    config: ModelConfig, *, vocabulary: int, token_chunk: int, remat: str
) -> GoldenLoss:
    """loss(params, rows) -> L_SFT, unweighted, a sum of weighted tokens.

    Every id is an event of its own here, end tokens too: a golden solution teaches the one it ends with.
    """

    def loss(params: decoder.Params, rows: GoldenRows) -> Parts:
        parts = scoring.map_tokens(
            lambda student_CV, token_C: {
                "sft": losses.sft_nll(logprob_BT=scoring.take(student_CV, token_C))
            },
            (decoder.head(params),),
            (decoder.hidden_states(params, config, rows.tokens_BT, rows.length_B, remat=remat),),
            rows.tokens_BT,
            token_chunk=token_chunk,
            vocabulary=vocabulary,
        )
        return {"sft": _weighted_sum(parts["sft"], rows.weight_BT)}

    return loss


def _per_token(terms: Terms, rows: RolloutRows) -> dict[str, jax.Array]:
    """What the terms read beside the log-probs. Where no token counts it is 0: 0 * inf would be nan."""
    counts_BT = rows.weight_BT > 0
    given = {
        "advantage": jnp.where(counts_BT, rows.advantage_BT, 0.0),
        "sampler_logprob": jnp.where(counts_BT, rows.sampler_logprob_BT, 0.0),
    }
    support = rows.support
    if support is not None:
        given |= {
            "ids": jnp.where(counts_BT[..., None], support.ids_BTX, 0),
            "support_teacher": jnp.where(counts_BT[..., None], support.teacher_BTX, 0.0),
            "support_sampler": jnp.where(counts_BT[..., None], support.student_BTX, 0.0),
            "teacher_rest": jnp.where(counts_BT, support.teacher_rest_BT, 0.0),
        }
    if terms.on_support:
        given["support_advantage"] = jnp.where(
            counts_BT[..., None], rows.support_advantage_BTX, 0.0
        )
    return {"counts": counts_BT} | given


def _surrogate(
    terms: Terms, student_CV: jax.Array, logprob_C: jax.Array, given: dict[str, jax.Array]
) -> jax.Array:
    """L_PG of a chunk of tokens: of the sampled token, of every id of the support, or both. [C]."""
    bounds = {
        "clip_low": terms.clip_low,
        "clip_high": terms.clip_high,
        "dual_clip": terms.dual_clip or float("inf"),
    }
    total_C = jnp.zeros_like(logprob_C)
    if terms.group_coef or not terms.on_support:
        total_C += losses.clipped_surrogate(
            logprob_BT=logprob_C[None],
            sampler_logprob_BT=given["sampler_logprob"][None],
            advantage_BT=given["advantage"][None],
            **bounds,
        )[0]
    if terms.on_support:
        inside = given["ids"] >= 0
        every_CX = losses.clipped_surrogate(
            logprob_BT=jnp.where(inside, topk.gather(student_CV, given["ids"]), 0.0),
            sampler_logprob_BT=jnp.where(inside, given["support_sampler"], 0.0),
            advantage_BT=given["support_advantage"],
            **bounds,
        )
        total_C += jnp.sum(every_CX, axis=-1)
    return total_C


def _divergence(
    terms: Terms,
    student_CV: jax.Array,
    teacher_CV: jax.Array | None,
    given: dict[str, jax.Array],
) -> jax.Array:
    """D(student, teacher) of a chunk of tokens, over the vocabulary or over the scored support. [C]."""
    kind: dict[str, Any] = {
        "direction": terms.direction,
        "jsd_beta": terms.jsd_beta,
        "skew": terms.skew,
    }
    if teacher_CV is not None:
        return losses.divergence(
            p_logprob_BTV=student_CV[None], q_logprob_BTV=teacher_CV[None], form="raw", **kind
        )[0]
    if terms.form == "tail":
        kind |= {
            "p_rest_BT": topk.rest(student_CV, given["ids"])[None],
            "q_rest_BT": given["teacher_rest"][None],
        }
    return losses.divergence(
        p_logprob_BTV=topk.gather(student_CV, given["ids"])[None],
        q_logprob_BTV=given["support_teacher"][None],
        form=terms.form,
        **kind,
    )[0]


def _reference_kl(
    terms: Terms,
    student_CV: jax.Array,
    reference_CV: jax.Array,
    logprob_C: jax.Array,
    token_C: jax.Array,
    counts_C: jax.Array,
) -> jax.Array:
    """KL(student || reference) of a chunk of tokens by `kl_estimator`. [C]; 0 where no token counts."""
    if terms.kl_estimator == "full":
        return losses.exact_kl(p_logprob_BTV=student_CV[None], q_logprob_BTV=reference_CV[None])[0]
    k3 = partial(losses.kl_k3, clamp=terms.kl_clamp or float("inf"))
    estimators: dict[str, Callable[..., jax.Array]]
    estimators = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": k3}
    sampled = estimators[terms.kl_estimator]
    reference_C = jnp.where(counts_C, scoring.take(reference_CV, token_C), 0.0)
    return sampled(logprob_BT=logprob_C, reference_logprob_BT=reference_C)


def _weighted_sum(values_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
    """Sum of weight * value over tokens with weight; others may hold anything, inf included."""
    return jnp.sum(
        jnp.where(weight_BT > 0, weight_BT * jnp.where(weight_BT > 0, values_BT, 0.0), 0.0)
    )


def make_terms(config: ConfigDict) -> Terms:
    """The loss's numbers from the config section `loss`."""
    raised = ["reference_kl"] * guard_limits.may_raise_beta_kl(config)
    raised += ["sft"] * guard_limits.may_raise_lambda_gold(config)
    return Terms(**_numbers(config.loss), raised=tuple(raised))


def default_terms(**changes: Any) -> Terms:
    """The loss whose numbers are the defaults of the config's table, but for `changes`."""
    return Terms(**(_numbers(default().loss) | changes))


def _numbers(section: ConfigDict) -> dict[str, Any]:
    return {
        field.name: section[field.name]
        for field in dataclasses.fields(Terms)
        if field.name in section
    }
