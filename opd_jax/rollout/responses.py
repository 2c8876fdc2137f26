"""Decode responses to text, grade them, and flag repetitive ones.

Training, evaluation, cold starts and probes all read responses through `read_responses`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opd_jax.data.tokenizer import Tokenizer
from opd_jax.grading.grader import Grade, Grader
from opd_jax.metrics.repetition import RepetitionRule, flagged


@dataclasses.dataclass(frozen=True)
class Responses:
    """Texts and grades of a batch of responses.

    Attributes:
      texts: decoded responses, as graders and the repetition rule see them (without the prompt).
      grades: one grade per response; None if it has no gold answer or there is no grader.
      flagged_B: the response is repetitive; bool [B].
    """

    texts: list[str]
    grades: list[Grade | None]
    flagged_B: np.ndarray


def read_responses(
    responses: Sequence[Sequence[int]],
    golds: Sequence[str],
    tokenizer: Tokenizer,
    *,
    grader: Grader | None,
    repetition: RepetitionRule,
    fallbacks: tuple[str, ...] = (),
    rule: str = "plain",
) -> Responses:
    """Decode responses, grade those that have a gold answer, and flag repetitive ones.

    Args:
      responses: token ids. golds: gold answer of each response, "" if there is none.
      grader: None to grade nothing, in a process that leaves grading to another process.
      repetition: rule by which a text counts as repetitive.
      fallbacks, rule: see `Grader.grade`.
    """
    texts = [tokenizer.decode(list(ids)) for ids in responses]
    grades: list[Grade | None] = [None] * len(texts)
    if grader is not None:
        pairs = zip(texts, golds, strict=True)
        grades = grader.grade_answered(pairs, fallbacks=fallbacks, rule=rule)
    return Responses(texts, grades, flagged(texts, repetition))
