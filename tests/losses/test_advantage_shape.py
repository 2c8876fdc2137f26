"""Shapes of the teacher's advantage against hand arithmetic, and their expected gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses
from opd_jax.losses import advantage_shape as shapes
from tests.losses.conftest import P, Q, log_softmax, row

pytestmark = [pytest.mark.short, pytest.mark.usefixtures("strict_dtypes")]
shaped = jax.jit(losses.shaped, static_argnames=("shape", "value"))
NUMBERS = {"power": 2.0, "floor": 0.2, "skew": 0.1, "unlikely": 0.3}


def of(shape: str, q, p, value: float | None = None, kl=None) -> np.ndarray:
    """The shape of tokens with these probabilities of teacher and student; [T]."""
    got = shaped(
        teacher_logprob_BT=row(np.log(np.atleast_1d(q))),
        student_logprob_BT=row(np.log(np.atleast_1d(p))),
        shape=shape,
        value=NUMBERS.get(shape, 0.0) if value is None else value,
        reverse_kl_BT=None if kl is None else row(np.atleast_1d(kl)),
    )
    assert got.dtype == jnp.float32
    return np.asarray(got)[0]


@pytest.mark.parametrize(
    ("shape", "q", "p", "expected"),
    [
        ("log_ratio", 0.5, 0.25, 0.693147),
        ("power", 0.5, 0.2, 0.21),  # .25 - .04
        ("power", 0.1, 0.4, -0.15),  # .01 - .16
        ("soft_log", np.exp(-3.5), np.exp(-0.5), -1.386294),  # l = -3: -ln 4
        ("soft_log", np.exp(-0.5), np.exp(-3.5), 1.386294),
        ("floor", np.exp(-3.5), np.exp(-0.5), -1.386294),  # ln(.2 / .8)
        ("floor", np.exp(-1.5), np.exp(-0.5), -1.0),
        ("floor", np.exp(-0.5), np.exp(-3.5), 3.0),  # the positive side has no bound
        ("f_forward", 0.6, 0.2, 3.0),  # u = 3
        ("f_jsd", 0.6, 0.2, 0.346574),  # 1/2 ln 2
        ("f_reverse", 0.6, 0.2, 0.098612),  # ln 3 - 1
        ("f_forward", 0.4, 0.4, 1.0),  # u = 1
        ("f_jsd", 0.4, 0.4, 0.0),
        ("f_reverse", 0.4, 0.4, -1.0),
        ("f_total_variation", 0.6, 0.2, 0.5),
        ("f_total_variation", 0.2, 0.6, -0.5),
        ("f_total_variation", 0.4, 0.4, 0.0),
        ("unlikely", 0.9, 0.29, -1.0),
        ("unlikely", 0.9, 0.31, 0.0),
    ],
)
def test_shapes_by_hand(shape, q, p, expected):
    np.testing.assert_allclose(of(shape, q, p), [expected], rtol=1e-5, atol=1e-6)


def test_baseline_by_hand():
    # l = -.3 and KL = .2: -.1
    got = of("baseline", np.exp(-0.8), np.exp(-0.5), kl=0.2)
    np.testing.assert_allclose(got, [-0.1], rtol=1e-5)


def test_a_token_that_the_teacher_excludes():
    """Q = 0: the bounded shapes have their bounds, by hand."""
    bounds = {"power": -0.25, "floor": np.log(0.25), "skew": -2.302585, "f_forward": 0.0,
              "f_jsd": -0.346574, "f_total_variation": -0.5, "unlikely": 0.0}  # fmt: skip
    with np.errstate(divide="ignore"):
        for shape, expected in bounds.items():
            np.testing.assert_allclose(of(shape, 0.0, 0.5), [expected], rtol=1e-5, err_msg=shape)


@pytest.mark.parametrize("shape", losses.ADVANTAGE_SHAPES)
def test_shapes_of_extreme_log_probs_are_finite_and_constant(shape):
    extreme = jnp.asarray([[0.0, -1e30, -1e4, -1e-8]])

    def values(teacher, student):
        return shaped(
            teacher_logprob_BT=teacher, student_logprob_BT=student, shape=shape,
            value=NUMBERS.get(shape, 0.0), reverse_kl_BT=jnp.ones_like(student),
        )  # fmt: skip

    for student in (extreme, extreme[:, ::-1]):
        assert np.isfinite(values(extreme, student)).all()
    graded = jax.jit(jax.grad(lambda *x: jnp.sum(values(*x)), argnums=(0, 1)))
    gradients = graded(extreme, extreme[:, ::-1])
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


def test_equal_models_have_no_advantage():
    """Apart from the constant of two of the f, and of the control, which does not read the teacher."""
    constant = {"f_reverse": -1.0, "f_forward": 1.0}
    for shape in losses.ADVANTAGE_SHAPES:
        if shape != "unlikely":
            got = of(shape, P, P, kl=np.zeros(3))
            np.testing.assert_allclose(got, constant.get(shape, 0.0), atol=1e-6, err_msg=shape)


def test_numbers_at_which_a_shape_is_the_log_ratio_bit_for_bit():
    plain = of("log_ratio", Q, P)
    for shape, value in (("floor", 1e-30), ("skew", 1e-30), ("log_ratio", 0.0)):
        np.testing.assert_array_equal(of(shape, Q, P, value), plain, err_msg=shape)
    np.testing.assert_array_equal(of("baseline", Q, P, kl=np.zeros(3)), plain)


def test_the_limits_of_power_and_of_soft_log():
    with jax.enable_x64(True):
        log_q, log_p = (jnp.log(jnp.asarray(x))[None] for x in (Q, P))
        power = shapes.power_difference(
            teacher_logprob_BT=log_q, student_logprob_BT=log_p, power=1e-6
        )
        np.testing.assert_allclose(power / 1e-6, log_q - log_p, rtol=1e-5)
        small = 1e-6 * (log_q - log_p)
        np.testing.assert_allclose(shapes.soft_log(log_ratio_BT=small), small, rtol=1e-5)


# Expected gradients over all tokens that could have been sampled, in float64.


def expected_gradient(advantage_V: np.ndarray, p_V: np.ndarray) -> np.ndarray:
    """E_p[A grad log p(y)] in the logits: p (A - E_p[A])."""
    return p_V * (advantage_V - np.sum(p_V * advantage_V))


def pair(logits) -> tuple[np.ndarray, np.ndarray]:
    return log_softmax(logits[0][0]), log_softmax(logits[1][0])


@pytest.mark.parametrize(
    ("shape", "f"),
    [
        ("log_ratio", lambda u: -jnp.log(u)),
        ("f_reverse", lambda u: -jnp.log(u)),
        ("f_forward", lambda u: u * jnp.log(u)),
        ("f_jsd", lambda u: 0.5 * (u * jnp.log(u) - (1 + u) * jnp.log((1 + u) / 2))),
        ("f_total_variation", lambda u: 0.5 * jnp.abs(u - 1)),
    ],
)
def test_the_expected_gradient_is_minus_that_of_the_divergence(shape, f, logits):
    with jax.enable_x64(True):
        log_p, log_q = pair(logits)

        def divergence(x):
            p = jax.nn.softmax(x)
            return jnp.sum(p * f(jnp.exp(jnp.asarray(log_q)) / p))

        gradient = jax.jit(jax.grad(divergence))(jnp.asarray(log_p))
        got = losses.shaped(
            teacher_logprob_BT=jnp.asarray(log_q)[None], student_logprob_BT=jnp.asarray(log_p)[None],
            shape=shape,
        )  # fmt: skip
        assert got.dtype == jnp.float64
        expected = expected_gradient(np.asarray(got)[0], np.exp(log_p))
        np.testing.assert_allclose(expected, -np.asarray(gradient), rtol=1e-9, atol=1e-12)


def test_a_reward_of_minus_f_is_biased_but_for_reverse_kl(logits):
    """What OPD+ corrects: without the term u f'(u) the expected gradient is another one."""
    log_p, log_q = pair(logits)
    p, u = np.exp(log_p), np.exp(log_q - log_p)
    wrong = expected_gradient(-u * np.log(u), p)
    right = expected_gradient(u, p)
    assert np.abs(wrong - right).max() > 0.01


