"""Divergences at spans of text, where student and teacher have different tokenizers (docs/spans.md).

A span is a piece of text at whose two ends both tokenizations have a boundary. Student and teacher have
distributions over the ids of their own vocabularies, V and U of them; "shared" ids are pairs of one text.
A span that is one token to both models has the two distributions at that token, as with one tokenizer.
Gradients flow through the student alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.losses.divergence import divergence

# What a span is compared by; see the functions of these names.
SPAN_EVENTS = ("candidates", "sorted", "matched")
LAST = ("sorted", "matched")  # at the span's last token; the other at its first


class Side(NamedTuple):
    """One model at the spans of a chunk: at the first token of each, or at the last.

    Attributes:
      logprob_CV: log-probs of its own vocabulary at that token's prefix.
      token_C: the token of the span that stands there.
      rest_C: the sum of the log-probs of the span's other tokens.
      size_C: tokens of the span.
      shared_X: the shared ids in this model's numbering.
    """

    logprob_CV: jax.Array
    token_C: jax.Array
    rest_C: jax.Array
    size_C: jax.Array
    shared_X: jax.Array

    @property
    def span_C(self) -> jax.Array:
        """log P(span | its prefix) by the chain rule, exact for these tokens; [C]."""
        own_C1 = jnp.take_along_axis(self.logprob_CV, self.token_C[:, None], axis=-1, mode="clip")
        return own_C1[:, 0] + self.rest_C


def candidates(side: Side, joint_C: jax.Array) -> jax.Array:
    """s(u) = (1/k) sum_j log p(v_j | prefix, v_<j) of each candidate u of k tokens; [C, X + 1].

    SimCT (2605.07711): the candidates at a span's first token are the shared ids, of one token each, and the
    span itself, in the last column: -inf where `joint_C` is false, where the span is one token to both
    models. (Its code, 4dae6fc, has the mean of logits instead.)
    """
    own_C = jnp.where(joint_C, side.span_C / side.size_C, -jnp.inf)
    return jnp.concatenate([side.logprob_CV[:, side.shared_X], own_C[:, None]], axis=-1)


def candidate_divergence(
    student: Side, teacher: Side, joint_C: jax.Array, *, direction: str, share: float | None = None
) -> jax.Array:
    """D of the softmaxes of the candidates' scores (`candidates`); SimCT has direction "reverse". [C]."""
    return divergence(
        p_logprob_BTV=candidates(student, joint_C)[None],
        q_logprob_BTV=candidates(teacher, joint_C)[None],
        direction=direction,
        form="renormalised",
        share=share,
    )[0]


def merged(side: Side) -> jax.Array:
    """log P(v) = log p(v_1) + ... + log p(v_k-1) + log p(v | v_<k): a merged span; [C, V].

    The distribution at the span's last token times the probability of the tokens before it: the log-probs
    of the texts that share these tokens, by the chain rule, so that they sum to P(v_<k) and not to 1.
    (uld_token_merge_strategy="bayesian" of GOLD in TRL 1.16.)
    """
    return side.logprob_CV + side.rest_C[:, None]


def sorted_distance(*, p_CV: jax.Array, q_CU: jax.Array) -> jax.Array:
    """sum_i |p_(i) - q_(i)| of probabilities in falling order, the shorter row padded by 0; [C].

    ULD, as GOLD in TRL 1.16 has it. It needs no pairs of ids: a permutation of either model's ids changes
    nothing. Gradient through p only.
    """
    places = max(p_CV.shape[-1], q_CU.shape[-1])

    def falling(x_CV: jax.Array) -> jax.Array:
        return jnp.pad(-jnp.sort(-x_CV, axis=-1), ((0, 0), (0, places - x_CV.shape[-1])))

    return jnp.sum(jnp.abs(falling(p_CV) - jax.lax.stop_gradient(falling(q_CU))), axis=-1)


def sorted_divergence(student: Side, teacher: Side) -> jax.Array:
    """`sorted_distance` of the two merged spans: ULD. [C]."""
    return sorted_distance(p_CV=jnp.exp(merged(student)), q_CU=jnp.exp(merged(teacher)))


def matched_divergence(
    student: Side,
    teacher: Side,
    joint_C: jax.Array,
    *,
    weight: float,
    direction: str,
    share: float | None = None,
) -> jax.Array:
    """w D(matched) + (1 - w) sorted_distance(others), both of merged spans; w = `weight`. [C].

    GOLD (TRL 1.16, hybrid): matched are the shared ids, summed without renormalising them, D is the
    generalised JSD, and w the share of the teacher's ids that are shared. Of a span of several tokens of
    either model an id of one text stands behind different tokens, and so for another text. There the one
    matched text is the span itself. (TRL matches the ids there too, and compares different texts.)
    """

    def sides(side: Side) -> tuple[jax.Array, jax.Array]:
        """Log-probs of the matched texts [C, X + 1], and probabilities of the others [C, V]."""
        every_CV = merged(side)
        pairs_CX = jnp.where(joint_C[:, None], -jnp.inf, every_CV[:, side.shared_X])
        own_C = jnp.where(joint_C, side.span_C, -jnp.inf)
        ids_1V = jnp.arange(every_CV.shape[-1])[None]
        shared_1V = jnp.zeros(ids_1V.shape, bool).at[0, side.shared_X].set(True)
        is_matched_CV = jnp.where(joint_C[:, None], ids_1V == side.token_C[:, None], shared_1V)
        others_CV = jnp.where(is_matched_CV, 0.0, jnp.exp(every_CV))
        return jnp.concatenate([pairs_CX, own_C[:, None]], axis=-1), others_CV

    p_CX, p_others_CV = sides(student)
    q_CX, q_others_CU = sides(teacher)
    matched_C = divergence(
        p_logprob_BTV=p_CX[None], q_logprob_BTV=q_CX[None], direction=direction, form="raw", share=share
    )[0]  # fmt: skip
    if weight == 1.0:
        return matched_C
    others_C = sorted_distance(p_CV=p_others_CV, q_CU=q_others_CU)
    return weight * matched_C + (1.0 - weight) * others_C


def span_sums(values_BT: jax.Array, span_BT: jax.Array, counts_BT: jax.Array) -> jax.Array:
    """Sum the values of the tokens that count over each span, and give it to these tokens; [B, T], else 0."""
    places = span_BT.shape[1]
    index_BT = jnp.where(counts_BT, span_BT, places)
    row_B1 = jnp.arange(len(span_BT))[:, None]
    sums_BX = jnp.zeros((len(span_BT), places + 1), values_BT.dtype)
    sums_BX = sums_BX.at[row_B1, index_BT].add(jnp.where(counts_BT, values_BT, 0.0))
    return jnp.where(counts_BT, jnp.take_along_axis(sums_BX, index_BT, axis=1), 0.0)
