"""The outcome of rollouts in the teacher's advantage: the papers' numbers, groups, unknown grades."""

import numpy as np
import pytest

from opd_jax.losses import outcome

pytestmark = pytest.mark.short
YES, NO = True, False


def shifts(mean, correct, known=None, group: int = 2, margin: float = 0.4) -> np.ndarray:
    correct = np.array(correct)
    got = outcome.margin_shift(
        mean_B=np.array(mean), correct_B=correct,
        known_B=np.ones(len(correct), bool) if known is None else np.array(known),
        group=group, margin=margin,
    )  # fmt: skip
    assert got.dtype == np.float32
    return got


def weights(perplexity, correct, known=None, group: int = 3, temperature: float = 1.0):
    """Both models have the perplexities, so the branches differ by what they do with them."""
    mean, correct = -np.log(np.array(perplexity)), np.array(correct)
    got = outcome.route_weights(
        student_mean_B=mean, teacher_mean_B=mean, correct_B=correct,
        known_B=np.ones(len(correct), bool) if known is None else np.array(known),
        group=group, temperature=temperature,
    )  # fmt: skip
    assert got.dtype == np.float32
    return got


def test_margin_by_hand():
    """Means (-.1, -.2): the gap .1 is .3 short of .4, so (+.15, -.15)."""
    np.testing.assert_allclose(shifts([-0.1, -0.2], [YES, NO]), [0.15, -0.15], rtol=1e-6)
    # The wrong order: gap -.3, short by .7
    np.testing.assert_allclose(shifts([0.1, -0.2], [NO, YES]), [-0.35, 0.35], rtol=1e-6)
    # Correct (0, .2), others (.3, -.1): means .1 and .1, gap 0
    got = shifts([0.0, 0.3, 0.2, -0.1], [YES, NO, YES, NO], group=4)
    np.testing.assert_allclose(got, [0.2, -0.2, 0.2, -0.2], rtol=1e-6)


def test_after_the_shift_every_gap_is_the_margin_or_what_it_was():
    generator = np.random.default_rng(0)
    mean, correct = generator.normal(size=24), generator.uniform(size=24) < 0.5
    got = shifts(mean, correct, group=4, margin=0.7)
    for first in range(0, 24, 4):
        rows = slice(first, first + 4)
        right, wrong = correct[rows], ~correct[rows]
        if not (right.any() and wrong.any()):
            np.testing.assert_array_equal(got[rows], 0.0)
            continue
        before, after = (x[rows][right].mean() - x[rows][wrong].mean() for x in (mean, mean + got))
        np.testing.assert_allclose(after, max(before, 0.7), rtol=1e-6)


def test_a_gap_that_is_wide_enough_and_equal_outcomes_have_no_shift_at_all():
    np.testing.assert_array_equal(shifts([0.5, 0.0], [YES, NO]), 0.0)
    np.testing.assert_array_equal(shifts([0.4, 0.0], [YES, NO]), 0.0)  # the margin itself
    for same in (YES, NO):
        np.testing.assert_array_equal(shifts([-0.1, 0.9], [same, same]), 0.0)


def test_margins_of_unknown_grades_and_other_prompts():
    """A rollout without a grade is in no mean, whatever stands in its place."""
    mean, correct = [-0.1, -0.2, np.nan, np.inf], [YES, NO, YES, NO]
    got = shifts(mean, correct, [YES, YES, NO, NO], group=4)
    np.testing.assert_allclose(got, [0.15, -0.15, 0.0, 0.0], rtol=1e-6)
    got = shifts(mean, correct, [YES, YES, NO, NO], group=2)  # the second prompt has none
    np.testing.assert_allclose(got, [0.15, -0.15, 0.0, 0.0], rtol=1e-6)
    alone = shifts(mean, correct, [YES, NO, NO, NO], group=2)
    np.testing.assert_array_equal(alone, 0.0)


def test_route_weights_of_the_papers_figure():
    """Figure 2 of 2604.10688: PPL (1.2, 2.6, 3.8) and (4.5, 2.9, 1.7); here times the group of 3."""
    got = weights([1.2, 2.6, 3.8], [YES] * 3)
    np.testing.assert_allclose(got / 3, [0.158, 0.342, 0.500], atol=5e-4)
    got = weights([4.5, 2.9, 1.7], [NO] * 3)
    np.testing.assert_allclose(got / 3, [0.192, 0.298, 0.510], atol=1e-3)


def test_each_outcome_of_a_prompt_has_the_same_weight():
    correct = [YES, NO, NO, NO, YES, YES, YES, YES]
    got = weights([2, 3, 9, 1, 5, 5, 5, 5], correct, group=4)
    np.testing.assert_allclose(got[:4], [4, 4 * 3 / 13, 4 / 13, 4 * 9 / 13], rtol=1e-6)
    np.testing.assert_allclose(got[4:], 1.0, rtol=1e-6)  # all equal: exactly plain weights
    unlikely = weights([2, 4, 8], [YES] * 3, temperature=0.5)  # squares: 4, 16, 64 of 84
    np.testing.assert_allclose(unlikely, 3 * np.array([4, 16, 64]) / 84, rtol=1e-6)


def test_route_weights_of_unknown_grades_and_extremes():
    got = weights([2.0, np.nan, 3.0], [YES, YES, NO], [YES, NO, YES])
    np.testing.assert_allclose(got, [3.0, 0.0, 3.0])
    np.testing.assert_array_equal(weights([2.0, 2.0, 3.0], [YES, NO, NO], [NO] * 3), 0.0)
    mean = np.array([-1e4, 0.0, -np.inf])
    for correct in (YES, NO):
        got = outcome.route_weights(
            student_mean_B=mean, teacher_mean_B=mean[::-1], correct_B=np.full(3, correct),
            known_B=np.array([YES, YES, NO]), group=3, temperature=1e-3,
        )  # fmt: skip
        assert np.isfinite(got).all()
