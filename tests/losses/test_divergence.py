"""Divergences over a vocabulary and over supports, against hand arithmetic and closed-form gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from opd_jax import losses
from tests.losses.conftest import P, Q, log_softmax, row
from tests.support.lanes import slow

SOME_DIRECTIONS = [
    "reverse",
    "jsd",
    *slow(*(d for d in losses.DIRECTIONS if d not in ("reverse", "jsd"))),
]
pytestmark = [pytest.mark.short, pytest.mark.usefixtures("strict_dtypes")]


# exact_kl


@jax.jit
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
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(kl_of_logits(x, other))))(cut)
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


SHARES = {"skewed_reverse": 0.1, "skewed_forward": 0.1, "mixture": 0.25}


@partial(jax.jit, static_argnames=("direction", "beta"))
def directed(x_TV, y_TV, direction: str, beta: float = 0.5):
    return losses.divergence(
        p_logprob_BTV=jax.nn.log_softmax(x_TV)[None],
        q_logprob_BTV=jax.nn.log_softmax(y_TV)[None],
        direction=direction,
        form="raw",
        share=SHARES.get(direction, beta),
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
        # m = 0.9 q + 0.1 p = (0.275, 0.255, 0.47): 0.298919 + 0.048756 - 0.170883
        ("skewed_reverse", 0.5, 0.176791),
        # m = 0.9 p + 0.1 q = (0.475, 0.295, 0.23): -0.160463 - 0.041379 + 0.388264
        ("skewed_forward", 0.5, 0.186422),
        ("mixture", 0.5, 0.233962),  # 0.25 * 0.218012 + 0.75 * 0.239278
    ],
)
def test_divergences_by_hand(direction, beta, value):
    got = directed(jnp.log(jnp.array([P])), jnp.log(jnp.array([Q])), direction, beta)
    np.testing.assert_allclose(got, [value], rtol=1e-4)


def test_forward_kl_gradient_is_p_minus_q(logits):
    student, other = (jnp.asarray(x, jnp.float32) for x in logits)
    gradient = jax.grad(lambda x: jnp.sum(directed(x, other, "forward")))(student)
    np.testing.assert_allclose(gradient, jax.nn.softmax(student) - jax.nn.softmax(other), atol=1e-6)


@pytest.mark.parametrize("direction", ["skewed_reverse", "skewed_forward"])
def test_skewed_gradients_by_finite_differences_and_their_limits(logits, direction):
    with jax.enable_x64(True):
        student, other = map(jnp.asarray, logits)
        check_grads(lambda x: directed(x, other, direction), (student,), order=1, modes=["rev"])
        kl = directed(student, other, direction.removeprefix("skewed_"))
        pair = {
            "p_logprob_BTV": jax.nn.log_softmax(student)[None],
            "q_logprob_BTV": jax.nn.log_softmax(other)[None],
        }
        got = losses.divergence(**pair, direction=direction, form="raw", share=1e-9)[0]
        np.testing.assert_allclose(got, kl, rtol=1e-6)  # a -> 0 is the plain one


def test_skewed_reverse_kl_is_bounded_where_reverse_kl_is_not():
    """The teacher gives the student's only id no mass: -log a = -log 0.1."""
    certain, other = row([[0.0, -np.inf]]), row([[-np.inf, 0.0]])
    got = losses.divergence(
        p_logprob_BTV=certain,
        q_logprob_BTV=other,
        direction="skewed_reverse",
        form="raw",
        share=0.1,
    )
    np.testing.assert_allclose(got, [[2.302585]], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_gradient_by_finite_differences(logits, beta):
    with jax.enable_x64(True):
        student, other = map(jnp.asarray, logits)
        check_grads(lambda x: directed(x, other, "jsd", beta), (student,), order=1, modes=["rev"])


@pytest.mark.parametrize("direction", SOME_DIRECTIONS)
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


@pytest.mark.parametrize(("share", "value"), [(0.25, 0.20034), (1.0, 0.22314), (0.0, 0.19274)])
def test_mixed_kl_by_hand(share, value):
    """p = (.5, .5), q = (.8, .2): KL(p||q) = .22314, KL(q||p) = .19274, mixed .25 to .75: .20034."""
    got = losses.mixed_kl(
        p_logprob_BTV=row(np.log([[0.5, 0.5]])),
        q_logprob_BTV=row(np.log([[0.8, 0.2]])),
        share=share,
    )
    np.testing.assert_allclose(got, [[value]], atol=5e-6)


def test_the_ends_of_the_mixture_are_the_two_directions_to_the_bit(logits):
    """At 1 it is the reverse KL even where the forward KL is infinite."""
    student, other = (jnp.asarray(x, jnp.float32) for x in logits)
    certain = jnp.asarray(np.tile(np.where(np.arange(7) == 2, 0.0, -np.inf), (4, 1)), jnp.float32)
    pair = {"form": "raw", "q_logprob_BTV": jax.nn.log_softmax(other)[None]}
    for p, share, direction in [
        (student, 1.0, "reverse"), (student, 0.0, "forward"), (certain, 1.0, "reverse"),
    ]:  # fmt: skip

        def value(p, pair=pair, **kind):
            return jnp.sum(losses.divergence(p_logprob_BTV=p, **pair, **kind))

        p = jax.nn.log_softmax(p)[None]
        got = jax.value_and_grad(value)(p, direction="mixture", share=share)
        want = jax.value_and_grad(value)(p, direction=direction)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
        assert np.isfinite(got[0])


def test_mixture_gradient_in_closed_form(logits):
    """share p (log p - log q - KL) + (1 - share) (p - q), in the student's logits."""
    with jax.enable_x64(True):
        x, y = map(jnp.asarray, logits)
        log_p, log_q = log_softmax(logits[0]), log_softmax(logits[1])
        kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1, keepdims=True)
        wanted = 0.25 * np.exp(log_p) * (log_p - log_q - kl) + 0.75 * (
            np.exp(log_p) - np.exp(log_q)
        )
        got = jax.grad(lambda x: jnp.sum(directed(x, y, "mixture")))(x)
        np.testing.assert_allclose(got, wanted, atol=1e-12)


