"""A teacher with another tokenizer: its rows of the rollouts, and both models' log-probs of spans of text.

Each model scores the tokens of its own tokenizer; the log-probs meet on the host (data/spans.py,
losses/spans.py).
"""

import numpy as np

from opd_jax import data
from opd_jax.losses import spans
from opd_jax.types import Rollout, Scores, SpanScores, TextRows


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


def joined(student: Scores, teacher: Scores, rows: TextRows) -> Scores:
    """Return the student's scores with the log-probs of spans.

    `teacher` are the scores of the teacher's rows by the teacher alone: fields "student" of its own.
    """
    count = int(max(rows.span_BT.max(initial=-1), rows.teacher_span_BT.max(initial=-1))) + 1

    def of_tokens(logprob_BT: np.ndarray, span_BT: np.ndarray) -> np.ndarray:
        sums_BX = spans.span_logprob(token_logprob_BT=logprob_BT, span_BT=span_BT, spans=count)
        return spans.at_tokens(values_BX=sums_BX, span_BT=rows.span_BT)

    return student.replace(
        spans=SpanScores(
            span_BT=rows.span_BT,
            bytes_BT=rows.bytes_BT,
            size_BT=of_tokens(np.ones(rows.span_BT.shape), rows.span_BT),
            teacher_size_BT=of_tokens(np.ones(rows.teacher_span_BT.shape), rows.teacher_span_BT),
            student_logprob_BT=of_tokens(student.student_logprob_BT, rows.span_BT),
            teacher_logprob_BT=of_tokens(teacher.student_logprob_BT, rows.teacher_span_BT),
        )
    )
