"""Factors of token weights: the numbers by hand, masked rows, nothing counted, neutral numbers."""

import numpy as np
import pytest

from opd_jax.losses import token_factors
from tests.losses.conftest import Q

pytestmark = pytest.mark.short
ALL = np.ones((1, 3), bool)


def row(*values: float) -> np.ndarray:
    return np.array([values], float)


# rescaled


def test_rescaled_keeps_the_weighted_sum():
    """Weights (.5, .25, .25), factors (0, 1, 3): their sum 1 is kept by 1 / (0 + .25 + .75)."""
    weight = row(0.5, 0.25, 0.25)
    got = token_factors.rescaled(row(0.0, 1.0, 3.0), weight)
    np.testing.assert_allclose(got, [[0.0, 1.0, 3.0]], rtol=1e-6)
    got = token_factors.rescaled(row(1.0, 1.0, 5.0), weight)  # sum 2
    np.testing.assert_allclose(got, [[0.5, 0.5, 2.5]], rtol=1e-6)
    assert got.dtype == np.float32


@pytest.mark.parametrize("value", [0.3, 1.5, 1e-8, 7.0])
def test_one_factor_for_all_is_exactly_one(value):
    weight = np.array([[0.1, 0.7, 0.0], [0.2, 0.0, 0.0]], np.float32)
    got = token_factors.rescaled(np.full((2, 3), value), weight)
    np.testing.assert_array_equal(got, weight > 0)


def test_rescaled_where_nothing_is_left_or_counts():
    np.testing.assert_array_equal(token_factors.rescaled(row(0, 0, 0), row(1, 1, 1)), 0.0)
    np.testing.assert_array_equal(token_factors.rescaled(row(1, 2, 3), row(0, 0, 0)), 0.0)


# iw


def test_early_agreement_by_hand():
    """|l| = (1, 1, 2) with strength .5: what stands before is 0, 1/4, 1/2 of the sum."""
    got = token_factors.early_agreement(gap_BT=row(1, 1, 2), mask_BT=ALL, strength=0.5)
    np.testing.assert_allclose(got, [[1.5, 1.375, 1.25]], rtol=1e-12)