# supports and forms: the first two of three ids, a third place holds none

LOG_P, LOG_Q = jnp.log(jnp.asarray(P, jnp.float32)), jnp.log(jnp.asarray(Q, jnp.float32))


@partial(jax.jit, static_argnames=("direction", "form"))
def on_first_two(x, y, direction: str, form: str):
    """D over ids 0 and 1 of student logits x and teacher logits y. Scalar."""
    p, q = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
    nothing = jnp.full(1, -jnp.inf)
    return losses.divergence(
        p_logprob_BTV=jnp.concatenate([p[:2], nothing])[None, None],
        q_logprob_BTV=jnp.concatenate([q[:2], nothing])[None, None],
        p_rest_BT=p[2][None, None],
        q_rest_BT=q[2][None, None],
        direction=direction,
        form=form,
        share=SHARES.get(direction, 0.5),
    )[0, 0]


@pytest.mark.parametrize(
    ("direction", "form", "value"),
    [
        ("reverse", "raw", 0.401270),  # 0.5 log 2 + 0.3 log 1.2
        ("reverse", "stop_gradient", 0.401270),
        ("reverse", "renormalised", 0.031584),  # 5/8 log(5/4) + 3/8 log(3/4)
        ("reverse", "tail", 0.218012),  # one id is outside: the whole divergence
        ("forward", "raw", -0.218867),  # 0.25 log(1/2) + 0.25 log(5/6)
        ("forward", "renormalised", 0.032269),  # 1/2 log(4/5) + 1/2 log(4/3)
        ("forward", "tail", 0.239278),
        ("jsd", "raw", 0.022375),  # half of -0.125194 + 0.169944
        ("jsd", "tail", 0.055582),
        ("skewed_reverse", "tail", 0.176791),
        ("skewed_forward", "tail", 0.186422),
        ("mixture", "raw", -0.063833),  # 0.25 * 0.401270 - 0.75 * 0.218867
        ("mixture", "tail", 0.233962),  # 0.25 * 0.218012 + 0.75 * 0.239278
        # 1/2 log(1/2 / 0.5) + 1/2 log(1/2 / 0.3): q is renormalised, p is not
        ("forward", "teacher_renormalised", 0.255413),
    ],
)
def test_forms_by_hand(direction, form, value):
    np.testing.assert_allclose(on_first_two(LOG_P, LOG_Q, direction, form), value, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "gradient"),
    [
        # c_v - p_v sum(c): c = p (log p - log q + 1) = (0.846574, 0.354696)
        ("raw", [0.245939, -0.005685, -0.240254]),
        # without the + 1: c = (0.346574, 0.054696)
        ("stop_gradient", [0.145939, -0.065685, -0.080254]),
        # p^ (log p^/q^ - KL) within, nothing outside
        ("renormalised", [0.119725, -0.119725, 0.0]),
    ],
)
def test_gradients_of_forms_by_hand(form, gradient):
    got = jax.grad(lambda x: on_first_two(x, LOG_Q, "reverse", form))(LOG_P)
    np.testing.assert_allclose(got, gradient, atol=2e-6)


@pytest.mark.parametrize("form", [*losses.FORMS[:3], losses.FORMS[4]])
@pytest.mark.parametrize("direction", SOME_DIRECTIONS)
def test_gradients_of_forms_by_finite_differences(logits, direction, form):
    with jax.enable_x64(True):
        x, y = (jnp.asarray(z[0, :3]) for z in logits)
        check_grads(lambda x: on_first_two(x, y, direction, form), (x,), order=1, modes=["rev"])
        to_teacher = jax.grad(lambda y: on_first_two(x, y, direction, form))(y)
        np.testing.assert_array_equal(to_teacher, 0.0)


