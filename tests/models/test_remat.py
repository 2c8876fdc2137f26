"""What a layer keeps for its backward pass: the gradient stays, what is computed twice changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.interpreters import partial_eval

from opd_jax.models import attention, decoder
from opd_jax.models.remat import POLICIES
from tests.conftest import noisy_params, random_rows, tiny_config

CONFIG = tiny_config(num_layers=2)


def make_gradient(remat: str):
    tokens, length = random_rows(CONFIG, 2, 16)

    def loss(params):
        hidden = decoder.hidden_states(params, CONFIG, tokens, length, remat=remat)
        return jnp.sum(jnp.sin(hidden.astype(jnp.float32)))

    return jax.grad(loss)


def count(jaxpr, name: str) -> int:
    """Equations of this primitive, in all inner programs too; the body of a scan counts once."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        total += sum(count(one, name) for one in inner if hasattr(one, "eqns"))
    return total


def program(remat: str, params):
    """The gradient's program without what nothing uses, as the compiler runs it."""
    jaxpr = jax.make_jaxpr(make_gradient(remat))(params).jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


@pytest.fixture(scope="module")
def kept():
    params = noisy_params(CONFIG)
    return params, jax.jit(make_gradient("none"))(params)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [name for name in POLICIES if name != "none"])
def test_the_gradient_stays(kept, remat):
    params, wanted = kept
    got = jax.jit(make_gradient(remat))(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# A layer has 7 products with weights and, in the plain form, 2 of attention; the backward pass has two
# for each, and one for the logits of attention, which are not kept. `full` makes all again but the last,
# whose result nothing needs.
@pytest.mark.parametrize(
    ("remat", "products"),
    [("none", 28), ("attention", 28 + 8), ("dots", 28 + 2), ("full", 28 + 8)],
)
def test_products_of_the_plain_form(kept, remat, products):
    jaxpr = program(remat, kept[0])
    assert count(jaxpr, "dot_general") == products


# Fused, attention is one primitive forward (and one backward) in place of those products.
@pytest.mark.parametrize(
    ("remat", "products", "attentions"),
    [("none", 21, 1), ("attention", 21 + 6, 1), ("dots", 21, 1), ("full", 21 + 6, 2)],
)
def test_products_of_the_fused_form(kept, monkeypatch, remat, products, attentions):
    monkeypatch.setattr(attention, "fused", lambda dtype: True)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_300)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), kept[0])
    jaxpr = program(remat, params)
    assert count(jaxpr, "dot_general") == products
    assert count(jaxpr, "dot_product_attention_fwd_wrapper") == attentions
    assert count(jaxpr, "dot_product_attention_bwd_wrapper") == 1
