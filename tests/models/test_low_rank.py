"""Adapters of low rank: the layer by hand, its gradient, its start, joining and merging."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.errors import ModelError
from opd_jax.models import decoder, low_rank
from opd_jax.models.decoder import Linear
from opd_jax.models.low_rank import TARGETS, LowRank
from tests.conftest import noisy_params, random_rows, tiny_config
from tests.support import calls

pytestmark = pytest.mark.short
CONFIG = tiny_config(num_layers=2)
SPEC = LowRank(4, 8.0, 1.0, tuple(TARGETS))


def noisy_adapters(config=CONFIG, spec=SPEC, seed=1) -> decoder.Params:
    """Adapters whose B is not 0."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * generator.standard_normal(leaf.shape), jnp.float32),
        low_rank.abstract_adapters(config, spec),
    )


def scaled(config=CONFIG, spec=SPEC):
    return dataclasses.replace(config, lora_scale=spec.scale)


def test_layer_and_its_gradient_by_hand():
    """W = [[1, 2], [3, 4]], A = [1, 2]^T, B = [3, -1], s = 0.5, x = [1, 1].

    x W = [4, 6], x A = 3, so y = [4 + 0.5 * 3 * 3, 6 - 0.5 * 3] = [8.5, 4.5]. Let L = y_1 + 2 y_2. The
    gradient of the full matrix is G = x^T [1, 2] = [[1, 2], [1, 2]]; dA = s G B^T = 0.5 * [3 - 2, 3 - 2]
    and dB = s A^T G = 0.5 * [1 + 2, 2 + 4].
    """
    params = {
        "kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        "lora_a": jnp.array([[1.0], [2.0]]),
        "lora_b": jnp.array([[3.0, -1.0]]),
    }
    layer, x = Linear(2, scale=0.5), jnp.array([[1.0, 1.0]])

    def loss(params):
        y = layer.apply({"params": params}, x)
        return y[0, 0] + 2 * y[0, 1], y

    (_, y), grad = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(y, [[8.5, 4.5]])
    np.testing.assert_allclose(grad["kernel"], [[1, 2], [1, 2]])
    np.testing.assert_allclose(grad["lora_a"], [[0.5], [0.5]])
    np.testing.assert_allclose(grad["lora_b"], [[1.5, 3.0]])


@pytest.mark.parametrize(("power", "scale"), [(1.0, 0.5), (0.5, 2.0), (0.0, 8.0)])
def test_scale_by_hand(power, scale):
    """Alpha 8 at rank 16: 8 / 16, 8 / sqrt(16), 8."""
    assert LowRank(16, 8.0, power, ("q_proj",)).scale == scale


def test_start_is_the_base_bit_for_bit():
    base, (rows, length) = noisy_params(CONFIG), random_rows(CONFIG, 2, 20)
    adapters = low_rank.init(jax.random.key(0), CONFIG, SPEC)
    joined = low_rank.join(base, adapters)
    got = calls.forward(joined, scaled(), rows, length)
    np.testing.assert_array_equal(got, calls.forward(base, CONFIG, rows, length))
    merged = low_rank.merge(joined, SPEC.scale)
    jax.tree.map(np.testing.assert_array_equal, merged, base)


def test_initial_factors_are_those_of_the_paper():
    adapters = low_rank.init(jax.random.key(0), CONFIG, SPEC)["layers"]
    assert set(adapters) == set(TARGETS.values())
    for name, pair in adapters.items():
        bound = pair["lora_a"].shape[1] ** -0.5
        assert 0.9 * bound < float(jnp.abs(pair["lora_a"]).max()) <= bound, name
        np.testing.assert_allclose(pair["lora_a"].std(), bound / 3**0.5, rtol=0.2)
        assert not pair["lora_b"].any()
        assert not np.array_equal(pair["lora_a"][0], pair["lora_a"][1])  # each layer its own
    assert not np.array_equal(adapters["query"]["lora_a"], adapters["key"]["lora_a"])


