"""Supports against sorting, sets and sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.scoring import topk

pytestmark = pytest.mark.short

NEVER = -np.inf


@pytest.mark.parametrize("vocabulary", [70, 1001])
@pytest.mark.parametrize("k", [1, 3, 16, 40, 70])
def test_top_k_equals_a_stable_sort(k, vocabulary):
    generator = np.random.default_rng(k)
    values = np.round(generator.normal(size=(6, vocabulary)), 1).astype(np.float32) + 0.0  # ties
    values[1, 10:-2] = -1e30  # excluded ids come last
    values[2, 3:] = -np.inf
    values[3] = 0.0
    got, ids = jax.jit(topk.top_k, static_argnums=1)(values, k)
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(got, np.take_along_axis(values, order, axis=1))


@pytest.mark.parametrize("k", [16, 64])
def test_top_k_looks_at_the_vocabulary_once_for_its_maxima(k):
    jaxpr = jax.make_jaxpr(lambda x: topk.top_k(x, k))(jnp.zeros((2, 151_936))).jaxpr
    widths = [e.invars[0].aval.shape[-1] for e in jaxpr.eqns if e.primitive.name == "top_k"]
    assert len(widths) == 2
    assert max(widths) < 5_000


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("student", [[4, 1, 7], [0, 2, 3]]),
        ("teacher", [[7, 2, 4], [5, 6, 8]]),
        ("intersection", [[4, -1, 7], [-1, -1, -1]]),
        ("union", [[4, 1, 7, -1, 2, -1], [0, 2, 3, 5, 6, 8]]),
        ("symmetric_difference", [[-1, 1, -1, -1, 2, -1], [0, 2, 3, 5, 6, 8]]),
    ],
)
def test_combine_by_hand(name, expected):
    student, teacher = jnp.array([[4, 1, 7], [0, 2, 3]]), jnp.array([[7, 2, 4], [5, 6, 8]])
    np.testing.assert_array_equal(topk.combine(student, teacher, name), expected)


def test_the_table_names_every_support():
    student = teacher = jnp.zeros((1, 2), jnp.int32)
    for name in topk.SUPPORTS[1:]:
        assert topk.combine(student, teacher, name).shape[0] == 1


def test_gather_and_rest_by_hand():
    logprob = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))
    ids = jnp.array([[1, -1], [2, 0]])
    np.testing.assert_allclose(
        topk.gather(logprob, ids), [[np.log(0.3), NEVER], [np.log(0.8), np.log(0.1)]]
    )
    np.testing.assert_allclose(topk.rest(logprob, ids), np.log([0.7, 0.1]), rtol=1e-6)


def test_rest_keeps_the_digits_of_a_small_mass():
    """1 - 0.99999994 in float32 would be off by 6 %."""
    logprob = jnp.log(jnp.array([[1.0 - 3e-8, 1e-8, 2e-8]]))
    np.testing.assert_allclose(topk.rest(logprob, jnp.array([[0]])), [np.log(3e-8)], rtol=1e-6)


def test_rest_of_nothing_is_minus_infinity_without_a_gradient():
    x = jnp.array([[0.3, -0.7, 1.1]])
    ids = jnp.array([[2, 0, 1]])

    def everything(x):
        return jnp.exp(topk.rest(jax.nn.log_softmax(x), ids))[0]

    value, gradient = jax.jit(jax.value_and_grad(everything))(x)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)
    assert np.isneginf(topk.rest(jax.nn.log_softmax(x), ids))[0]


def test_rest_gradient_is_that_of_the_complement():
    x, ids = jnp.array([[0.3, -0.7, 1.1, 0.0]]), jnp.array([[2, -1]])
    gradient = jax.jit(jax.grad(lambda x: topk.rest(jax.nn.log_softmax(x), ids)[0]))(x)
    p = np.exp(np.asarray(x[0], np.float64))
    p /= p.sum()
    outside = p * np.array([1, 1, 0, 1]) / (1 - p[2])  # d log(1 - p_2) = p(v | outside) - p(v)
    np.testing.assert_allclose(gradient[0], outside - p, atol=1e-6)
