"""Reading responses: decoded, graded where there is a gold answer, flagged by the repetition rule."""

import pytest

from opd_jax.grading import Grade, Grader
from opd_jax.metrics import RepetitionRule
from opd_jax.rollout import read_responses

pytestmark = pytest.mark.short

RULE = RepetitionRule(tail=50, threshold=3.0)
LOOP = "so " * 60


class Letters:
    """A tokenizer whose ids are code points."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def ids(*texts: str) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def test_responses_are_decoded_graded_and_flagged():
    texts = [r"\boxed{3}", r"\boxed{4}", LOOP, "the last number is 3", ""]
    with Grader() as grader:
        got = read_responses(
            ids(*texts), ["3", "3", "3", "3", ""], Letters(), grader=grader, repetition=RULE,
            fallbacks=("last_number",),
        )  # fmt: skip
        plain = read_responses(ids(texts[3]), ["3"], Letters(), grader=grader, repetition=RULE)
    assert got.texts == texts
    assert got.grades == [Grade.CORRECT, Grade.WRONG, Grade.UNPARSED, Grade.CORRECT, None]
    assert got.flagged_B.tolist() == [False, False, True, False, False]
    assert plain.grades == [Grade.UNPARSED]


def test_a_process_that_does_not_grade_reads_and_flags():
    got = read_responses(ids(LOOP), ["3"], Letters(), grader=None, repetition=RULE)
    assert (got.texts, got.grades, got.flagged_B.tolist()) == ([LOOP], [None], [True])