def test_early_agreement_of_masked_tokens_one_token_and_no_gap():
    gap = np.array([[1.0, 9.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = np.array([[1, 0, 1], [1, 0, 0], [1, 1, 0]], bool)
    got = token_factors.early_agreement(gap_BT=gap, mask_BT=mask, strength=0.5)
    np.testing.assert_allclose(got, [[1.5, 0, 1.25], [1.5, 0, 0], [1.5, 1.5, 0]], rtol=1e-12)
    ones = token_factors.early_agreement(gap_BT=gap, mask_BT=mask, strength=0.0)
    np.testing.assert_array_equal(ones, mask)


# prune


def test_pruned_by_hand():
    """tau .75, drop .1, base .5, overlap (1, .5, 0): 0, 1, 2 bad tokens up to there."""
    got = token_factors.pruned(
        overlap_BT=row(1, 0.5, 0), mask_BT=ALL, threshold=0.75, drop=0.1, least=0.5
    )
    np.testing.assert_allclose(got, [[1.5, 1.4, 1.3]], rtol=1e-12)


def test_pruned_counts_no_masked_token_and_ends_at_zero():
    mask = np.array([[1, 0, 1, 1]], bool)
    kind = {"overlap_BT": np.zeros((1, 4)), "mask_BT": mask, "threshold": 0.9, "least": 0.0}
    np.testing.assert_allclose(
        token_factors.pruned(**kind, drop=0.4), [[0.6, 0, 0.2, 0]], atol=1e-12
    )
    np.testing.assert_array_equal(token_factors.pruned(**kind, drop=0.0), mask)
    open_ = token_factors.pruned(**kind | {"threshold": 0.0}, drop=1.0)
    np.testing.assert_array_equal(open_, mask)  # no overlap is below 0


# step


def test_step_weights_by_hand():
    """Mean gaps (.2, .8, .1) of three steps, at most 1.2: 1, .2 / .8, min(.2 / .1, 1.2)."""
    gap = row(0.1, 0.3, 0.8, 0.1, 0.1)
    step = np.array([[0, 0, 1, 2, 2]])
    got = token_factors.step_weights(
        gap_BT=gap, step_BT=step, mask_BT=np.ones((1, 5), bool), strength=0.2
    )
    np.testing.assert_allclose(got, [[1, 1, 0.25, 1.2, 1.2]], rtol=1e-5)


def test_step_weights_are_the_product_of_the_ratios():
    """SOD writes prod_{u<k} (d_u + eps) / (d_{u+1} + eps); it telescopes."""
    d = np.array([0.7, 0.2, 1.1, 0.4]) + 1e-6
    product = np.cumprod(np.concatenate([[1.0], d[:-1] / d[1:]]))
    got = token_factors.step_weights(
        gap_BT=(d - 1e-6)[None], step_BT=np.arange(4)[None], mask_BT=np.ones((1, 4), bool),
        strength=1e9,
    )  # fmt: skip
    np.testing.assert_allclose(got[0], product, rtol=1e-12)


def test_step_weights_of_masked_steps():
    """The first step has no counted token, so the second is the first; row 1 has none at all."""
    gap = np.array([[9.0, 0.4, 0.2, 5.0], [1.0, 1.0, 1.0, 1.0]])
    step = np.array([[0, 1, 2, 2], [0, 0, 1, -1]])
    mask = np.array([[0, 1, 1, 0], [0, 0, 0, 1]], bool)
    got = token_factors.step_weights(gap_BT=gap, step_BT=step, mask_BT=mask, strength=0.5)
    np.testing.assert_allclose(got, [[0, 1, 1.5, 0], [0, 0, 0, 0]], rtol=1e-5)


# fire


def test_entropy_factors_by_hand():
    """H(q) = H(p) = ((0, 2), (1, 2)), a = b = 1: ((2, 2), (2.25, 2)) / 2.0625."""
    entropy = np.array([[0.0, 2.0], [1.0, 2.0]])
    got = token_factors.entropy_factors(
        teacher_entropy_BT=entropy, student_entropy_BT=entropy, mask_BT=np.ones((2, 2), bool),
        teacher_strength=1.0, student_strength=1.0,
    )  # fmt: skip
    np.testing.assert_allclose(got, np.array([[2, 2], [2.25, 2]]) / 2.0625, rtol=1e-12)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_entropy_factors_without_entropy_or_strength_are_ones(strength):
    zeros = np.zeros((2, 3))
    entropy = zeros if strength else np.array([[0.1, 5.0, 2.0], [1.0, 1.0, 3.0]])
    mask = np.array([[1, 1, 0], [0, 0, 0]], bool)
    got = token_factors.entropy_factors(
        teacher_entropy_BT=entropy, student_entropy_BT=entropy, mask_BT=mask,
        teacher_strength=strength, student_strength=strength,
    )  # fmt: skip
    np.testing.assert_array_equal(got, mask)


def test_likeliest_rows_by_hand():
    """Five rollouts with mean log q -1, -2, -3, -.5, -2: a fifth dropped is the third; the sixth is empty."""
    mask = np.array([[1, 1], [1, 0], [1, 1], [1, 0], [1, 0], [0, 0]], bool)
    logprob = np.array([[-1, -1], [-2, -99], [0, -6], [-0.5, 0], [-2, 0], [0, 0]], float)
    kept = token_factors.likeliest_rows(teacher_logprob_BT=logprob, mask_BT=mask, keep=0.8)
    np.testing.assert_array_equal(kept, [True, True, False, True, True, False])
    kept = token_factors.likeliest_rows(teacher_logprob_BT=logprob, mask_BT=mask, keep=0.6)
    np.testing.assert_array_equal(kept, [True, True, False, True, False, False])  # the later of -2
    every = token_factors.likeliest_rows(teacher_logprob_BT=logprob, mask_BT=mask, keep=1.0)
    np.testing.assert_array_equal(every, mask.any(axis=1))


# tip, ta


def test_tip_by_hand():
    """Scaled h = d = .5 in the middle: .5 + .5 - .25 = .75; ends 0 and 1."""
    got = token_factors.uncertain_or_far(
        entropy_BT=row(0, 1, 2), divergence_BT=row(0, 3, 6), mask_BT=ALL
    )
    np.testing.assert_allclose(got, [[0, 0.75, 1]], rtol=1e-12)


def test_the_clip_of_the_entropy():
    """Of (0, 1, 2, 100) the quantile 2/3 is 2: h = (0, .5, 1, 1)."""
    got = token_factors.uncertain_or_far(
        entropy_BT=row(0, 1, 2, 100), divergence_BT=row(1, 1, 1, 1), mask_BT=np.ones((1, 4), bool),
        quantile=2 / 3,
    )  # fmt: skip
    np.testing.assert_allclose(got, [[0, 0.5, 1, 1]], rtol=1e-9)


@pytest.mark.parametrize(
    ("scores", "keep", "kept"),
    [
        ((1, 1, 0.75, 0.36), 0.5, (1, 1, 0, 0)),
        ((0.36, 0.75, 1, 1), 0.5, (0, 0, 1, 1)),
        ((2, 2, 2, 2), 0.3, (1, 1, 0, 0)),  # ceil(1.2) of equal ones: the first
        ((1, 2, 3, 4), 0.05, (0, 0, 0, 1)),  # at least one
        ((1, 2, 3, 4), 1.0, (1, 1, 1, 1)),
    ],
)
def test_most_by_hand(scores, keep, kept):
    got = token_factors.most(score_BT=row(*scores), mask_BT=np.ones((1, 4), bool), keep=keep)
    np.testing.assert_array_equal(got, [kept])


def test_most_looks_at_counted_tokens_alone():
    mask = np.array([[1, 0], [1, 0]], bool)
    score = np.array([[0.1, 9.0], [0.2, 9.0]])
    got = token_factors.most(score_BT=score, mask_BT=mask, keep=0.5)
    np.testing.assert_array_equal(got, [[0, 0], [1, 0]])
    nothing = token_factors.most(score_BT=score, mask_BT=mask & False, keep=0.5)
    np.testing.assert_array_equal(nothing, 0.0)


def test_far_and_compatible_by_hand():
    """Over 21 values 0 .. 20 the quantiles .05 and .95 are 1 and 19: z = 10 is .5, 0 and 20 are clipped."""
    values = np.arange(21.0)[None]
    got = token_factors.far_and_compatible(
        divergence_BT=values, teacher_mass_BT=values, mask_BT=np.ones((1, 21), bool)
    )
    np.testing.assert_allclose(got[0, [0, 1, 10, 19, 20]], [0, 0, 0.25, 1, 1], atol=1e-12)
    against = token_factors.far_and_compatible(
        divergence_BT=values, teacher_mass_BT=values[:, ::-1], mask_BT=np.ones((1, 21), bool)
    )
    assert np.argmax(against) == 10  # both have to be large


def test_accepted_by_hand():
    got = token_factors.accepted(
        accepted_BT=row(1, 0, 1), mask_BT=np.array([[1, 1, 0]], bool), least=0.01
    )
    np.testing.assert_allclose(got, [[1, 0.01, 0]], rtol=1e-12)
    ones = token_factors.accepted(accepted_BT=row(1, 0, 0), mask_BT=ALL, least=1.0)
    np.testing.assert_array_equal(ones, 1.0)


def test_scores_of_equal_tokens_and_of_none_are_zero():
    same, none = np.full((1, 3), Q[0]), ALL & False
    for mask in (ALL, none):
        tip = token_factors.uncertain_or_far(entropy_BT=same, divergence_BT=same, mask_BT=mask)
        ta = token_factors.far_and_compatible(
            divergence_BT=same, teacher_mass_BT=same, mask_BT=mask
        )
        np.testing.assert_array_equal(tip, 0.0)
        np.testing.assert_array_equal(ta, 0.0)
    empty = token_factors.entropy_factors(
        teacher_entropy_BT=same, student_entropy_BT=same, mask_BT=none,
        teacher_strength=1.0, student_strength=1.0,
    )  # fmt: skip
    np.testing.assert_array_equal(empty, 0.0)
