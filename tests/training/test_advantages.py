"""Advantages of rollouts from scores: shape, extrapolation, clamp and discount in order, and evidence."""

import numpy as np
import pytest

from opd_jax import losses
from opd_jax.training.advantages import Reward, advantages
from opd_jax.training.terms import default_terms
from opd_jax.types import Outcome, Rollout, Scores

pytestmark = pytest.mark.short
# Two rollouts of one prompt: three tokens and one token.
ROLLOUT = Rollout(
    tokens_BT=np.array([[9, 4, 5, 7], [9, 5, 0, 0]], np.int32),
    length_B=np.array([4, 2], np.int32),
    prompt_length_B=np.array([1, 1], np.int32),
    sampler_logprob_BT=np.zeros((2, 4), np.float32),
    outcome_B=np.array([Outcome.EOS, Outcome.EOS], np.int32),
)
MASK = ROLLOUT.response_mask_BT
NAN = np.float32(np.nan)  # outside the response anything may stand
STUDENT = np.array([[NAN, -1.0, -2.0, -0.5], [NAN, -1.0, -np.inf, NAN]], np.float32)
TEACHER = np.array([[NAN, -0.5, -5.0, -0.5], [NAN, -3.0, np.inf, -np.inf]], np.float32)
REFERENCE = np.array([[NAN, -1.2, -3.0, -0.5], [NAN, -1.0, NAN, NAN]], np.float32)
SCORES = Scores(
    student_logprob_BT=STUDENT, student_entropy_BT=STUDENT, teacher_logprob_BT=TEACHER,
    reverse_kl_BT=np.where(MASK, np.float32(0.25), NAN), reference_logprob_BT=REFERENCE,
)  # fmt: skip


def given(*, reward=(True, False), step: int = 1, scores: Scores = SCORES, **loss):
    got = advantages(
        ROLLOUT, scores, MASK, default_terms(pg_weight=1.0, **loss),
        reward=Reward(np.array(reward), 2), step=step,
    )  # fmt: skip
    assert got.dtype == np.float32
    assert not got[~MASK].any()
    return got[0, 1:], got[1, 1]


def test_plain_opd_is_the_log_ratio_bit_for_bit():
    long, short = given()
    np.testing.assert_array_equal(long, (TEACHER - STUDENT)[0, 1:])
    assert short == np.float32(-2.0)


@pytest.mark.parametrize("shape", losses.ADVANTAGE_SHAPES)
def test_every_shape_is_finite_and_zero_outside_the_response(shape):
    long, short = given(advantage_shape=shape, advantage_shape_value=0.3)
    assert np.isfinite([*long, short]).all()


def test_the_baseline_uses_the_exact_kl_of_each_prefix():
    long, short = given(advantage_shape="baseline")
    np.testing.assert_allclose(long, [0.75, -2.75, 0.25])
    np.testing.assert_allclose(short, -1.75)


def test_the_shape_comes_before_the_clamp_and_the_clamp_before_the_discount():
    """Soft log of (.5, -3, 0): (.405465, -1.386294, 0); clamped to 1; discounted by a half."""
    shape = {"advantage_shape": "soft_log"}
    np.testing.assert_allclose(given(**shape)[0], [0.405465, -1.386294, 0.0], rtol=1e-5)
    clamped, _ = given(**shape, advantage_clamp=1.0)
    np.testing.assert_allclose(clamped, [0.405465, -1.0, 0.0], rtol=1e-5)
    discounted, short = given(**shape, advantage_clamp=1.0, discount=0.5)
    np.testing.assert_allclose(discounted, [-0.094535, -1.0, 0.0], rtol=1e-5)
    np.testing.assert_allclose(short, -1.0)  # a response of one token has no later one


