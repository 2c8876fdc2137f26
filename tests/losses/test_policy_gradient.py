"""Terms of sampled tokens against hand arithmetic and closed-form gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from opd_jax import losses
from tests.losses.conftest import P, log_softmax, row

pytestmark = [pytest.mark.short, pytest.mark.usefixtures("strict_dtypes")]

SAMPLED = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}


# clipped_surrogate


def surrogate(logprob, sampler_logprob, advantage) -> jax.Array:
    return losses.clipped_surrogate(
        logprob_BT=logprob, sampler_logprob_BT=sampler_logprob, advantage_BT=advantage,
        clip_low=0.2, clip_high=0.3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("p", "p_old", "advantage", "loss", "gradient"),
    [
        # rho = 1.5 above 1.3.  A > 0: min(1.5*2, 1.3*2) = 2.6, flat: no reason to go further.
        (0.6, 0.4, 2.0, -2.6, 0.0),
        # A < 0: min(1.5*-2, 1.3*-2) = -3, not clipped: -A rho = 3 pulls back.
        (0.6, 0.4, -2.0, 3.0, 3.0),
        # rho = 0.5 below 0.8.  A > 0: min(0.5*2, 0.8*2) = 1, not clipped: -A rho = -1.
        (0.2, 0.4, 2.0, -1.0, -1.0),
        # A < 0: min(0.5*-2, 0.8*-2) = -1.6, flat.
        (0.2, 0.4, -2.0, 1.6, 0.0),
        # rho = 1.125 within the bounds: -A rho.
        (0.45, 0.4, 2.0, -2.25, -2.25),
    ],
)
def test_clip_acts_on_the_right_side(p, p_old, advantage, loss, gradient):
    def value(logprob):
        return surrogate(logprob, row([np.log(p_old)]), row([advantage]))[0, 0]

    got, slope = jax.value_and_grad(value)(row([np.log(p)]))
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    np.testing.assert_allclose(slope, [[gradient]], rtol=1e-5)


@pytest.mark.parametrize(
    ("p", "p_old", "advantage", "loss", "gradient"),
    [
        (0.5, 0.1, -2.0, 6.0, 0.0),  # rho = 5: 10 without the bound, 3 * 2 with it, and flat
        (0.6, 0.4, -2.0, 3.0, 3.0),  # rho = 1.5: below the bound
        (0.5, 0.1, 2.0, -2.6, 0.0),  # a positive advantage knows no second bound
        (0.5, 0.1, 0.0, 0.0, 0.0),
    ],
)
def test_dual_clip_by_hand(p, p_old, advantage, loss, gradient):
    def value(logprob):
        return losses.clipped_surrogate(
            logprob_BT=logprob, sampler_logprob_BT=row([np.log(p_old)]),
            advantage_BT=row([advantage]), clip_low=0.2, clip_high=0.3, dual_clip=3.0,
        )[0, 0]  # fmt: skip

    got, slope = jax.value_and_grad(value)(row([np.log(p)]))
    np.testing.assert_allclose(got, loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(slope, [[gradient]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("advantage", "dual_clip", "loss", "gradient"),
    [
        (2.0, np.inf, -2.6, 0.0),  # clipped at 1.3
        (-2.0, 3.0, 6.0, 0.0),  # clipped at 3
        (0.0, np.inf, 0.0, 0.0),
        # Nothing bounds it: 2 rho, with the tangent of exp at 40; 2 e^40 (1 + 119 - 40).
        (-2.0, np.inf, 160 * np.exp(40.0), 2 * np.exp(40.0)),
    ],
)
def test_a_ratio_that_overflows_has_a_finite_gradient(advantage, dual_clip, loss, gradient):
    """rho = e^119, beyond float32."""

    def value(logits):
        return losses.clipped_surrogate(
            logprob_BT=jax.nn.log_softmax(logits)[None, None, 0],
            sampler_logprob_BT=row([-120.0]), advantage_BT=row([advantage]),
            clip_low=0.2, clip_high=0.3, dual_clip=dual_clip,
        )[0, 0]  # fmt: skip

    got, slope = jax.value_and_grad(value)(jnp.log(jnp.exp(-1.0) * jnp.array([1.0, np.e - 1])))
    np.testing.assert_allclose(got, loss, rtol=1e-4)
    assert np.isfinite(
        optax.tree.norm(slope)
    )  # in float32, as clipping by the global norm takes it
    scale = 1 - np.exp(-1.0)  # d log p(y) / d logits = (1 - p, -(1 - p)) of two ids
    np.testing.assert_allclose(slope, [gradient * scale, -gradient * scale], rtol=1e-4)


def test_surrogate_at_ratio_one_has_the_policy_gradient(logits):
    student, _ = logits
    token, advantage = np.array([2, 0, 6, 2]), np.array([1.5, -0.7, 0.0, -2.0])
    sampler = log_softmax(student)[np.arange(4), token]

    def loss(x_TV):
        logprob_T = jax.nn.log_softmax(x_TV)[np.arange(4), token]
        return jnp.sum(surrogate(logprob_T[None], row(sampler), row(advantage)))

    gradient = jax.grad(loss)(jnp.asarray(student, jnp.float32))
    expected = -advantage[:, None] * (np.eye(7)[token] - np.exp(log_softmax(student)))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_surrogate_treats_sampler_and_advantage_as_constants():
    def total(sampler, advantage):
        return jnp.sum(surrogate(row([-1.0]), sampler, advantage))

    for gradient in jax.grad(total, argnums=(0, 1))(row([-1.1]), row([2.0])):
        np.testing.assert_array_equal(gradient, 0.0)


def test_surrogate_scales_with_the_advantage():
    logprob, sampler, advantage = row([-1.0, -3.0, -0.1]), row([-2.0, -1.0, -0.1]), row([1, -2, 3])
    np.testing.assert_allclose(
        surrogate(logprob, sampler, 4.0 * advantage), 4.0 * surrogate(logprob, sampler, advantage)
    )


# sft_nll


def test_sft_nll_by_hand_and_its_gradient(logits):
    np.testing.assert_allclose(  # -log 0.25 = 1.386294, -log 1 = 0
        losses.sft_nll(logprob_BT=row(np.log([0.25, 1.0]))), [[1.386294, 0.0]], rtol=1e-6
    )
    student, _ = logits
    token = np.array([1, 1, 5, 0])

    def loss(x_TV):
        return jnp.sum(
            losses.sft_nll(logprob_BT=jax.nn.log_softmax(x_TV)[np.arange(4), token][None])
        )

    gradient = jax.grad(loss)(jnp.asarray(student, jnp.float32))  # cross entropy: p - onehot
    expected = np.exp(log_softmax(student)) - np.eye(7)[token]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


# kl_k1, kl_k2, kl_k3


@pytest.mark.parametrize(
    ("name", "value", "gradient"),
    [
        # d = log 0.5 - log 0.25 = log 2 = 0.693147
        ("k1", 0.693147, 1.0),
        ("k2", 0.240227, 0.693147),  # d^2 / 2, d
        ("k3", 0.193147, 0.5),  # 1/2 - 1 + d, 1 - 1/2
    ],
)
def test_sampled_kl_by_hand(name, value, gradient):
    def kl(logprob, reference):
        return SAMPLED[name](logprob_BT=logprob, reference_logprob_BT=reference)[0, 0]

    got, (slope, reference_slope) = jax.value_and_grad(kl, argnums=(0, 1))(
        row(np.log([0.5])), row(np.log([0.25]))
    )
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(slope, [[gradient]], rtol=1e-5)
    np.testing.assert_array_equal(reference_slope, 0.0)


def expected_sampled_kl(name, student_TV, other_TV) -> jax.Array:
    """E_{v ~ p}[estimate of v], every id taken once with its (constant) probability."""
    log_p, log_ref = jax.nn.log_softmax(student_TV), jax.nn.log_softmax(other_TV)
    estimate = SAMPLED[name](logprob_BT=log_p, reference_logprob_BT=log_ref)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_p)) * estimate)


def test_sampled_kl_in_expectation(logits):
    student, other = (jnp.asarray(x, jnp.float32) for x in logits)

    def kl(x):
        return losses.exact_kl(
            p_logprob_BTV=jax.nn.log_softmax(x)[None], q_logprob_BTV=jax.nn.log_softmax(other)[None]
        )

    exact, exact_gradient = jax.value_and_grad(lambda x: jnp.sum(kl(x)))(student)
    k1, k1_gradient = jax.value_and_grad(lambda x: expected_sampled_kl("k1", x, other))(student)
    k2_gradient = jax.grad(lambda x: expected_sampled_kl("k2", x, other))(student)
    k3 = expected_sampled_kl("k3", student, other)
    np.testing.assert_allclose([k1, k3], [exact, exact], rtol=1e-5)
    np.testing.assert_allclose(k1_gradient, 0.0, atol=1e-6)
    np.testing.assert_allclose(k2_gradient, exact_gradient, atol=1e-6)
    assert np.max(np.abs(exact_gradient)) > 0.1  # so the comparison says something


def test_the_gradient_of_k3_is_that_of_the_forward_kl(logits):
    """In expectation over samples of p: (1 - ref / p) grad log p sums to the gradient of KL(ref || p)."""
    student, other = (jnp.asarray(x, jnp.float32) for x in logits)

    def forward(x):
        p, ref = (jax.nn.log_softmax(y)[None] for y in (x, other))
        return jnp.sum(losses.forward_kl(p_logprob_BTV=p, q_logprob_BTV=ref))

    gradient = jax.grad(lambda x: expected_sampled_kl("k3", x, other))(student)
    np.testing.assert_allclose(gradient, jax.grad(forward)(student), atol=1e-6)
    reverse = jax.grad(lambda x: expected_sampled_kl("k2", x, other))(student)
    assert np.max(np.abs(gradient - reverse)) > 0.1


@pytest.mark.parametrize(
    ("logprob", "clamp", "value", "gradient"),
    [
        (-15.0, np.inf, 3.2690e6, -3.2690e6),  # e^15 - 16, 1 - e^15
        (-15.0, 10.0, 10.0, 0.0),
        (-2.0, 10.0, 4.389056, -6.389056),  # e^2 - 3, 1 - e^2
        (-300.0, 10.0, 10.0, 0.0),
        (-120.0, np.inf, 81 * np.exp(40.0), -np.exp(40.0)),  # the tangent of exp at 40
    ],
)
def test_the_clamp_of_k3(logprob, clamp, value, gradient):
    """A sampled token under a reference that is sure of it (log-prob 0)."""

    def kl(x):
        return losses.kl_k3(logprob_BT=x, reference_logprob_BT=row([0.0]), clamp=clamp)[0, 0]

    got, slope = jax.value_and_grad(kl)(row([logprob]))
    np.testing.assert_allclose(got, value, rtol=1e-4)
    np.testing.assert_allclose(slope, [[gradient]], rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_kl_depends_on_the_difference_only(name):
    logprob, reference = row([-1.0, -2.0, -0.5]), row([-1.5, -0.25, -0.5])
    kl = SAMPLED[name](logprob_BT=logprob, reference_logprob_BT=reference)
    shifted = SAMPLED[name](logprob_BT=logprob - 4.0, reference_logprob_BT=reference - 4.0)
    np.testing.assert_allclose(shifted, kl, atol=1e-6)
    np.testing.assert_array_equal(kl[0, 2], 0.0)  # equal log-probs
    assert np.all(kl >= 0) == (name != "k1")


# entropy


def test_entropy_by_hand():
    # 0.5*0.693147 + 0.3*1.203973 + 0.2*1.609438 = 0.346574 + 0.361192 + 0.321888 = 1.029653
    uniform, certain = np.log(np.full(3, 1 / 3)), [0.0, -np.inf, -np.inf]
    entropy = losses.entropy(logprob_BTV=row([np.log(P), uniform, certain]))
    np.testing.assert_allclose(entropy, [[1.029653, 1.098612, 0.0]], rtol=1e-5)


def test_entropy_gradient(logits):
    def entropy(x_TV):
        return jnp.sum(losses.entropy(logprob_BTV=jax.nn.log_softmax(x_TV)[None]))

    log_p = log_softmax(logits[0])
    expected_entropy = -np.sum(np.exp(log_p) * log_p, axis=-1, keepdims=True)
    student = jnp.asarray(logits[0], jnp.float32)
    np.testing.assert_allclose(  # dH/dx_v = -p_v (log p_v + H)
        jax.grad(entropy)(student), -np.exp(log_p) * (log_p + expected_entropy), atol=1e-6
    )
    with jax.enable_x64(True):
        check_grads(entropy, (jnp.asarray(logits[0]),), order=1, modes=["rev"])
    gradient = jax.grad(entropy)(student.at[:, 3].set(-jnp.inf))
    assert np.all(np.isfinite(gradient))
    np.testing.assert_allclose(entropy(student[:, ::-1]), entropy(student), rtol=1e-6)


@pytest.mark.parametrize("name", ["surrogate", "sft", *SAMPLED])
def test_an_empty_row_adds_nothing_and_has_no_gradient(name):
    other, advantage = row([-1.0, -2.0]), row([3.0, -4.0])
    per_token = {
        "surrogate": lambda x: surrogate(x, other, advantage),
        "sft": lambda x: losses.sft_nll(logprob_BT=x),
    } | {k: lambda x, k=k: SAMPLED[k](logprob_BT=x, reference_logprob_BT=other) for k in SAMPLED}
    weight = losses.token_weights(np.zeros((1, 2), bool), "sequence")
    loss, gradient = jax.value_and_grad(lambda x: jnp.sum(weight * per_token[name](x)))(
        row([-0.5, -3.0])
    )
    np.testing.assert_array_equal(loss, 0.0)
    np.testing.assert_array_equal(gradient, np.zeros((1, 2)))
