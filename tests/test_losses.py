"""Every equation against hand arithmetic, closed-form gradients, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from opd_jax import losses

pytestmark = [pytest.mark.short, pytest.mark.usefixtures("strict_dtypes")]

P = np.array([0.5, 0.3, 0.2])
Q = np.array([0.25, 0.25, 0.5])
SAMPLED = {"k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3}


def row(values) -> jax.Array:
    """One sequence: [T] -> [1, T] (or [T, V] -> [1, T, V]), float32."""
    return jnp.asarray(np.asarray(values)[None], jnp.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, V] of a student and of another model, at 4 prefixes over 7 ids."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(4, 7)), generator.normal(size=(4, 7))


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


# exact_kl


def kl_of_logits(x_TV, y_TV) -> jax.Array:
    return losses.exact_kl(
        p_logprob_BTV=jax.nn.log_softmax(x_TV)[None], q_logprob_BTV=jax.nn.log_softmax(y_TV)[None]
    )[0]


def test_exact_kl_by_hand():
    # 0.5 log 2 + 0.3 log 1.2 + 0.2 log 0.4 = 0.346574 + 0.054696 - 0.183258 = 0.218012
    kl = losses.exact_kl(p_logprob_BTV=row([np.log(P)]), q_logprob_BTV=row([np.log(Q)]))
    np.testing.assert_allclose(kl, [[0.218012]], rtol=1e-5)


def test_exact_kl_gradient(logits):
    student, other = logits
    log_p, log_q = log_softmax(student), log_softmax(other)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1, keepdims=True)
    p_gradient, q_gradient = jax.grad(lambda x, y: jnp.sum(kl_of_logits(x, y)), argnums=(0, 1))(
        jnp.asarray(student, jnp.float32), jnp.asarray(other, jnp.float32)
    )
    np.testing.assert_allclose(p_gradient, np.exp(log_p) * (log_p - log_q - kl), atol=1e-6)
    np.testing.assert_array_equal(q_gradient, 0.0)


def test_exact_kl_gradient_by_finite_differences(logits):
    with jax.enable_x64(True):
        student, other = map(jnp.asarray, logits)
        check_grads(lambda x: kl_of_logits(x, other), (student,), order=1, modes=["rev"])


def test_exact_kl_of_equal_distributions_is_zero_without_gradient(logits):
    x = jnp.asarray(logits[0], jnp.float32)
    np.testing.assert_array_equal(kl_of_logits(x, x), 0.0)
    gradient = jax.grad(lambda x, y: jnp.sum(kl_of_logits(x, y)))(x, x)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


def test_exact_kl_ignores_order_and_impossible_ids(logits):
    student, other = (jnp.asarray(x, jnp.float32) for x in logits)
    kl = kl_of_logits(student, other)
    np.testing.assert_allclose(kl_of_logits(student[:, ::-1], other[:, ::-1]), kl, rtol=1e-5)
    wider = [jnp.pad(x, ((0, 0), (0, 3)), constant_values=-jnp.inf) for x in (student, other)]
    np.testing.assert_allclose(kl_of_logits(*wider), kl, rtol=1e-6)


def test_exact_kl_of_impossible_ids_is_finite_backwards(logits):
    student, other = (jnp.asarray(x, jnp.float32) for x in logits)
    cut = student.at[:, 2].set(-jnp.inf)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(kl_of_logits(x, other)))(cut)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[:, 2], 0.0)
    nothing = jnp.full((1, 1, 7), -jnp.inf)  # a row without any mass
    value, gradient = jax.value_and_grad(
        lambda p: losses.exact_kl(p_logprob_BTV=p, q_logprob_BTV=nothing)[0, 0]
    )(nothing)
    np.testing.assert_array_equal(value, 0.0)
    np.testing.assert_array_equal(gradient, 0.0)


# forward_kl, generalised_jsd, divergence


def directed(x_TV, y_TV, direction: str, beta: float = 0.5):
    return losses.divergence(
        p_logprob_BTV=jax.nn.log_softmax(x_TV)[None],
        q_logprob_BTV=jax.nn.log_softmax(y_TV)[None],
        direction=direction,
        jsd_beta=beta,
    )[0]


@pytest.mark.parametrize(
    ("direction", "beta", "value"),
    [
        ("reverse", 0.5, 0.218012),
        # 0.25 log(1/2) + 0.25 log(5/6) + 0.5 log(5/2) = -0.173287 - 0.045580 + 0.458145
        ("forward", 0.5, 0.239278),
        # m = (0.375, 0.275, 0.35): KL(q||m) = 0.053143, KL(p||m) = 0.058021, half of both
        ("jsd", 0.5, 0.055582),
        # m = (0.4375, 0.2875, 0.275): 0.25 * 0.124074 + 0.75 * 0.015843
        ("jsd", 0.25, 0.042901),
    ],
)
def test_divergences_by_hand(direction, beta, value):
    got = directed(jnp.log(jnp.array([P])), jnp.log(jnp.array([Q])), direction, beta)
    np.testing.assert_allclose(got, [value], rtol=1e-4)


def test_forward_kl_gradient_is_p_minus_q(logits):
    student, other = (jnp.asarray(x, jnp.float32) for x in logits)
    gradient = jax.grad(lambda x: jnp.sum(directed(x, other, "forward")))(student)
    np.testing.assert_allclose(gradient, jax.nn.softmax(student) - jax.nn.softmax(other), atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_gradient_by_finite_differences(logits, beta):
    with jax.enable_x64(True):
        student, other = map(jnp.asarray, logits)
        check_grads(lambda x: directed(x, other, "jsd", beta), (student,), order=1, modes=["rev"])


@pytest.mark.parametrize("direction", losses.DIRECTIONS)
def test_divergences_of_equal_distributions_and_of_impossible_ids(logits, direction):
    student, other = (jnp.asarray(x, jnp.float32) for x in logits)
    np.testing.assert_allclose(directed(student, student, direction), 0.0, atol=1e-6)
    wider = [jnp.pad(x, ((0, 0), (0, 3)), constant_values=-jnp.inf) for x in (student, other)]
    np.testing.assert_allclose(
        directed(*wider, direction), directed(student, other, direction), rtol=1e-5
    )
    to_teacher = jax.grad(lambda y: jnp.sum(directed(student, y, direction)))(other)
    np.testing.assert_array_equal(to_teacher, 0.0)  # the teacher is a constant
    gradient = jax.grad(lambda x: jnp.sum(directed(x, wider[1], direction)))(wider[0])
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[:, -3:], 0.0)


def test_jsd_tends_to_the_two_kls_at_its_ends(logits):
    """JSD_b / b -> KL(q || p) for b -> 0, JSD_b / (1 - b) -> KL(p || q) for b -> 1."""
    with jax.enable_x64(True):
        x, y = map(jnp.asarray, logits)
        np.testing.assert_allclose(
            directed(x, y, "jsd", 1e-5) / 1e-5, directed(x, y, "forward"), rtol=1e-3
        )
        np.testing.assert_allclose(
            directed(x, y, "jsd", 1 - 1e-5) / 1e-5, directed(x, y, "reverse"), rtol=1e-3
        )


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
    exact, exact_gradient = jax.value_and_grad(lambda x: jnp.sum(kl_of_logits(x, other)))(student)
    k1, k1_gradient = jax.value_and_grad(lambda x: expected_sampled_kl("k1", x, other))(student)
    k2_gradient = jax.grad(lambda x: expected_sampled_kl("k2", x, other))(student)
    k3 = expected_sampled_kl("k3", student, other)
    np.testing.assert_allclose([k1, k3], [exact, exact], rtol=1e-5)
    np.testing.assert_allclose(k1_gradient, 0.0, atol=1e-6)
    np.testing.assert_allclose(k2_gradient, exact_gradient, atol=1e-6)
    assert np.max(np.abs(exact_gradient)) > 0.1  # so the comparison says something


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


# token_weights

LENGTHS_3_1_0 = np.array([[0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)


@pytest.mark.parametrize(
    ("aggregation", "first", "second"),
    [
        ("token", 1 / 4, 1 / 4),  # 3 + 1 tokens
        ("sequence", 1 / 6, 1 / 2),  # 2 responses: 1 / (2*3), 1 / (2*1)
    ],
)
def test_token_weights_by_hand(aggregation, first, second):
    weight = losses.token_weights(LENGTHS_3_1_0, aggregation)
    expected = [[0, first, first, first], [0, 0, second, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    assert weight.dtype == jnp.float32


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_token_weights_invariances(aggregation):
    mask = np.random.default_rng(1).random((6, 9)) < 0.4
    weight = losses.token_weights(mask, aggregation)
    np.testing.assert_allclose(np.sum(weight), 1.0, rtol=1e-6)
    order = np.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_array_equal(losses.token_weights(mask[order], aggregation), weight[order])
    padded = losses.token_weights(np.pad(mask, ((0, 2), (0, 3))), aggregation)
    np.testing.assert_array_equal(padded, np.pad(weight, ((0, 2), (0, 3))))
    np.testing.assert_array_equal(losses.token_weights(np.zeros((2, 3), bool), aggregation), 0.0)


def test_sequence_weights_count_responses_equally():
    per_response = np.sum(losses.token_weights(LENGTHS_3_1_0, "sequence"), axis=1)
    np.testing.assert_allclose(per_response, [0.5, 0.5, 0.0], rtol=1e-6)


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