def test_extrapolation_comes_first():
    """Lambda 1.25: .5 + .25 * .7, -3 - .25 * 2, 0; the shape is taken of that."""
    moved, short = given(extrapolation=1.25)
    np.testing.assert_allclose(moved, [0.675, -3.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(short, -2.5)
    shaped, _ = given(extrapolation=1.25, advantage_shape="soft_log")
    np.testing.assert_allclose(shaped, [0.515813, -1.504077, 0.0], rtol=1e-5)


def test_without_extrapolation_the_reference_is_not_read():
    terms = default_terms(pg_weight=1.0)
    assert not terms.needs_reference
    alone = SCORES.replace(reference_logprob_BT=None)
    np.testing.assert_array_equal(given(scores=alone)[0], given()[0])
    assert default_terms(pg_weight=1.0, extrapolation=1.25).needs_reference
    for loss in ({"pg_weight": 0.0}, {"teacher_coef": 0.0}, {"advantage": "support"}):
        assert not default_terms(**{"extrapolation": 1.25} | loss).needs_reference


RLSD = {"teacher_coef": 0.0, "group_coef": 1.0, "group_normalise": False, "evidence_share": 0.5}


def test_evidence_by_hand():
    """A = (1/2, -1/2). Log-ratios (.5, -3, 0) clip to 1.2, .8 and 1; half of that: 1.1, .9, 1."""
    long, short = given(**RLSD)
    np.testing.assert_allclose(long, [0.55, 0.45, 0.5], rtol=1e-6)
    np.testing.assert_allclose(short, -0.55, rtol=1e-6)  # the teacher dislikes it: e^2, to 1.2
    long, short = given(**RLSD, evidence_away=True)
    np.testing.assert_allclose(long, [0.45, 0.55, 0.5], rtol=1e-6)
    np.testing.assert_allclose(short, -0.45, rtol=1e-6)
    _, short = given(**RLSD, evidence_away=True, evidence_correct_only=True)
    assert short == np.float32(-0.5)


def test_evidence_fades_to_the_group_advantage_bit_for_bit():
    plain = given(**RLSD | {"evidence_share": 0.0})
    np.testing.assert_allclose(given(**RLSD, evidence_steps=4, step=3)[0][0], 0.525)
    for step in (5, 6, 1000):
        for got, want in zip(given(**RLSD, evidence_steps=4, step=step), plain, strict=True):
            np.testing.assert_array_equal(got, want)


def test_equal_rewards_leave_no_advantage_whatever_the_teacher_says():
    for reward in ((True, True), (False, False)):
        long, short = given(reward=reward, **RLSD)
        assert not long.any()
        assert not short


def test_evidence_needs_the_teacher_and_its_share_decides():
    assert default_terms(pg_weight=1.0, **RLSD).needs_teacher
    assert not default_terms(pg_weight=1.0, **RLSD | {"evidence_share": 0.0}).needs_teacher
    assert not default_terms(pg_weight=1.0, teacher_coef=0.0, evidence_share=0.5).needs_teacher


def test_a_margin_between_outcomes_by_hand():
    """Means of (.5, -3, 0) and -2: gap 1.1667. A margin of 2 is .8333 short, half of it each way."""
    plain = given(advantage_clamp=10.0)
    long, short = given(outcome="margin", outcome_value=2.0)
    np.testing.assert_allclose(long, plain[0] + 0.416667, rtol=1e-5)
    np.testing.assert_allclose(short, plain[1] - 0.416667, rtol=1e-5)
    for reward, margin in (((True, False), 1.0), ((True, True), 9.0), ((False, False), 9.0)):
        got = given(reward=reward, outcome="margin", outcome_value=margin)
        for one, two in zip(got, plain, strict=True):  # wide enough, or one outcome: plain OPD
            np.testing.assert_array_equal(one, two)
    clamped, _ = given(outcome="margin", outcome_value=2.0, advantage_clamp=1.0)
    # (.5, -1, 0) and -1: gap .8333, short by 1.1667
    np.testing.assert_allclose(clamped, [1.083333, -0.416667, 0.583333], rtol=1e-5)


def test_routes_by_hand():
    """Correct: 1 for every token. Not: log-ratios. One of each in a prompt: weight 2, the group."""
    long, short = given(outcome="route", outcome_value=1.0)
    np.testing.assert_array_equal(long, 2.0)
    assert short == np.float32(-4.0)
    long, short = given(reward=(False, False), outcome="route", outcome_value=1.0)
    # mean log q -2 and -3: weights 2 e / (1 + e) and 2 / (1 + e)
    np.testing.assert_allclose(long, 1.462117 * np.array([0.5, -3.0, 0.0]), rtol=1e-5)
    np.testing.assert_allclose(short, 0.537883 * -2.0, rtol=1e-5)
    assert default_terms(pg_weight=1.0, outcome="route").needs_reward


def test_opct_by_hand():
    """2605.21834's test: log p (-1, -2), log q (-2, -1), coefficient 2, discount .5: A = (-1, 2)."""
    student = np.array([[NAN, -1.0, -2.0, NAN], [NAN, -1.0, NAN, NAN]], np.float32)
    teacher = np.array([[NAN, -2.0, -1.0, NAN], [NAN, -1.0, NAN, NAN]], np.float32)
    scores = SCORES.replace(student_logprob_BT=student, teacher_logprob_BT=teacher)
    mask = MASK & np.isfinite(student)
    got = advantages(
        ROLLOUT, scores, mask, default_terms(pg_weight=1.0, teacher_coef=2.0, discount=0.5)
    )
    np.testing.assert_allclose(got[0, 1:3], [-1.0, 2.0])
