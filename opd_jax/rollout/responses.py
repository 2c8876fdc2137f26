"""Responses as text: decoded, graded, and flagged where they repeat themselves.

Training, evaluation, cold starts and probes all read what a model wrote through `read_responses`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opd_jax.data.tokenizer import Tokenizer
from opd_jax.grading.grader import Grade, Grader
from opd_jax.metrics.repetition import RepetitionRule, flagged


@dataclasses.dataclass(frozen=True)
class Responses:
    """What a batch of responses says.

    Attributes:
      texts: as graders and the repetition rule see them: without the tokens that a prompt ended with.
      grades: None for a response without a gold answer, and for all where there is no grader.
      flagged_B: which of them repeat themselves; bool [B].
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
    """Decode responses, grade those that have a gold answer, and flag those that repeat themselves.

    Args:
      responses: token ids. golds: the gold answer of each, "" where there is none.
      grader: None grades nothing: in a process that leaves it to another.
      repetition: when a text counts as repetitive.
      fallbacks, rule: see `Grader.grade`.
    """
    texts = [tokenizer.decode(list(ids)) for ids in responses]
    grades: list[Grade | None] = [None] * len(texts)
    if grader is not None:
        pairs = zip(texts, golds, strict=True)
        grades = grader.grade_answered(pairs, fallbacks=fallbacks, rule=rule)
    return Responses(texts, grades, flagged(texts, repetition))
