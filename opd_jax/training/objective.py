"""The terms of a run's loss. Their weights are arguments of the update.

    L = w_pg L_PG  +  w_div D(student, teacher)  +  beta_kl KL(student || reference)    on rollouts
      + lambda_gold L_SFT  +  golden_divergence D(student, teacher)        on golden solutions

A method is a set of numbers. A term whose weight is 0 is not traced: no forward pass, no memory.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import losses, scoring
from opd_jax.models import decoder
from opd_jax.models.config import ModelConfig
from opd_jax.models.end_tokens import EVERY_ID, Events
from opd_jax.scoring import topk
from opd_jax.training.span_objective import SpanTerm, span_inputs
from opd_jax.training.terms import ON_GOLDEN, ON_ROLLOUTS, Divergence, Terms
from opd_jax.types import Frozen, GoldenRows, RolloutRows, Support

Parts = dict[str, jax.Array]  # by the name of the term: its mean over the tokens that count
Loss = tuple[jax.Array, Parts]  # the weighted sum of the terms, which has a gradient, and the terms
RolloutLoss = Callable[..., Loss]  # (params, frozen, rows, weights, sums=None)
GoldenLoss = Callable[..., Loss]  # likewise


def make_rollout_loss(
    terms: Terms,
    config: ModelConfig,
    reference_config: ModelConfig | None = None,
    *,
    token_chunk: int,
    remat: str,
    events: Events = EVERY_ID,
    span_term: SpanTerm | None = None,
) -> RolloutLoss:
    """Make loss(params, frozen, rows, weights, sums=None) -> loss on rollouts, and its unweighted terms.

    `weights` are those of the terms; a term is a sum over tokens by their weights in the rows.
    `frozen` holds the reference where its term is present (`reference_config` is its architecture), and the
    teacher's output matrix where `terms.over_vocabulary`; the rows then hold the teacher's hidden states.
    Log-probs are normalised over `events`. `span_term`: the divergence is one by spans of text.
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
        if "divergence" in names and span_term is not None:
            out["divergence"] = span_term.part(
                student_CV, other["teacher"], logprob_C, token_C=token_C, at=per_token
            )
        elif "divergence" in names:
            out["divergence"] = _divergence(
                terms.on_rollouts, student_CV, other.get("teacher"), per_token
            )
            if "gate" in per_token:
                out["divergence"] *= per_token["gate"]
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
        per_token = _per_token(terms, rows)
        if "teacher" in others:
            head_VD = decoder.head(frozen.teacher)
            of: dict[str, Any] = {"role": "teacher"}
            if span_term is not None:  # it has ids and end tokens of its own
                of = {"events": span_term.teacher_events}
            readouts.append(scoring.Readout(head_VD, rows.teacher_hidden_BTD, **of))
            if span_term is not None:
                per_token |= span_inputs(
                    span_term, student, readouts[0], rows, token_chunk=token_chunk, events=events
                )
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
            per_token,
            rows.weight_BT,
            weights,
            token_chunk=token_chunk,
            events=events,
        )

    return loss


