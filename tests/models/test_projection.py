"""A product with weights: the value and the gradients of x @ kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import decoder
from opd_jax.models.projection import project
from tests.conftest import noisy_params, random_rows, tiny_config

pytestmark = pytest.mark.short


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_value_and_gradients_are_those_of_the_product(inputs, outputs, dtype, rtol):
    generator = np.random.default_rng(inputs)
    x, kernel, weight = (
        jnp.asarray(generator.normal(size=size), dtype)
        for size in ((2, 7, inputs), (inputs, outputs), (2, 7, outputs))
    )
    wanted = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    value, pull = jax.vjp(project, x, kernel)
    np.testing.assert_allclose(np.asarray(value, np.float64), wanted, rtol=rtol, atol=rtol)
    d_x, d_kernel = pull(weight)
    assert (d_x.dtype, d_kernel.dtype) == (dtype, dtype)
    x, kernel, weight = (np.asarray(a, np.float64) for a in (x, kernel, weight))
    np.testing.assert_allclose(
        np.asarray(d_x, np.float64), weight @ kernel.T, rtol=rtol, atol=4 * rtol
    )
    np.testing.assert_allclose(
        np.asarray(d_kernel, np.float64),
        np.einsum("abd,abf->df", x, weight),
        rtol=rtol,
        atol=8 * rtol,
    )


def saved_by_scans(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of the arrays that forward scans return: a carry, and what they stack for the backward pass."""
    shapes = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and not equation.params["reverse"]:
            shapes |= {variable.aval.shape for variable in equation.outvars}
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                shapes |= saved_by_scans(inner)
    return shapes


def test_no_layer_saves_a_copy_of_its_kernels():
    """The backward pass reads the stacked weights; copies of them would be a second stack."""
    config = tiny_config(num_layers=6)
    tokens, length = random_rows(config, 2, 16)

    def loss(params):
        return jnp.sum(decoder.hidden_states(params, config, tokens, length))

    params = noisy_params(config)
    saved = saved_by_scans(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    assert (6, 2, 16, config.hidden_size) in saved
    kernels = {leaf.shape for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 3}
    assert not saved & kernels
