"""A teacher with another tokenizer: its rows of the rollouts, and both models' log-probs of spans of text.

Each model scores the tokens of its own tokenizer; the log-probs meet on the host (data/spans.py,
losses/spans.py).
"""

import numpy as np

from opd_jax import data, scoring
from opd_jax.losses import spans
from opd_jax.losses.span_divergence import LAST
from opd_jax.types import Rollout, Scores, SpanAnchors, SpanScores, TextRows


def text_rows(
    rollout: Rollout, prompts: list[list[int]], reader: data.Reader, *, width: int, response: int
) -> TextRows:
    """Return the rollouts as the teacher reads them, behind its own prompts (one per row).

    `width` fixes the shape; of a response at most `response` of the teacher's tokens are read.
    """
    readings = reader.read(rollout.responses(), limit=response)
    rows = len(prompts)
    tokens_BT = np.zeros((rows, width), np.int32)
    teacher_span_BT = np.full((rows, width), -1, np.int32)
    span_BT = np.full(rollout.tokens_BT.shape, -1, np.int32)
    bytes_BT = np.zeros(rollout.tokens_BT.shape, np.int32)
    first_B = np.array([len(prompt) for prompt in prompts], np.int32)
    length_B = first_B.copy()
    for row, (prompt, reading) in enumerate(zip(prompts, readings, strict=True)):
        ids = [*prompt, *reading.ids]
        tokens_BT[row, : len(ids)], length_B[row] = ids, len(ids)
        teacher_span_BT[row, len(prompt) : len(ids)] = reading.teacher_span
        own = slice(int(rollout.prompt_length_B[row]), int(rollout.length_B[row]))
        span_BT[row, own], bytes_BT[row, own] = reading.student_span, reading.length
    return TextRows(tokens_BT, length_B, first_B, teacher_span_BT, span_BT, bytes_BT)


def joined(
    student: Scores, teacher: Scores, rows: TextRows, *, compared: str | None = None
) -> Scores:
    """Return the student's scores with the log-probs of spans.

    `teacher` are the scores of the teacher's rows by the teacher alone: fields "student" of its own. With
    `compared` (a name of `losses.SPAN_EVENTS`) the teacher's hidden states are kept, and the anchors.
    """
    count = int(max(rows.span_BT.max(initial=-1), rows.teacher_span_BT.max(initial=-1))) + 1

    def of_tokens(logprob_BT: np.ndarray, span_BT: np.ndarray) -> np.ndarray:
        sums_BX = spans.span_logprob(token_logprob_BT=logprob_BT, span_BT=span_BT, spans=count)
        return spans.at_tokens(values_BX=sums_BX, span_BT=rows.span_BT)

    found = SpanScores(
        span_BT=rows.span_BT,
        bytes_BT=rows.bytes_BT,
        size_BT=of_tokens(np.ones(rows.span_BT.shape), rows.span_BT),
        teacher_size_BT=of_tokens(np.ones(rows.teacher_span_BT.shape), rows.teacher_span_BT),
        student_logprob_BT=of_tokens(student.student_logprob_BT, rows.span_BT),
        teacher_logprob_BT=of_tokens(teacher.student_logprob_BT, rows.teacher_span_BT),
    )
    if compared is None:
        return student.replace(spans=found)
    return _with_anchors(student, teacher, rows, found, last=compared in LAST)


def _with_anchors(
    student: Scores, teacher: Scores, rows: TextRows, found: SpanScores, *, last: bool
) -> Scores:
    """Return the student's scores with `found`, its anchors, and the teacher's hidden states before these."""
    mine_BT, theirs_BT = (
        spans.anchors(span_BT, last=last) for span_BT in (rows.span_BT, rows.teacher_span_BT)
    )
    shape, hidden = rows.span_BT.shape, np.asarray(teacher.teacher_hidden_BTD)
    token_BT, rest_BT = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    # Both lists are in the order of rows and, within each, of spans: every span has one anchor of each model.
    row, place = np.nonzero(mine_BT)
    _, teacher_place = np.nonzero(theirs_BT)
    own = teacher.student_logprob_BT[row, teacher_place]
    token_BT[row, place] = rows.tokens_BT[row, teacher_place]
    rest_BT[row, place] = found.teacher_logprob_BT[row, place] - own
    hidden_BTD = scoring.move(hidden, (row, teacher_place), (row, place), shape)
    anchors = SpanAnchors(
        span_BT=rows.span_BT,
        anchor_BT=mine_BT,
        size_BT=found.size_BT,
        teacher_token_BT=token_BT,
        teacher_rest_BT=rest_BT,
        teacher_size_BT=found.teacher_size_BT,
    )
    return student.replace(spans=found.replace(anchors=anchors), teacher_hidden_BTD=hidden_BTD)
