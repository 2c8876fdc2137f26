"""Sequence-mean rewards of right and wrong answers, and their AUROC, by hand and against all pairs."""

import numpy as np
import pytest

from opd_jax.metrics.correctness import auroc, right_against_wrong, sequence_reward

pytestmark = pytest.mark.short


def test_sequence_reward_is_a_mean_over_scored_tokens():
    advantage = np.array([[np.nan, -1.0, -3.0, np.inf], [0.5, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
    mask = np.array([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    got = sequence_reward(advantage.astype(np.float32), mask)
    np.testing.assert_array_equal(got, [-2.0, 0.5, np.nan])


@pytest.mark.parametrize(
    ("right", "wrong", "area"),
    [
        ([3.0, 2.0], [1.0], 1.0),
        ([1.0], [2.0, 3.0], 0.0),
        ([1.0, 1.0], [1.0, 1.0], 0.5),  # ties count half
        ([2.0, 1.0], [1.0, 0.0], 3.5 / 4),  # 2>1, 2>0, 1=1, 1>0
        ([-0.25], [-0.5, -0.25, 0.0], 1.5 / 3),
    ],
)
def test_auroc_by_hand(right, wrong, area):
    assert auroc(np.array(right), np.array(wrong)) == area


def test_auroc_equals_all_pairs():
    draw = np.random.default_rng(0)
    right, wrong = draw.integers(0, 12, 53) / 4, draw.integers(-3, 9, 41) / 4
    pairs = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    assert auroc(right, wrong) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert auroc(wrong, right) == pytest.approx(1 - sum(pairs) / len(pairs), rel=1e-12)


def test_right_against_wrong_by_hand():
    reward = np.array([-1.0, -3.0, -2.0, np.nan, -4.0])
    correct = np.array([True, False, True, True, False])  # the fourth has no scored token
    assert right_against_wrong(reward, correct) == {
        "rollout/graded": 5.0,
        "rollout/accuracy": 0.6,
        "score/reward_right": -1.5,
        "score/reward_wrong": -3.5,
        "score/reward_auroc": 1.0,
    }


@pytest.mark.parametrize("right", [True, False])
def test_an_empty_class_has_no_keys(right):
    got = right_against_wrong(np.array([-1.0, -2.0]), np.array([right, right]))
    name = "right" if right else "wrong"
    row = {"rollout/graded": 2.0, "rollout/accuracy": float(right)}
    assert got == row | {f"score/reward_{name}": -1.5}


def test_without_a_teacher_only_the_accuracy_is_known():
    assert right_against_wrong(None, np.array([True, False, False, False])) == {
        "rollout/graded": 4.0,
        "rollout/accuracy": 0.25,
    }


def test_what_has_no_grade_is_neither_right_nor_wrong():
    reward = np.array([-1.0, -9.0, -2.0, -9.0])
    correct, graded = np.array([[True, False, False, False], [True, False, True, False]])
    assert right_against_wrong(reward, correct, graded) == {
        "rollout/graded": 2.0,
        "rollout/accuracy": 0.5,
        "score/reward_right": -1.0,
        "score/reward_wrong": -2.0,
        "score/reward_auroc": 1.0,
    }
    assert right_against_wrong(reward, correct, graded & False) == {"rollout/graded": 0.0}
