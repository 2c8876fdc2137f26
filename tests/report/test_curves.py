"""Curves: thinned, smoothed, standardised, between positions; numbers worked out by hand."""

import numpy as np
import pytest

from opd_jax.report.curves import Curve, between, ends, smooth, standardised, thinned

pytestmark = pytest.mark.short
NAN = np.nan


def curve(*values: float, first: int = 1) -> Curve:
    return Curve(np.arange(first, first + len(values)), np.array(values, float))


def test_a_short_curve_is_drawn_as_it_is():
    drawn = thinned(curve(1.0, NAN, 3.0), points=3)
    assert drawn.per == 1
    np.testing.assert_array_equal(drawn.value_N, [1.0, NAN, 3.0])


def test_a_long_curve_becomes_means_with_their_range():
    drawn = thinned(curve(1.0, 2.0, 6.0, 4.0, NAN), points=2)  # 3 points each, the last has 2
    assert drawn.per == 3
    np.testing.assert_allclose(drawn.step_N, [2.0, 4.5])
    np.testing.assert_allclose(drawn.value_N, [3.0, 4.0])
    np.testing.assert_allclose(drawn.low_N, [1.0, 4.0])
    np.testing.assert_allclose(drawn.high_N, [6.0, 4.0])


def test_a_part_without_a_figure_is_a_gap():
    drawn = thinned(curve(NAN, NAN, 2.0, 4.0), points=2)
    np.testing.assert_array_equal(drawn.value_N, [NAN, 3.0])
    np.testing.assert_array_equal(drawn.high_N, [NAN, 4.0])


@pytest.mark.parametrize("size", [401, 799, 800, 801, 100_000])
def test_no_more_points_than_asked_for(size):
    drawn = thinned(Curve(np.arange(size), np.ones(size)))
    assert len(drawn.value_N) == len(drawn.step_N) <= 400
    assert drawn.step_N[0] >= 0
    assert drawn.step_N[-1] <= size - 1


def test_smoothing_takes_what_is_there():
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0, 6.0]), 3), [1.5, 3.0, 4.0])
    np.testing.assert_array_equal(smooth(np.array([1.0, NAN, 6.0]), 3), [1.0, NAN, 6.0])


def test_standardised():
    found = standardised(curve(1.0, NAN, 3.0))  # mean 2, standard deviation 1
    np.testing.assert_array_equal(found.step_N, [1, 3])
    np.testing.assert_allclose(found.value_N, [-1.0, 1.0])
    np.testing.assert_array_equal(standardised(curve(5.0, 5.0)).value_N, [0.0, 0.0])
    assert len(standardised(curve(NAN)).value_N) == 0


def test_start_and_now():
    assert ends(curve(*range(1, 21))) == (3.0, 15.5)  # means of 1..5 and of 11..20
    assert ends(curve(NAN, 2.0, 4.0)) == (3.0, 3.0)


def test_the_mean_between_two_positions():
    curves = {
        "rollout/first_2/tokens": curve(4.0, 4.0),
        "score/first_2/overlap_ratio": curve(1.0, 0.5),
        "rollout/first_8/tokens": curve(8.0, 4.0),  # at step 2 nobody wrote beyond the second token
        "score/first_8/overlap_ratio": curve(0.75, 0.5),
        "rollout/tokens": curve(10.0, 4.0),
        "score/overlap_ratio": curve(0.7, 0.5),
    }
    found = between(curves, "overlap_ratio")
    assert list(found) == ["tokens 1-2", "tokens 3-8", "from 9 on"]
    np.testing.assert_allclose(found["tokens 1-2"].value_N, [1.0, 0.5])
    np.testing.assert_allclose(found["tokens 3-8"].value_N, [0.5])  # (8 x 0.75 - 4 x 1) / 4
    np.testing.assert_allclose(found["from 9 on"].value_N, [0.5])  # (10 x 0.7 - 8 x 0.75) / 2
    assert between({}, "overlap_ratio") == {}
