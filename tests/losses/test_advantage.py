"""Advantages against hand arithmetic; none of them has a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses
from tests.losses.conftest import P, Q, row

pytestmark = [pytest.mark.short, pytest.mark.usefixtures("strict_dtypes")]


# opd_advantage


def test_opd_advantage_by_hand():
    # log 0.5 - log 0.25 = log 2 = 0.693147; log 0.1 - log 0.4 = -log 4 = -1.386294
    advantage = losses.opd_advantage(
        teacher_logprob_BT=row(np.log([0.5, 0.1])), student_logprob_BT=row(np.log([0.25, 0.4]))
    )
    np.testing.assert_allclose(advantage, [[0.693147, -1.386294]], rtol=1e-5)


def test_opd_advantage_is_a_constant():
    def total(teacher, student):
        return jnp.sum(losses.opd_advantage(teacher_logprob_BT=teacher, student_logprob_BT=student))

    for gradient in jax.grad(total, argnums=(0, 1))(row([-1.0, -2.0]), row([-3.0, -0.5])):
        np.testing.assert_array_equal(gradient, 0.0)


def test_opd_advantage_averages_to_minus_reverse_kl():
    # Over tokens drawn from P, one of each id weighed by its probability; KL by hand below.
    advantage = losses.opd_advantage(
        teacher_logprob_BT=row(np.log(Q)), student_logprob_BT=row(np.log(P))
    )
    np.testing.assert_allclose(np.sum(P * np.asarray(advantage[0])), -0.218012, rtol=1e-5)


# discounted


@pytest.mark.parametrize(
    ("discount", "expected"),
    [
        (0.0, [[1.0, 2.0, 4.0], [0.0, -1.0, 0.0]]),
        (0.5, [[3.0, 4.0, 4.0], [-0.5, -1.0, 0.0]]),  # 1 + 2/2 + 4/4, 2 + 4/2, 4
        (1.0, [[7.0, 6.0, 4.0], [-1.0, -1.0, 0.0]]),
    ],
)
def test_discounted_by_hand(discount, expected):
    reward = jnp.array([[1.0, 2.0, 4.0], [0.0, -1.0, 0.0]])
    got = losses.discounted(reward_BT=reward, discount=discount)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


# group_advantage


def test_group_advantage_by_hand():
    reward = jnp.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    # mean 1/4, unbiased deviation sqrt((9 + 3) / 16 / 3) = 1/2; equal rewards say nothing
    normalised = losses.group_advantage(reward_B=reward, group=4, normalise=True)
    np.testing.assert_allclose(normalised, [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0], rtol=1e-5)
    centred = losses.group_advantage(reward_B=reward, group=4, normalise=False)
    np.testing.assert_allclose(centred, [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0], rtol=1e-6)


def test_groups_do_not_mix():
    reward = jnp.array([1.0, 0.0, 1.0, 1.0])
    by_two = losses.group_advantage(reward_B=reward, group=2, normalise=False)
    np.testing.assert_allclose(by_two, [0.5, -0.5, 0.0, 0.0])


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("reward", "group"), [(0.1, 16), (-0.7, 16), (0.1, 3), (0.3, 5)])
def test_equal_rewards_give_exactly_zero(reward, group, normalise):
    """Their mean rounds to another number: -0.0147 each for sixteen of 0.1, once divided by 1e-6."""
    got = losses.group_advantage(
        reward_B=jnp.full(2 * group, reward), group=group, normalise=normalise
    )
    np.testing.assert_array_equal(got, np.zeros(2 * group))


def test_rollouts_that_are_left_out_change_nothing_of_their_group():
    counted = jnp.array(
        [True, False, True, True, True, False, False, False, False, False, True, True]
    )
    reward = jnp.array([1.0, jnp.nan, 0, 0, 1, 0, 0, 0, jnp.inf, 0, 0.1, 0.1])
    # Group 0: mean 1/3, unbiased deviation sqrt((4 + 1 + 1) / 9 / 2) = 1/sqrt 3. Group 1 has one that
    # counts, and in group 2 those that count are equal.
    by_hand = np.array([2.0, 0, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0])
    for normalise, scale in ((True, 1 / np.sqrt(3)), (False, 1 / 3)):
        got = losses.group_advantage(
            reward_B=reward, group=4, normalise=normalise, counted_B=counted
        )
        np.testing.assert_allclose(got, by_hand * scale, rtol=1e-5)
    nobody = jnp.zeros(12, bool)
    got = losses.group_advantage(reward_B=reward, group=4, normalise=True, counted_B=nobody)
    np.testing.assert_array_equal(got, np.zeros(12))


def test_group_advantage_is_a_constant():
    gradient = jax.grad(lambda r: losses.group_advantage(reward_B=r, group=2, normalise=True)[0])(
        jnp.array([1.0, 0.0])
    )
    np.testing.assert_array_equal(gradient, np.zeros(2))


# truncated_importance


def test_truncated_importance_by_hand():
    got = losses.truncated_importance(
        logprob_BT=row(np.log([0.3, 0.1, 0.4])),
        sampler_logprob_BT=row(np.log([0.1, 0.2, 0.4])),
        cap=2.0,
    )
    np.testing.assert_allclose(got, [[2.0, 0.5, 1.0]], rtol=1e-6)  # 3 is cut to 2


# support_advantage: the first two ids of P and Q, a third place without an id

ON_P, ON_Q = (np.concatenate([np.log(x[:2]), [-np.inf]]) for x in (P, Q))


def on_support(weight: str, *, normalise: bool = True, student=ON_P) -> jax.Array:
    return losses.support_advantage(
        student_logprob_BTX=row([student]),
        teacher_logprob_BTX=row([ON_Q]),
        weight=weight,
        normalise=normalise,
    )[0, 0]


@pytest.mark.parametrize(
    ("weight", "normalise", "expected"),
    [
        # log(1/2) = -0.693147 and log(5/6) = -0.182322, times 5/8 and 3/8
        ("student", True, [-0.433217, -0.068371, 0.0]),
        ("teacher", True, [-0.346574, -0.091161, 0.0]),  # 1/2 and 1/2
        ("uniform", True, [-0.346574, -0.091161, 0.0]),
        ("student", False, [-0.346574, -0.054696, 0.0]),  # 0.5 and 0.3 as they are
    ],
)
def test_support_advantage_by_hand(weight, normalise, expected):
    np.testing.assert_allclose(on_support(weight, normalise=normalise), expected, atol=1e-6)


def test_support_advantage_of_nothing_and_of_equal_models_is_zero():
    nothing = jnp.full((1, 1, 2), -jnp.inf)
    for weight in losses.SUPPORT_WEIGHTS:
        for x in (nothing, row([ON_P])):
            got = losses.support_advantage(
                student_logprob_BTX=x, teacher_logprob_BTX=x, weight=weight
            )
            np.testing.assert_array_equal(got, 0.0)


def test_the_published_top_k_gradient_is_not_that_of_the_renormalised_divergence():
    """At ratio 1: -sum_v w (log q - log p) (e_v - p), w = (5/8, 3/8), by hand."""

    def surrogate(x):
        logprob = jax.nn.log_softmax(x)[None, None, :2]
        return jnp.sum(
            losses.clipped_surrogate(
                logprob_BT=logprob[0],
                sampler_logprob_BT=row(np.log(P[:2])),
                advantage_BT=on_support("student")[None, :2],
                clip_low=0.2,
                clip_high=0.2,
            )
        )

    gradient = jax.jit(jax.grad(surrogate))(jnp.log(jnp.asarray(P, jnp.float32)))
    np.testing.assert_allclose(gradient, [0.182423, -0.082105, -0.100318], atol=1e-5)

    def divergence(x):
        return losses.divergence(
            p_logprob_BTV=jax.nn.log_softmax(x)[None, None, :2],
            q_logprob_BTV=row([np.log(Q[:2])]),
            direction="reverse",
            form="renormalised",
        )[0, 0]

    gradient = jax.jit(jax.grad(divergence))(jnp.log(jnp.asarray(P, jnp.float32)))
    # 5/8 (log(5/4) - KL) and its negative; the id outside is not touched
    np.testing.assert_allclose(gradient, [0.119725, -0.119725, 0.0], atol=1e-5)
