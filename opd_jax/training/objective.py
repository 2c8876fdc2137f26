"""The terms of a run's loss. Their weights are arguments of the update.

    L = w_pg L_PG  +  w_div D(student, teacher)  +  beta_kl KL(student || reference)    on rollouts
      + lambda_gold L_SFT                                                 on golden solutions

A method is a set of numbers. A term whose weight is 0 is not traced: no forward pass, no memory.
"""

import dataclasses
from collections.abc import Callable, Mapping
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
Loss = tuple[jax.Array, Parts]  # the weighted sum of the terms, which has a gradient, and the terms
RolloutLoss = Callable[..., Loss]  # (params, frozen, rows, weights, sums=None)
GoldenLoss = Callable[
    ..., Loss
]  # (params, rows, weights, sums=None); sums: see decoder.hidden_states
ON_ROLLOUTS = ("opd", "divergence", "reference_kl")
ON_GOLDEN = ("sft",)


@dataclasses.dataclass(frozen=True)
class Terms:
    """The numbers of the loss; fields as in the config section `loss`, whose table has the defaults.

    `traced_at_zero`: terms compiled in although their weight is 0, because the guard may raise it.
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
    traced_at_zero: tuple[str, ...] = ()

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
        """The terms that are compiled in."""
        return tuple(name for name, w in self.weights.items() if w or name in self.traced_at_zero)

    @property
    def needs_rollouts(self) -> bool:
        """Whether any term is computed on the student's own rollouts."""
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
        """Whether any term needs the teacher."""
        return bool(self.pg_weight and self.teacher_coef) or self.divergence_weight != 0

    @property
    def needs_reward(self) -> bool:
        """Whether any term needs to know which rollouts are correct."""
        return bool(self.pg_weight and self.group_coef)

    @property
    def on_support(self) -> bool:
        """Whether the surrogate sums over the ids of a support."""
        return bool(self.pg_weight and self.teacher_coef) and self.advantage == "support"

    @property
    def scored_support(self) -> tuple[str, int] | None:
        """The support that the scorer must record, for `scoring.score`; None where no term has one."""
        if self.support == "full" or not (self.on_support or self.divergence_weight):
            return None
        return self.support, self.top_k

    @property
    def over_vocabulary(self) -> bool:
        """Whether the update needs the teacher's full distribution (hidden states and output matrix)."""
        return self.divergence_weight != 0 and self.support == "full"


def warnings(terms: Terms) -> list[str]:
    """Return a line for each choice in `terms` that the papers found not to work."""
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
    """Make loss(params, frozen, rows, weights, sums=None) -> loss on rollouts, and its unweighted terms.

    `weights` are those of the terms; a term is a sum over tokens by their weights in the rows.
    `frozen` holds the reference where its term is present (`reference_config` is its architecture), and the
    teacher's output matrix where `terms.over_vocabulary`; the rows then hold the teacher's hidden states.
    Log-probs are normalised over `events`.
    """
    names = [name for name in terms.names if name in ON_ROLLOUTS]
    others = ["teacher"] * terms.over_vocabulary + ["reference"] * ("reference_kl" in names)

    def token_terms(
        student_CV: jax.Array,
        *others_CV: jax.Array,
        token_C: jax.Array,
        counts: jax.Array,
        **per_token: jax.Array,
    ) -> Parts:
        logprob_C = jnp.where(counts, scoring.take(student_CV, token_C), 0.0)
        other = dict(zip(others, others_CV, strict=True))
        out = {}
        if "opd" in names:
            out["opd"] = _surrogate(terms, student_CV, logprob_C, per_token)
        if "divergence" in names:
            out["divergence"] = _divergence(terms, student_CV, other.get("teacher"), per_token)
        if "reference_kl" in names:
            out["reference_kl"] = _reference_kl(
                terms, student_CV, other["reference"], logprob_C, token_C, counts
            )
        return out

    def loss(
        params: decoder.Params,
        frozen: Frozen,
        rows: RolloutRows,
        weights: Mapping[str, Any],
        sums: decoder.Params | None = None,
    ) -> Loss:
        head_VD = decoder.head(params)
        hidden_BTD = decoder.hidden_states(
            params, config, rows.tokens_BT, rows.length_B, remat=remat, sums=sums
        )
        student, readouts = scoring.Readout(head_VD, hidden_BTD), []
        if "teacher" in others:
            head_VD = decoder.head(frozen.teacher)
            readouts.append(scoring.Readout(head_VD, rows.teacher_hidden_BTD, "teacher"))
        if "reference" in others:
            assert reference_config is not None
            head_VD = decoder.head(frozen.reference)
            hidden_BTD = decoder.hidden_states(
                frozen.reference, reference_config, rows.tokens_BT, rows.length_B
            )
            readouts.append(scoring.Readout(head_VD, hidden_BTD, "reference"))
        return scoring.sum_tokens(
            token_terms,
            [student, *readouts],
            rows.tokens_BT,
            _per_token(terms, rows),
            rows.weight_BT,
            weights,
            token_chunk=token_chunk,
            vocabulary=vocabulary,
            events=events,
        )

    return loss


