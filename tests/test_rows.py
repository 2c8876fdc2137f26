"""Which tokens count, and how the teacher's rows are laid out: by hand."""

import numpy as np
import pytest

from opd_jax import rows
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
    got = rows.scored_mask(ROLLOUT, ALL)
    np.testing.assert_array_equal(got, ROLLOUT.response_mask_BT)


def test_ids_with_two_meanings_and_first_occurrences_are_left_out():
    scored_V = ALL.copy()
    scored_V[7] = False
    got = rows.scored_mask(ROLLOUT, scored_V, [(4,), (5, 6)])
    # Row 0: response 4 5 4 7: the first 4, the first of {5, 6}, and 7. Row 1: 5 6 6 5: the first 5.
    np.testing.assert_array_equal(got, np.array([[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1]], bool))


def test_an_id_beyond_the_vocabulary_in_the_prompt_is_no_error():
    got = rows.scored_mask(ROLLOUT, np.ones(8, bool))  # the prompt holds id 9
    np.testing.assert_array_equal(got, ROLLOUT.response_mask_BT)


def test_teacher_rows_by_hand():
    ids = np.arange(10)
    ids[7] = 2  # the student's 7 is the teacher's 2
    got = rows.teacher_rows(ROLLOUT, [[1, 1, 1], [8]], ids, width=8)
    np.testing.assert_array_equal(
        got.tokens_BT, [[1, 1, 1, 4, 5, 4, 2, 0], [8, 5, 6, 6, 5, 0, 0, 0]]
    )
    np.testing.assert_array_equal(got.length_B, [7, 5])
    np.testing.assert_array_equal(got.offset_B, [2, -1])


@pytest.mark.parametrize(("truncated", "counted"), [("keep", [4, 4]), ("mask", [4, 0])])
def test_rollout_rows_take_the_mask_and_leave_out_truncated_ones(truncated, counted):
    values = np.arange(12, dtype=np.float32).reshape(2, 6)
    scores = Scores(*[values] * 2, *[values] * 7)
    scores = scores.replace(teacher_logprob_BT=values + 0.5)
    got = rows.rollout_rows(
        ROLLOUT, scores, ROLLOUT.response_mask_BT, truncated=truncated, aggregation="token"
    )
    np.testing.assert_array_equal((got.weight_BT > 0).sum(1), counted)
    np.testing.assert_allclose(got.weight_BT.sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(got.advantage_BT, 0.5)
    np.testing.assert_array_equal(got.sampler_logprob_BT, values)


def test_shares_of_a_batch_have_weights_of_their_own():
    weight = np.array([[0.1], [0.2], [0.3], [0.4]], np.float32)
    whole = GoldenRows(np.arange(4)[:, None], np.ones(4, np.int32), weight)
    assert rows.share(whole, 0, 1) is whole
    half = rows.share(whole, 1, 2)
    np.testing.assert_array_equal(half.tokens_BT, [[2], [3]])
    np.testing.assert_allclose(half.weight_BT[:, 0], [3 / 7, 4 / 7], rtol=1e-6)
