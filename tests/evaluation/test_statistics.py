"""Figures of hand-made tables of right and wrong, worked out by hand."""

import math

import numpy as np
import pytest

from opd_jax.evaluation import statistics

pytestmark = pytest.mark.short
# Three problems, four answers each: 4, 1 and 0 right.
CORRECT = np.array([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)


def test_avg_at_k():
    assert statistics.avg_at_k(CORRECT) == pytest.approx((1 + 1 / 4 + 0) / 3)
    assert statistics.avg_at_k(CORRECT[1:2]) == 0.25


def test_pass_at_k():
    assert statistics.pass_at_k(CORRECT, 1) == pytest.approx(5 / 12)  # pass@1 is avg@k
    # Of C(4, 2) = 6 pairs, C(3, 2) = 3 miss the one right answer.
    assert statistics.pass_at_k(CORRECT, 2) == pytest.approx((1 + 1 / 2 + 0) / 3)
    # Of 4 triples one misses it.
    assert statistics.pass_at_k(CORRECT, 3) == pytest.approx((1 + 3 / 4 + 0) / 3)
    assert statistics.pass_at_k(CORRECT, 4) == pytest.approx(2 / 3)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"pass@{k}"):
            statistics.pass_at_k(CORRECT, k)


def test_maj_at_k():
    def majority(classes, right):
        correct = np.array([[c in right for c in classes]])
        return statistics.maj_at_k([classes], correct)

    assert majority(["a", "a", "b", "c"], {"a"}) == 1
    assert majority(["a", "a", "b", "c"], {"b"}) == 0
    assert majority(["a", "a", "b", "b"], {"b"}) == 0.5  # a tie of two
    assert majority(["a", "b", "c", None], {"c"}) == pytest.approx(1 / 3)
    assert majority([None, None, None, "c"], {"c"}) == 1  # what cannot be read does not vote
    assert majority([None, None], set()) == 0
    both = statistics.maj_at_k([["a", "a"], ["b", "c"]], np.array([[1, 1], [1, 0]]))
    assert both == pytest.approx((1 + 0.5) / 2)


def test_classes_of_answers():
    of = statistics.answer_class
    assert of(r"\frac{1}{2}", "CORRECT") == of("0.5", "CORRECT")
    assert of("007", "WRONG") == of("7", "WRONG") == of("+7", "WRONG") != of("-7", "WRONG")
    assert of("1,000", "WRONG") == of("1000", "WRONG")
    assert of("1,2", "WRONG") != of("12", "WRONG")  # a list is no number
    assert of("1", "WRONG") != of("1", "CORRECT")  # True == 1 must not join them
    assert of("x", "WRONG") == of("x", "TIMEOUT") is not None
    assert of("x", "UNPARSED") is None
    assert of(None, "UNPARSED") is None


def test_stderr_over_problems():
    # Problems' means 1, 1/4, 0: mean 5/12, squared deviations 49/144, 4/144, 25/144; over 2, root, / sqrt 3.
    assert statistics.stderr(CORRECT) == pytest.approx(math.sqrt(78 / 144 / 2 / 3))
    assert statistics.stderr(CORRECT[:1]) == 0.0
    # 1 of 4 right with one answer each: sqrt(p (1 - p) / (n - 1)).
    assert statistics.stderr(np.array([[1], [0], [0], [0]])) == pytest.approx(math.sqrt(3 / 16 / 3))


def test_bootstrap():
    many = np.repeat([[1], [0], [0], [0]], 100, axis=0)
    spread, low, high = statistics.bootstrap(many, draws=4000, seed=1)
    expected = math.sqrt(3 / 16 / 400)
    assert spread == pytest.approx(expected, rel=0.06)
    assert low == pytest.approx(0.25 - 1.96 * expected, abs=0.006)
    assert high == pytest.approx(0.25 + 1.96 * expected, abs=0.006)
    assert statistics.bootstrap(many, seed=1) == statistics.bootstrap(many, seed=1)
    assert statistics.bootstrap(np.ones((5, 2))) == (0.0, 1.0, 1.0)