def test_merged_weights_are_the_joined_model():
    base, adapters = noisy_params(CONFIG), noisy_adapters()
    joined, (rows, length) = low_rank.join(base, adapters), random_rows(CONFIG, 2, 20)
    merged = low_rank.merge(joined, SPEC.scale)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    got = calls.forward(joined, scaled(), rows, length)
    real = np.arange(20)[None] < np.asarray(length)[:, None]
    want = calls.forward(merged, CONFIG, rows, length)
    np.testing.assert_allclose(got[real], want[real], atol=2e-5)
    assert np.abs(want - calls.forward(base, CONFIG, rows, length))[real].max() > 0.1
    layers = low_rank.merge(decoder.unstack(joined), SPEC.scale)["layers"]
    np.testing.assert_allclose(
        layers[1]["gate"]["kernel"], merged["layers"]["gate"]["kernel"][1], rtol=1e-5, atol=1e-6
    )


def test_adapters_of_undoes_join():
    adapters = low_rank.init(jax.random.key(3), CONFIG, LowRank(2, 4.0, 1.0, ("v_proj", "up_proj")))
    back = low_rank.adapters_of(low_rank.join(noisy_params(CONFIG), adapters))
    assert set(back["layers"]) == {"value", "up"}
    jax.tree.map(np.testing.assert_array_equal, back, adapters)


def test_gradient_is_the_projection_of_the_full_gradient():
    """dA = s G B^T and dB = s A^T G for every matrix, with G the gradient of the merged matrix."""
    base, adapters = noisy_params(CONFIG), noisy_adapters()
    rows, length = random_rows(CONFIG, 2, 20)

    def loss(params, config):
        return jnp.mean(jax.nn.log_softmax(decoder.forward(params, config, rows, length))[..., 7])

    def through(adapters):
        return loss(low_rank.join(base, adapters), scaled())

    got = jax.jit(jax.grad(through))(adapters)["layers"]
    merged = low_rank.merge(low_rank.join(base, adapters), SPEC.scale)
    full = jax.jit(jax.grad(loss), static_argnums=1)(merged, CONFIG)["layers"]
    for name, pair in adapters["layers"].items():
        gradient = full[name]["kernel"]
        wanted_a = SPEC.scale * jnp.einsum("LDF,LRF->LDR", gradient, pair["lora_b"])
        wanted_b = SPEC.scale * jnp.einsum("LDR,LDF->LRF", pair["lora_a"], gradient)
        np.testing.assert_allclose(got[name]["lora_a"], wanted_a, atol=1e-6, rtol=1e-3)
        np.testing.assert_allclose(got[name]["lora_b"], wanted_b, atol=1e-6, rtol=1e-3)


def test_full_rank_reaches_what_full_training_reaches():
    """Least squares with a 2 x 2 matrix: adapters of rank 2 beside W reach the same matrix as W itself."""
    generator = np.random.default_rng(0)
    x, y = (jnp.asarray(generator.standard_normal((16, 2)), jnp.float32) for _ in range(2))
    kernel = jnp.asarray(generator.standard_normal((2, 2)), jnp.float32)
    start = {"lora_a": jnp.asarray([[0.6, -0.4], [0.3, 0.7]]), "lora_b": jnp.zeros((2, 2))}
    layer = Linear(2, scale=1.0)

    def descend(params, frozen, rate=0.2, steps=2000):
        def loss(params):
            return jnp.mean((layer.apply({"params": frozen | params}, x) - y) ** 2)

        def one(_, params):
            return jax.tree.map(lambda w, g: w - rate * g, params, jax.grad(loss)(params))

        return jax.lax.fori_loop(0, steps, one, params)

    full = descend({"kernel": kernel}, {})["kernel"]
    adapted = low_rank.merge({"kernel": kernel} | descend(start, {"kernel": kernel}), 1.0)
    np.testing.assert_allclose(adapted["kernel"], full, atol=1e-4)
    np.testing.assert_allclose(full, jnp.linalg.lstsq(x, y)[0], atol=1e-4)


def test_bfloat16_base_stays_bfloat16():
    base = jax.tree.map(lambda w: w.astype(jnp.bfloat16), noisy_params(CONFIG))
    adapters = jax.tree.map(lambda w: w.astype(jnp.bfloat16), noisy_adapters())
    joined, (rows, length) = low_rank.join(base, adapters), random_rows(CONFIG, 2, 20)
    assert calls.hidden_states(joined, scaled(), rows, length).dtype == jnp.bfloat16
    merged = low_rank.merge(joined, SPEC.scale)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


def test_a_rank_above_a_matrix_is_refused():
    with pytest.raises(ModelError, match=r"lora\.rank=17 is more than k_proj has, a matrix of 32"):
        low_rank.abstract_adapters(CONFIG, dataclasses.replace(SPEC, rank=17))
