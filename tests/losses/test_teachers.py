"""Several teachers: numbers by hand, the gradient of a mixture, one teacher twice, rows that are not read."""

import numpy as np
import pytest

from opd_jax.losses.teachers import mixture, shares
from tests.losses.conftest import log_softmax

pytestmark = pytest.mark.short


def test_a_mixture_by_hand():
    """Log-probs (-1, -3) with weights (1, 3): -.25 - 2.25 = -2.5; of a student's -2 the advantage is -.5."""
    log_q = mixture(values_KBT=[np.array([[-1.0]]), np.array([[-3.0]])], share_K=shares([1, 3]))
    assert log_q.dtype == np.float32
    np.testing.assert_allclose(log_q, [[-2.5]])
    np.testing.assert_allclose(log_q - np.array([[-2.0]]), [[-0.5]])
    # The mean of probabilities would be log(.25 e^-1 + .75 e^-3).
    assert np.log(0.25 * np.exp(-1) + 0.75 * np.exp(-3)) == pytest.approx(-2.0455, abs=1e-4)


def test_weights_are_scaled_to_sum_1():
    np.testing.assert_allclose(shares([3.0, 1.0]), [0.75, 0.25])
    assert shares([2.0, 2.0]).tolist() == [0.5, 0.5]
    assert shares([0.0, 7.0]).tolist() == [0.0, 1.0]


def test_one_teacher_twice_is_that_teacher_bit_for_bit():
    values_BT = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    got = mixture(values_KBT=[values_BT, values_BT], share_K=shares([0.5, 0.5]))
    np.testing.assert_array_equal(got, values_BT)
    np.testing.assert_array_equal(mixture(values_KBT=[values_BT], share_K=shares([7.0])), values_BT)


def test_a_teacher_without_weight_is_not_read():
    values_BT = np.array([[-1.0, -2.0]], np.float32)
    bad_BT = np.full_like(values_BT, np.nan)
    got = mixture(values_KBT=[bad_BT, values_BT, bad_BT], share_K=shares([0, 2, 0]))
    np.testing.assert_array_equal(got, values_BT)


def test_the_expected_gradient_is_that_of_the_sum_of_reverse_kls():
    """E_p[A grad log p] = -grad sum_k w_k KL(p || q_k), by finite differences of the logits."""
    generator = np.random.default_rng(1)
    logits_V = generator.normal(size=6)
    log_q_KV = [log_softmax(generator.normal(size=6)) for _ in range(3)]
    share_K = shares([1.0, 2.0, 5.0])

    def loss(logits: np.ndarray) -> float:
        log_p = log_softmax(logits)
        kl_K = [np.sum(np.exp(log_p) * (log_p - log_q)) for log_q in log_q_KV]
        return float(np.dot(share_K.astype(float), kl_K))

    log_p_V = log_softmax(logits_V)
    p_V = np.exp(log_p_V)
    log_q_V = mixture(values_KBT=[q[None] for q in log_q_KV], share_K=share_K)[0]
    advantage_V = log_q_V - log_p_V
    score_VV = np.eye(6) - p_V[None]  # d log p(v) / d logits
    got_V = np.sum(p_V[:, None] * advantage_V[:, None] * score_VV, axis=0)
    step = 1e-5
    wanted_V = [
        -(loss(logits_V + step * e) - loss(logits_V - step * e)) / (2 * step) for e in np.eye(6)
    ]
    np.testing.assert_allclose(got_V, wanted_V, atol=1e-6)


def test_the_normaliser_is_the_gap_between_the_two_sides():
    """sum_k w_k KL(p || q_k) = KL(p || q / Z) - log Z."""
    generator = np.random.default_rng(2)
    log_p_V = log_softmax(generator.normal(size=4))
    log_q_KV = [log_softmax(generator.normal(size=4)) for _ in range(2)]
    share_K = shares([0.3, 0.7])
    log_q_V = mixture(values_KBT=[q[None] for q in log_q_KV], share_K=share_K)[0].astype(float)
    log_z = np.log(np.sum(np.exp(log_q_V)))
    p_V = np.exp(log_p_V)
    left = sum(w * np.sum(p_V * (log_p_V - q)) for w, q in zip(share_K, log_q_KV, strict=True))
    right = np.sum(p_V * (log_p_V - (log_q_V - log_z))) - log_z
    assert left == pytest.approx(right, abs=1e-6)
