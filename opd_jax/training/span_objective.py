"""The divergence at spans of text in the update: a span's tokens meet, though tokens are taken in chunks.

The divergence D of a span is a function of both models' distributions at its anchor, one token of the span,
and of the log-probs of its other tokens (losses/span_divergence.py), which may be in another chunk. So a pass
over the tokens of longer spans first takes their log-probs, and one over the anchors of such spans takes
dD/dr, where r is the sum of the log-probs of the other tokens. Then each token has its own part of the
gradient: an anchor that of D with r constant, another token dD/dr grad log p(y_t). They sum to the gradient
of D, which is exact at the weights of the update, whichever weights have sampled. Spans of one token need
neither pass.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import scoring
from opd_jax.losses import span_divergence as losses
from opd_jax.models.end_tokens import Events
from opd_jax.training.terms import Divergence
from opd_jax.types import RolloutRows


@dataclasses.dataclass(frozen=True, eq=False)
class SpanTerm:
    """A divergence by spans: what is compared at a span, and the two vocabularies.

    Attributes:
      compared: a name of losses.SPAN_EVENTS.
      of: direction and its number.
      shared: int32 [2, X], pairs of ids of one text (data.Alignment).
      teacher_events: what the teacher's log-probs are normalised over. Its scored ids are `teacher_ids`.
    """

    compared: str
    of: Divergence
    shared: np.ndarray
    teacher_events: Events
    teacher_ids: int

    def divergence(
        self,
        student_CV: jax.Array,
        teacher_CU: jax.Array,
        rest_C: jax.Array,
        *,
        token_C: jax.Array,
        at: Mapping[str, jax.Array],
    ) -> jax.Array:
        """D of the spans whose anchors are a chunk's tokens; meaningless at others, but finite. [C].

        `rest_C`: sum of the student's log-probs of the other tokens of each span; `at`: see `span_inputs`.
        """
        mine, theirs = (jnp.asarray(ids) for ids in self.shared)
        # Tokens of no span, and the places that fill the last chunk, have size 0: 0 / 0 has no gradient.
        size_C, other_C = (jnp.maximum(at[name], 1.0) for name in ("size", "teacher_size"))
        student = losses.Side(student_CV, token_C, rest_C, size_C, mine)
        teacher = losses.Side(
            jax.lax.stop_gradient(teacher_CU),
            at["teacher_token"],
            at["teacher_rest"],
            other_C,
            theirs,
        )
        if self.compared == "sorted":
            return losses.sorted_divergence(student, teacher)
        kind: dict[str, Any] = {"direction": self.of.direction, "share": self.of.share}
        joint_C = (size_C > 1) | (other_C > 1)
        if self.compared == "candidates":
            return losses.candidate_divergence(student, teacher, joint_C, **kind)
        weight = self.shared.shape[1] / self.teacher_ids
        return losses.matched_divergence(student, teacher, joint_C, weight=weight, **kind)

    def part(
        self,
        student_CV: jax.Array,
        teacher_CU: jax.Array,
        logprob_C: jax.Array,
        *,
        token_C: jax.Array,
        at: Mapping[str, jax.Array],
    ) -> jax.Array:
        """Each token's part of D and of its gradient; the values of other tokens than anchors are 0. [C]."""
        whole_C = self.divergence(student_CV, teacher_CU, at["rest"], token_C=token_C, at=at)
        slope_C = at["slope"] * (logprob_C - jax.lax.stop_gradient(logprob_C))
        return jnp.where(at["anchor"] > 0, whole_C, slope_C)


def span_inputs(
    term: SpanTerm,
    student: scoring.Readout,
    teacher: scoring.Readout,
    rows: RolloutRows,
    *,
    token_chunk: int,
    events: Events,
) -> dict[str, jax.Array]:
    """Return what `SpanTerm.part` reads of each token, float32 or int32 [B, T] by name; no gradient.

    anchor: 1 at anchors of spans that count; size, teacher_size, teacher_token, teacher_rest: as in
    `SpanAnchors`; rest: at anchors, the sum of the log-probs of the other tokens; slope: at these, dD/drest.
    """
    assert rows.spans is not None
    spans = rows.spans
    counts_BT = (rows.weight_BT > 0) & (spans.span_BT >= 0)
    anchor_BT, longer_BT = counts_BT & spans.anchor_BT, counts_BT & (spans.size_BT > 1)
    student, teacher = jax.lax.stop_gradient((student, teacher))
    more: dict[str, Any] = {"token_chunk": token_chunk, "events": events}
    logprob_BT = scoring.map_tokens(
        scoring.take, [student], rows.tokens_BT, counts_BT=longer_BT, **more
    )
    others_BT = longer_BT & ~anchor_BT
    inputs = {
        "size": spans.size_BT,
        "teacher_size": spans.teacher_size_BT,
        "teacher_token": spans.teacher_token_BT,
        "teacher_rest": jnp.where(anchor_BT, spans.teacher_rest_BT, 0.0),
        "rest": losses.span_sums(jnp.where(others_BT, logprob_BT, 0.0), spans.span_BT, longer_BT),
    }

    def slope(
        student_CV: jax.Array, teacher_CU: jax.Array, *, token_C: jax.Array, **at: jax.Array
    ) -> jax.Array:
        whole = partial(term.divergence, student_CV, teacher_CU, token_C=token_C, at=at)
        return jax.grad(lambda rest_C: jnp.sum(whole(rest_C)))(at["rest"])

    slope_BT = scoring.map_tokens(
        slope, [student, teacher], rows.tokens_BT, inputs, counts_BT=anchor_BT & longer_BT, **more
    )
    slope_BT = losses.span_sums(jnp.where(anchor_BT, slope_BT, 0.0), spans.span_BT, longer_BT)
    return inputs | {
        "anchor": anchor_BT.astype(jnp.float32),
        "slope": jnp.where(others_BT, slope_BT, 0.0),
    }