def make_golden_loss(
    config: ModelConfig, *, vocabulary: int, token_chunk: int, remat: str
) -> GoldenLoss:
    """Make loss(params, rows, weights, sums=None) -> (weighted L_SFT, {"sft": L_SFT}).

    Every id is an event of its own here, end tokens too: a golden solution teaches its own end token.
    """

    def loss(
        params: decoder.Params,
        rows: GoldenRows,
        weights: Mapping[str, Any],
        sums: decoder.Params | None = None,
    ) -> Loss:
        head_VD = decoder.head(params)
        hidden_BTD = decoder.hidden_states(
            params, config, rows.tokens_BT, rows.length_B, remat=remat, sums=sums
        )
        return scoring.sum_tokens(
            lambda student_CV, token_C: {
                "sft": losses.sft_nll(logprob_BT=scoring.take(student_CV, token_C))
            },
            [scoring.Readout(head_VD, hidden_BTD)],
            rows.tokens_BT,
            {},
            rows.weight_BT,
            weights,
            token_chunk=token_chunk,
            vocabulary=vocabulary,
        )

    return loss


def _per_token(terms: Terms, rows: RolloutRows) -> dict[str, jax.Array]:
    """Return the inputs of the terms besides log-probs; 0 where no token counts, because 0 * inf is nan."""
    counts_BT = rows.weight_BT > 0
    inputs = {
        "advantage": jnp.where(counts_BT, rows.advantage_BT, 0.0),
        "sampler_logprob": jnp.where(counts_BT, rows.sampler_logprob_BT, 0.0),
    }
    support = rows.support
    if support is not None:
        inputs |= {
            "ids": jnp.where(counts_BT[..., None], support.ids_BTX, 0),
            "support_teacher": jnp.where(counts_BT[..., None], support.teacher_BTX, 0.0),
            "support_sampler": jnp.where(counts_BT[..., None], support.student_BTX, 0.0),
            "teacher_rest": jnp.where(counts_BT, support.teacher_rest_BT, 0.0),
        }
    if terms.on_support:
        inputs["support_advantage"] = jnp.where(
            counts_BT[..., None], rows.support_advantage_BTX, 0.0
        )
    return {"counts": counts_BT} | inputs


def _surrogate(
    terms: Terms, student_CV: jax.Array, logprob_C: jax.Array, per_token: dict[str, jax.Array]
) -> jax.Array:
    """L_PG of a chunk of tokens: on the sampled token, on every id of the support, or on both. [C]."""
    bounds = {
        "clip_low": terms.clip_low,
        "clip_high": terms.clip_high,
        "dual_clip": terms.dual_clip or float("inf"),
    }
    total_C = jnp.zeros_like(logprob_C)
    if terms.group_coef or not terms.on_support:
        total_C += losses.clipped_surrogate(
            logprob_BT=logprob_C[None],
            sampler_logprob_BT=per_token["sampler_logprob"][None],
            advantage_BT=per_token["advantage"][None],
            **bounds,
        )[0]
    if terms.on_support:
        inside = per_token["ids"] >= 0
        every_CX = losses.clipped_surrogate(
            logprob_BT=jnp.where(inside, topk.gather(student_CV, per_token["ids"]), 0.0),
            sampler_logprob_BT=jnp.where(inside, per_token["support_sampler"], 0.0),
            advantage_BT=per_token["support_advantage"],
            **bounds,
        )
        total_C += jnp.sum(every_CX, axis=-1)
    return total_C


def _divergence(
    terms: Terms,
    student_CV: jax.Array,
    teacher_CV: jax.Array | None,
    per_token: dict[str, jax.Array],
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
            "p_rest_BT": topk.rest(student_CV, per_token["ids"])[None],
            "q_rest_BT": per_token["teacher_rest"][None],
        }
    return losses.divergence(
        p_logprob_BTV=topk.gather(student_CV, per_token["ids"])[None],
        q_logprob_BTV=per_token["support_teacher"][None],
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


def make_terms(config: ConfigDict) -> Terms:
    """Return the loss's numbers from the config section `loss`."""
    traced_at_zero = ["reference_kl"] * guard_limits.may_raise_beta_kl(config)
    traced_at_zero += ["sft"] * guard_limits.may_raise_lambda_gold(config)
    return Terms(**_numbers(config.loss), traced_at_zero=tuple(traced_at_zero))


def default_terms(**changes: Any) -> Terms:
    """Return the loss with the defaults of the config's table, except for `changes`."""
    return Terms(**(_numbers(default().loss) | changes))


def _numbers(section: ConfigDict) -> dict[str, Any]:
    return {
        field.name: section[field.name]
        for field in dataclasses.fields(Terms)
        if field.name in section
    }