def test_the_baseline_has_mean_zero_and_leaves_the_expected_gradient(logits):
    with jax.enable_x64(True):
        log_p, log_q = pair(logits)
        p = np.exp(log_p)
        kl = np.sum(p * (log_p - log_q))
        got = losses.shaped(
            teacher_logprob_BT=jnp.asarray(log_q)[None], student_logprob_BT=jnp.asarray(log_p)[None],
            shape="baseline", reverse_kl_BT=jnp.full((1, len(p)), kl),
        )[0]  # fmt: skip
        np.testing.assert_allclose(np.sum(p * np.asarray(got)), 0.0, atol=1e-15)
        plain = expected_gradient(log_q - log_p, p)
        np.testing.assert_allclose(expected_gradient(np.asarray(got), p), plain, atol=1e-15)


def test_the_mean_of_the_skewed_sample_is_minus_the_skewed_divergence(logits):
    log_p, log_q = pair(logits)
    got = shaped(
        teacher_logprob_BT=row(log_q), student_logprob_BT=row(log_p), shape="skew", value=0.1
    )[0]
    kl = losses.skewed_reverse_kl(p_logprob_BTV=row([log_p]), q_logprob_BTV=row([log_q]), skew=0.1)
    np.testing.assert_allclose(np.sum(np.exp(log_p) * np.asarray(got)), -kl[0, 0], rtol=1e-5)
    assert np.asarray(got).min() >= np.log(0.1)


# extrapolated


