"""Causal attention in blocks of queries, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import attention
from tests.support.lanes import slow

pytestmark = pytest.mark.short


def inputs(length: int, *, heads: int = 4, kv_heads: int = 2, size: int = 8, dtype=np.float32):
    generator = np.random.default_rng(length)
    shapes = [(2, length, count, size) for count in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes]


def defined(query_BTNH, key_BTKH, value_BTKH) -> np.ndarray:
    """softmax(Q K^T / sqrt(H)) V over the positions up to each query, a query at a time, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query_BTNH, key_BTKH, value_BTKH))
    out = np.zeros_like(query)
    group = query.shape[2] // key.shape[2]
    for row, position, head in np.ndindex(query.shape[:3]):
        keys, values = (x[row, : position + 1, head // group] for x in (key, value))
        weight = np.exp(keys @ query[row, position, head] / np.sqrt(query.shape[3]))
        out[row, position, head] = weight @ values / weight.sum()
    return out


def test_two_positions_by_hand():
    # The second query sees logits 2 * 1 / 1 and 2 * 0: weights e^2 and 1 on the values 3 and 5.
    query, key, value = (
        jnp.array(x, jnp.float32).reshape(1, 2, 1, 1) for x in ([7, 2], [1, 0], [3, 5])
    )
    e2 = np.e**2
    np.testing.assert_allclose(
        attention.blocked(query, key, value).ravel(), [3, (3 * e2 + 5) / (e2 + 1)], rtol=1e-6
    )


LENGTHS = [1, 47, 97, *slow(2, 48, 95, 96, 400, 401)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), *slow((2, 2), (3, 1))])
def test_it_is_causal_attention(length, heads, kv_heads):
    given = inputs(length, heads=heads, kv_heads=kv_heads)
    np.testing.assert_allclose(
        jax.jit(attention.blocked)(*given), defined(*given), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_its_gradient_is_that_of_the_definition(length):
    """The definition is differentiated by JAX, whose own attention is another implementation."""
    given = inputs(length)
    weight = jnp.sin(jnp.arange(given[0].size)).reshape(given[0].shape)

    def loss(function):
        return lambda *given: jnp.sum(weight * function(*given))

    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")

    gradients = jax.jit(jax.grad(loss(attention.blocked), (0, 1, 2)))(*given)
    wanted_gradients = jax.jit(jax.grad(loss(plain), (0, 1, 2)))(*given)
    for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
        assert gradient.dtype == wanted.dtype
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_what_follows_a_position_does_not_change_it_by_a_bit():
    query, key, value = inputs(97)
    changed = [x.at[:, 60:].set(1e4) for x in (query, key, value)]
    out, other = (jax.jit(attention.blocked)(*x) for x in ((query, key, value), changed))
    np.testing.assert_array_equal(out[:, :60], other[:, :60])


def total(*given: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(attention.blocked(*given)))


def test_bfloat16_sums_in_float32():
    given = inputs(97, dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*given).jaxpr
    products = [e.outvars[0].aval.dtype for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert products == [jnp.float32] * (2 * 2 + 5 * 2)  # two blocks, forward and backward
    gradient_of = jax.jit(jax.grad(total, (0, 1, 2)))
    gradients = gradient_of(*given)
    exact = gradient_of(*(x.astype(jnp.float32) for x in given))
    for gradient, wanted in zip(gradients, exact, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert jnp.abs(gradient - wanted).max() < 0.02 * jnp.abs(wanted).max()


def test_no_array_of_all_pairs_of_positions():
    given = inputs(480)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *x: jnp.sum(attention.blocked(*x)), (0, 1, 2)))(*given)
    largest = max(v.aval.size for equation in jaxpr.jaxpr.eqns for v in equation.outvars)
    assert largest == 2 * 4 * 480 * 60  # rows, heads, keys of the last block, its queries
