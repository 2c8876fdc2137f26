"""Scores of several teachers joined: rows in their places, means over teachers, what a mixture has not."""

import numpy as np
import pytest

from opd_jax.scoring.teachers import mixed, routed
from opd_jax.types import Scores, Support

pytestmark = pytest.mark.short


def scores(first: float, rows: int = 2, **more) -> Scores:
    """Student's numbers are the same from every teacher; a teacher's begin with `first`."""
    value_BT = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    return Scores(
        student_logprob_BT=-value_BT, student_entropy_BT=value_BT,
        teacher_logprob_BT=value_BT + first, teacher_entropy_BT=value_BT * first,
        reverse_kl_BT=value_BT + first, **more,
    )  # fmt: skip


def support(first: int, rows: int = 2) -> Support:
    ids_BTX = np.full((rows, 3, 4), first, np.int32)
    number_BTX = np.full((rows, 3, 4), float(first), np.float32)
    return Support(ids_BTX, number_BTX, number_BTX, number_BTX[..., 0])


def test_rows_come_from_the_teacher_that_they_name():
    got = routed(
        [
            (np.array([3, 0]), scores(10.0, support=support(7))),
            (np.array([1, 2]), scores(20.0, support=support(9))),
        ],
        batch=4,
    )
    assert got.teacher_logprob_BT[:, 0].tolist() == [13.0, 20.0, 23.0, 10.0]
    assert got.student_logprob_BT[:, 0].tolist() == [-3.0, 0.0, -3.0, 0.0]
    assert got.support.ids_BTX.dtype == np.int32
    assert got.support.ids_BTX[:, 0, 0].tolist() == [7, 9, 9, 7]
    assert got.statistic_BT is None


def test_one_teacher_of_all_rows_is_that_teacher_bit_for_bit():
    only = scores(1.0)
    got = routed([(np.arange(2), only)], batch=2)
    np.testing.assert_array_equal(got.teacher_logprob_BT, only.teacher_logprob_BT)


def test_every_row_has_one_teacher():
    with pytest.raises(AssertionError, match="every row has one teacher"):
        routed([(np.array([0, 1]), scores(1.0)), (np.array([1, 2]), scores(1.0))], batch=4)


def test_a_mixture_is_the_mean_of_what_teachers_give_and_the_student_is_unchanged():
    got = mixed([scores(1.0), scores(5.0)], np.array([0.75, 0.25], np.float32))
    np.testing.assert_allclose(got.teacher_logprob_BT, scores(2.0).teacher_logprob_BT)
    np.testing.assert_allclose(got.reverse_kl_BT, scores(2.0).reverse_kl_BT)
    np.testing.assert_array_equal(got.student_logprob_BT, scores(1.0).student_logprob_BT)
    assert got.overlap_ratio_BT is None


def test_a_mixture_has_no_support():
    one = scores(1.0, support=support(1))
    with pytest.raises(AssertionError, match="a mixture has none"):
        mixed([one, one], np.array([0.5, 0.5], np.float32))