@pytest.mark.parametrize("form", ["renormalised", "stop_gradient"])
@pytest.mark.parametrize("direction", losses.DIRECTIONS)
def test_identical_models_have_nothing_to_teach(direction, form):
    if form == "stop_gradient" and direction != "reverse":
        return  # refused by the config: there is no such loss
    value, gradient = jax.value_and_grad(lambda x: on_first_two(x, LOG_P, direction, form))(LOG_P)
    np.testing.assert_allclose(value, 0.0, atol=1e-7)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


def test_the_raw_form_pushes_identical_models_apart():
    """The + 1 that does not cancel: c = p on the support, c_v - p_v sum(c) = p (1 - 0.8), -0.2 * 0.8."""
    gradient = jax.grad(lambda x: on_first_two(x, LOG_P, "reverse", "raw"))(LOG_P)
    np.testing.assert_allclose(gradient, [0.1, 0.06, -0.16], atol=1e-6)


@pytest.mark.parametrize("form", losses.FORMS)
@pytest.mark.parametrize("direction", SOME_DIRECTIONS)
def test_over_the_whole_vocabulary_all_forms_agree(logits, direction, form):
    if form == "stop_gradient" and direction != "reverse":
        return
    x, y = (jnp.asarray(z, jnp.float32) for z in logits)
    empty = jnp.full((1, 4), -jnp.inf)

    def total(x, form):
        return jnp.sum(
            losses.divergence(
                p_logprob_BTV=jax.nn.log_softmax(x)[None],
                q_logprob_BTV=jax.nn.log_softmax(y)[None],
                p_rest_BT=empty, q_rest_BT=empty, direction=direction, form=form,
                share=SHARES.get(direction, 0.5),
            )
        )  # fmt: skip

    graded = jax.jit(jax.value_and_grad(total), static_argnums=1)
    value, gradient = graded(x, form)
    whole, whole_gradient = graded(x, "raw")
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    np.testing.assert_allclose(gradient, whole_gradient, atol=1e-6)


@pytest.mark.parametrize("form", losses.FORMS)
@pytest.mark.parametrize("direction", SOME_DIRECTIONS)
def test_an_empty_support_is_zero_without_a_gradient(direction, form):
    """An intersection of disjoint sets; its rest is everything, the same for both."""
    nothing = jnp.full((1, 1, 2), -jnp.inf)

    def value(p):
        return losses.divergence(
            p_logprob_BTV=p, q_logprob_BTV=nothing, p_rest_BT=jnp.zeros((1, 1)),
            q_rest_BT=jnp.zeros((1, 1)), direction=direction, form=form,
            share=SHARES.get(direction, 0.5),
        )[0, 0]  # fmt: skip

    got, gradient = jax.jit(jax.value_and_grad(value))(nothing)
    np.testing.assert_allclose(got, 0.0, atol=1e-7)
    np.testing.assert_array_equal(gradient, 0.0)


def test_the_teacher_alone_renormalised_by_hand():
    """EOPD: q^ of (.6, .3), p (.5, .4) as it is; the difference to `renormalised` is -log p(S)."""
    p, q = row(np.log([[0.5, 0.4]])), row(np.log([[0.6, 0.3]]))
    got = {
        form: float(
            losses.divergence(p_logprob_BTV=p, q_logprob_BTV=q, direction="forward", form=form)[
                0, 0
            ]
        )
        for form in ("teacher_renormalised", "renormalised", "raw")
    }
    np.testing.assert_allclose(list(got.values()), [0.13101, 0.02565, 0.02309], atol=5e-6)
    np.testing.assert_allclose(
        got["teacher_renormalised"] - got["renormalised"], 0.10536, atol=5e-6
    )


def test_the_teacher_alone_renormalised_has_the_gradient_p_minus_q():
    """In the student's logits p - q^ within the support and p outside: -sum q^ grad log p."""
    got = jax.grad(lambda x: on_first_two(x, LOG_Q, "forward", "teacher_renormalised"))(LOG_P)
    np.testing.assert_allclose(got, P - np.array([0.5, 0.5, 0.0]), atol=1e-6)


def test_renormalised_intersection_with_a_stop_gradient_is_the_same_thing(logits):
    """2605.11182, "intersect_sg_norm": sum p~ (sg[log p~] - log q~) has value and gradient of the KL."""
    x, y = (jnp.asarray(z[0, :3], jnp.float32) for z in logits)

    def published(x):
        p = losses.renormalised(jax.nn.log_softmax(x)[None, None, :2])
        q = losses.renormalised(jax.nn.log_softmax(y)[None, None, :2])
        return losses.stop_gradient_reverse_kl(p_logprob_BTV=p, q_logprob_BTV=q)[0, 0]

    got, gradient = jax.value_and_grad(published)(x)
    want, wanted = jax.value_and_grad(lambda x: on_first_two(x, y, "reverse", "renormalised"))(x)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)
