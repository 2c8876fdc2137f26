"""Gradients of the layers added to a running sum in place: the sum is right, and is one buffer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import decoder
from opd_jax.models.remat import POLICIES
from tests.conftest import noisy_params, random_rows, tiny_config

pytestmark = pytest.mark.short
CONFIG = tiny_config(num_layers=3)
TOKENS, LENGTH = random_rows(CONFIG, 2, 16)


def loss(params, remat: str = "none", sums=None):
    hidden = decoder.hidden_states(params, CONFIG, TOKENS, LENGTH, remat=remat, sums=sums)
    return jnp.sum(jnp.sin(hidden.astype(jnp.float32)))


@pytest.fixture(scope="module")
def params():
    return noisy_params(CONFIG)


@pytest.fixture(scope="module")
def plain(params):
    return jax.jit(jax.grad(loss))(params)


@pytest.mark.slow
@pytest.mark.parametrize("remat", POLICIES)
def test_the_sum_begins_where_it_was_and_grows_by_the_gradient(params, plain, remat):
    start = jax.tree.map(lambda w: 3.0 + jnp.arange(w.size).reshape(w.shape) / w.size, params)
    own = {name: params[name] for name in ("embed", "norm")}

    def with_sums(own, sums):
        return 2.0 * loss(own | {"layers": params["layers"]}, remat, sums)

    rest, sums = jax.jit(jax.grad(with_sums, argnums=(0, 1)))(own, start["layers"])
    for got, grown, begun in zip(
        *map(jax.tree.leaves, (sums, plain["layers"], start["layers"])), strict=True
    ):
        np.testing.assert_allclose(got, begun + 2 * grown, rtol=1e-4, atol=2e-4)
    for got, wanted in zip(
        jax.tree.leaves(rest), jax.tree.leaves([plain["embed"], plain["norm"]]), strict=True
    ):
        np.testing.assert_allclose(got, 2 * wanted, rtol=1e-4, atol=2e-4)


def test_layers_compute_in_the_embeddings_dtype_and_sum_in_float32(params):
    own = jax.tree.map(lambda w: w.astype(jnp.bfloat16), {k: params[k] for k in ("embed", "norm")})
    zeros = jax.tree.map(jnp.zeros_like, params["layers"])
    halves = own | {"layers": params["layers"]}
    program = jax.make_jaxpr(lambda s: loss(halves, sums=s))(zeros)
    assert "bf16[2,16,32]" in str(program)
    sums = jax.eval_shape(jax.grad(lambda s: loss(halves, sums=s)), zeros)
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
