"""Which tokens count, and how the teacher's rows are laid out: by hand."""

from functools import partial

import numpy as np
import pytest

from opd_jax import losses
from opd_jax.errors import ShapeError
from opd_jax.grading.grader import Grade
from opd_jax.training import batch
from opd_jax.training.terms import default_terms
from opd_jax.types import GoldenRows, Outcome, Rollout, Scores

pytestmark = pytest.mark.short

ROLLOUT = Rollout(
    tokens_BT=np.array([[9, 4, 5, 4, 7, 0], [9, 9, 5, 6, 6, 5]], np.int32),
    length_B=np.array([5, 6], np.int32),
    prompt_length_B=np.array([1, 2], np.int32),
    sampler_logprob_BT=np.zeros((2, 6), np.float32),
    outcome_B=np.array([Outcome.EOS, Outcome.BUDGET], np.int32),
)
ALL = np.ones(10, bool)


def test_every_response_token_counts_where_all_ids_are_shared():
    got = batch.scored_mask(ROLLOUT, ALL)
    np.testing.assert_array_equal(got, ROLLOUT.response_mask_BT)


def test_ids_with_two_meanings_and_first_occurrences_are_left_out():
    scored_V = ALL.copy()
    scored_V[7] = False
    got = batch.scored_mask(ROLLOUT, scored_V, [(4,), (5, 6)])
    # Row 0: response 4 5 4 7: the first 4, the first of {5, 6}, and 7. Row 1: 5 6 6 5: the first 5.
    np.testing.assert_array_equal(got, np.array([[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1]], bool))


def test_an_id_beyond_the_vocabulary_in_the_prompt_is_no_error():
    got = batch.scored_mask(ROLLOUT, np.ones(8, bool))  # the prompt holds id 9
    np.testing.assert_array_equal(got, ROLLOUT.response_mask_BT)


def test_teacher_rows_by_hand():
    ids = np.arange(10)
    ids[7] = 2  # the student's 7 is the teacher's 2
    got = batch.teacher_rows(ROLLOUT, [[1, 1, 1], [8]], ids, width=8)
    np.testing.assert_array_equal(
        got.tokens_BT, [[1, 1, 1, 4, 5, 4, 2, 0], [8, 5, 6, 6, 5, 0, 0, 0]]
    )
    np.testing.assert_array_equal(got.length_B, [7, 5])
    np.testing.assert_array_equal(got.offset_B, [2, -1])


WEIGH = partial(losses.token_weights, aggregation="token")


def test_rollout_rows_weigh_the_tokens_that_count():
    values = np.arange(12, dtype=np.float32).reshape(2, 6)
    scores = Scores(student_logprob_BT=values, student_entropy_BT=values)
    counted_BT = batch.counted(ROLLOUT, ROLLOUT.response_mask_BT, truncated="mask", tail=1)
    got = batch.rollout_rows(
        ROLLOUT, scores, counted_BT, values + 0.5, default_terms(pg_weight=1.0), weigh=WEIGH
    )
    np.testing.assert_array_equal((got.weight_BT > 0).sum(1), [4, 0])  # row 1 ran out of budget
    np.testing.assert_allclose(got.weight_BT.sum(), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(got.advantage_BT, values + 0.5)
    np.testing.assert_array_equal(got.sampler_logprob_BT, values)  # of the scorer
    assert got.support is None


def test_shares_of_a_batch_are_weighed_anew():
    weight = np.array([[0.25], [0.25], [0.25], [0.25]], np.float32)
    whole = GoldenRows(np.arange(4)[:, None], np.ones(4, np.int32), weight)
    assert batch.share(whole, 0, 1, weigh=WEIGH) is whole
    half = batch.share(whole, 1, 2, weigh=WEIGH)
    np.testing.assert_array_equal(half.tokens_BT, [[2], [3]])
    np.testing.assert_allclose(half.weight_BT[:, 0], [0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize(("count", "parts"), [(5, 2), (4, 3), (2, 4)])
def test_rows_that_do_not_divide_are_refused(count, parts):
    """Cut into floor(count / parts) rows each, the last ones would be in no share."""
    whole = GoldenRows(np.zeros((count, 1)), np.ones(count, np.int32), np.ones((count, 1)))
    for index in range(parts):
        with pytest.raises(ShapeError, match=f"{count} rows .* {parts} equal shares.*updates_per"):
            batch.share(whole, index, parts, weigh=WEIGH)


def test_lines_of_rollouts_hold_what_is_known():
    """Without a teacher there is no teacher's log-prob; an id outside what is scored has none."""
    values = np.zeros((2, 6), np.float32)
    values[0, 1] = -1e30
    scores = Scores(student_logprob_BT=values, student_entropy_BT=values)
    (line,) = batch.as_lines(
        3, ROLLOUT, scores, values * 0 + 2.0, count=1, decode=str, ids=["a-7"],
        grades=[Grade.CORRECT, Grade.WRONG],
    )  # fmt: skip
    assert line["step"] == 3
    assert line["response_ids"] == [4, 5, 4, 7]
    assert line["outcome"] == "eos"
    assert line["correct"] is True
    assert line["student_logprob"] == [None, 0.0, 0.0, 0.0]
    assert line["advantage"] == [2.0] * 4
    assert "teacher_logprob" not in line


@pytest.mark.parametrize(("ids", "expected"), [(["a-7"], [("a-7", 0), ("a-7", 1)]),
                                               (["a-7", "b"], [("a-7", 0), ("b", 0)])])  # fmt: skip
def test_lines_of_rollouts_name_the_problem_and_its_sample(ids, expected):
    values = np.zeros((2, 6), np.float32)
    scores = Scores(student_logprob_BT=values, student_entropy_BT=values)
    lines = batch.as_lines(1, ROLLOUT, scores, values, count=2, decode=str, ids=ids)
    assert [(line["id"], line["sample"]) for line in lines] == expected


@pytest.mark.parametrize(
    ("grade", "expected"),
    [
        (Grade.CORRECT, ("correct", True)), (Grade.WRONG, ("wrong", False)),
        (Grade.UNPARSED, ("unparsed", False)), (Grade.TIMEOUT, ("timeout", None)),
        (None, (None, None)),
    ],
)  # fmt: skip
def test_a_rollout_is_right_or_wrong_only_where_a_grade_tells(grade, expected):
    values = np.zeros((2, 6), np.float32)
    scores = Scores(student_logprob_BT=values, student_entropy_BT=values)
    (line,) = batch.as_lines(
        1, ROLLOUT, scores, values, count=1, decode=str, ids=["a"], grades=[grade] * 2
    )
    assert (line["grade"], line["correct"]) == expected