def make_golden_loss(
    terms: Terms,
    config: ModelConfig,
    *,
    token_chunk: int,
    remat: str,
    events: Events = EVERY_ID,
) -> GoldenLoss:
    """Make loss(params, frozen, rows, weights, sums=None) -> loss on golden solutions, and its terms.

    As `make_rollout_loss`. The divergence is over `events`. In the supervised term every id is an event of
    its own, end tokens too: a golden solution teaches its own end token.
    """
    names = [name for name in terms.names if name in ON_GOLDEN]
    soft, both = "golden_divergence" in names, len(names) == 2

    def token_terms(
        student_CV: jax.Array, *teacher_CV: jax.Array, token_C: jax.Array, **per_token: jax.Array
    ) -> Parts:
        out = {}
        if "sft" in names:
            logprob_C = per_token["id_logprob"] if both else scoring.take(student_CV, token_C)
            out["sft"] = losses.sft_nll(logprob_BT=logprob_C)
        if soft:
            kind, teacher = terms.on_golden, teacher_CV[0] if teacher_CV else None
            out["golden_divergence"] = per_token["factor"] * _divergence(
                kind, student_CV, teacher, per_token
            )
        return out

    def loss(
        params: decoder.Params,
        frozen: Frozen,
        rows: GoldenRows,
        weights: Mapping[str, Any],
        sums: decoder.Params | None = None,
    ) -> Loss:
        head_VD = decoder.head(params)
        hidden_BTD = decoder.hidden_states(
            params, config, rows.tokens_BT, rows.length_B, remat=remat, sums=sums
        )
        readouts = [scoring.Readout(head_VD, hidden_BTD, ids=both)]
        if terms.golden_over_vocabulary:
            head_VD = decoder.head(frozen.teacher)
            readouts.append(scoring.Readout(head_VD, rows.teacher_hidden_BTD, "teacher"))
        return scoring.sum_tokens(
            token_terms,
            readouts,
            rows.tokens_BT,
            _golden_per_token(rows) if soft else {},
            rows.weight_BT,
            weights,
            token_chunk=token_chunk,
            events=events if soft else Events(vocabulary=events.vocabulary),
        )

    return loss


def _golden_per_token(rows: GoldenRows) -> dict[str, jax.Array]:
    """Return the inputs of the divergence: as `_per_token`, and its weights over those of all tokens."""
    counts_BT = rows.divergence_weight_BT > 0
    weight_BT = jnp.where(counts_BT, rows.weight_BT, 1.0)
    factor_BT = jnp.where(counts_BT, rows.divergence_weight_BT / weight_BT, 0.0)
    return {"factor": factor_BT} | _support_inputs(rows.support, counts_BT)


def _support_inputs(support: Support | None, counts_BT: jax.Array) -> dict[str, jax.Array]:
    """Return what a divergence over a support reads; 0 where no token counts, because 0 * inf is nan."""
    if support is None:
        return {}
    return {
        "ids": jnp.where(counts_BT[..., None], support.ids_BTX, 0),
        "support_teacher": jnp.where(counts_BT[..., None], support.teacher_BTX, 0.0),
        "teacher_rest": jnp.where(counts_BT, support.teacher_rest_BT, 0.0),
    }


def _per_token(terms: Terms, rows: RolloutRows) -> dict[str, jax.Array]:
    """Return the inputs of the terms besides log-probs; 0 where no token counts, because 0 * inf is nan."""
    counts_BT = rows.weight_BT > 0
    inputs = {
        "advantage": jnp.where(counts_BT, rows.advantage_BT, 0.0),
        "sampler_logprob": jnp.where(counts_BT, rows.sampler_logprob_BT, 0.0),
    } | _support_inputs(rows.support, counts_BT)
    if rows.support is not None:
        inputs["support_sampler"] = jnp.where(counts_BT[..., None], rows.support.student_BTX, 0.0)
    if rows.divergence_gate_BT is not None:
        inputs["gate"] = jnp.where(counts_BT, rows.divergence_gate_BT, 0.0)
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
    of: Divergence,
    student_CV: jax.Array,
    teacher_CV: jax.Array | None,
    per_token: dict[str, jax.Array],
) -> jax.Array:
    """D(student, teacher) of a chunk of tokens, over the vocabulary or over the scored support. [C]."""
    kind: dict[str, Any] = {"direction": of.direction, "share": of.share}
    if teacher_CV is not None:
        return losses.divergence(
            p_logprob_BTV=student_CV[None], q_logprob_BTV=teacher_CV[None], form="raw", **kind
        )[0]
    if of.form == "tail":
        kind |= {
            "p_rest_BT": topk.rest(student_CV, per_token["ids"])[None],
            "q_rest_BT": per_token["teacher_rest"][None],
        }
    return losses.divergence(
        p_logprob_BTV=topk.gather(student_CV, per_token["ids"])[None],
        q_logprob_BTV=per_token["support_teacher"][None],
        form=of.form,
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