@pytest.mark.parametrize(
    ("p", "q", "reference", "extrapolation", "expected"),
    [
        (-1.0, -0.5, -1.2, 1.25, 0.675),  # .5 + .25 * .7
        (-2.0, -1.5, -2.2, 1.5, 0.85),
        (-1.0, -1.2, -0.8, 1.5, -0.4),
        (-1.0, -0.5, -1.2, 0.0, -0.2),  # the reference is the teacher
    ],
)
def test_extrapolated_by_hand(p, q, reference, extrapolation, expected):
    teacher = losses.extrapolated(
        teacher_logprob_BT=row([q]), reference_logprob_BT=row([reference]),
        extrapolation=extrapolation,
    )  # fmt: skip
    got = losses.opd_advantage(teacher_logprob_BT=teacher, student_logprob_BT=row([p]))
    np.testing.assert_allclose(got, [[expected]], rtol=1e-5)


def test_extrapolation_by_one_is_the_teacher_bit_for_bit_and_a_constant():
    teacher, reference = row(np.log(Q)), row(np.log(P))

    def moved(*models):
        named = dict(zip(("teacher_logprob_BT", "reference_logprob_BT"), models, strict=True))
        return losses.extrapolated(**named, extrapolation=1.0)

    np.testing.assert_array_equal(moved(teacher, reference), teacher)
    for gradient in jax.grad(lambda *x: jnp.sum(moved(*x)), argnums=(0, 1))(teacher, reference):
        np.testing.assert_array_equal(gradient, 0.0)


def test_the_extrapolated_fixed_point_has_no_expected_gradient(logits):
    """At p = softmax((1 - lambda) log ref + lambda log q) the advantage is the same for every token."""
    with jax.enable_x64(True):
        log_ref, log_q = pair(logits)
        log_p = log_softmax(-0.25 * log_ref + 1.25 * log_q)
        teacher = losses.extrapolated(
            teacher_logprob_BT=jnp.asarray(log_q)[None],
            reference_logprob_BT=jnp.asarray(log_ref)[None], extrapolation=1.25,
        )  # fmt: skip
        advantage = np.asarray(teacher)[0] - log_p
        np.testing.assert_allclose(expected_gradient(advantage, np.exp(log_p)), 0.0, atol=1e-15)


# evidence_weight


def weight(delta, group, *, clip=0.2, share=0.5, **kind) -> np.ndarray:
    """The weight of tokens whose teacher's log-ratio is `delta`, one row per advantage in `group`."""
    delta = np.broadcast_to(np.asarray(delta, np.float32), (len(group), np.size(delta)))
    return np.asarray(
        losses.evidence_weight(
            teacher_logprob_BT=jnp.asarray(delta - 3.0), student_logprob_BT=jnp.full_like(delta, -3.0),
            group_B=jnp.asarray(group, jnp.float32), clip=clip, share=share, **kind,
        )
    )  # fmt: skip


def test_evidence_weight_by_hand():
    group = np.array([1.0, -1.0, 0.0])
    got = group[:, None] * weight([0.5], group)
    # A = 1: exp(.5) -> 1.2, half of it 1.1; A = -1: exp(-.5) = .6065 -> .8 -> .9; A = 0 stays 0
    np.testing.assert_allclose(got, [[1.1], [-0.9], [0.0]], rtol=1e-6)
    inside = weight([0.1, 0.0], [2.0], share=1.0)  # no clip: e^.1, and 1 where the models agree
    np.testing.assert_allclose(inside, [[1.105171, 1.0]], rtol=1e-5)


def test_evidence_turned_round_by_hand():
    group = np.array([1.0, -1.0, 0.0])
    np.testing.assert_allclose(weight([0.5], group, away=True), [[0.9], [1.1], [1.0]], rtol=1e-6)
    only = weight([0.5], group, away=True, correct_only=True)
    np.testing.assert_allclose(only, [[0.9], [1.0], [1.0]], rtol=1e-6)


def test_no_share_is_the_group_advantage_bit_for_bit():
    for group in ([0.7, -1.3], [0.0, 0.0]):
        got = weight([0.5, -9.0, 1e30], group, share=0.0)
        np.testing.assert_array_equal(got, np.ones((2, 3)))


def test_evidence_weight_keeps_the_sign_and_is_bounded_and_constant():
    delta = [1e30, -1e30, 80.0, 0.0]
    for away in (False, True):
        got = weight(delta, [3.0, -3.0], share=1.0, clip=0.9, away=away)
        assert np.isfinite(got).all()
        assert (got > 0).all()
        assert (np.abs(got - 1.0) <= 0.9 + 1e-6).all()

    def total(teacher, student, group):
        return jnp.sum(
            losses.evidence_weight(
                teacher_logprob_BT=teacher, student_logprob_BT=student, group_B=group,
                clip=0.2, share=0.5,
            )
        )  # fmt: skip

    arguments = row(np.log(Q)), row(np.log(P)), jnp.ones(1)
    for gradient in jax.grad(total, argnums=(0, 1, 2))(*arguments):
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize(
    ("step", "expected"), [(1, 0.5), (2, 0.49), (26, 0.25), (50, 0.01), (51, 0.0), (1000, 0.0)]
)
def test_the_share_falls_linearly(step, expected):
    np.testing.assert_allclose(losses.share_at(step, share=0.5, steps=50), expected, atol=1e-12)
    assert losses.share_at(step, share=0.5, steps=0) == 0.5
