"""The optimiser by hand: weight decay, clipping by the global norm, schedules of the learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax.config.fields import default
from opd_jax.models import decoder
from opd_jax.training import optimizer
from tests.conftest import tiny_config

pytestmark = pytest.mark.short


def section(**changes: object):
    """The config section `optim`."""
    optim = default().optim
    optim.update({"learning_rate": 1e-3, "weight_decay": 0.1} | changes)
    return optim


def test_weight_decay_is_for_kernels_and_embeddings():
    shapes = decoder.abstract_params(tiny_config(tie_embeddings=False, num_layers=1))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    tx = optimizer.make_optimizer(section(learning_rate=0.5, weight_decay=0.1), 10)
    state = jax.jit(tx.init)(params)
    changes, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    decayed = set()
    for path, change in jax.tree_util.tree_leaves_with_path(changes):
        name = path[-1].key
        # without a gradient the update is -lr * decay * w = -0.5 * 0.1 * 1
        expected = -0.05 if name in ("kernel", "embedding") else 0.0
        np.testing.assert_allclose(change, expected, rtol=1e-6, err_msg=str(path))
        decayed.add((name, bool(np.any(change))))
    assert decayed == {("kernel", True), ("embedding", True), ("bias", False), ("scale", False)}


def test_gradients_are_clipped_by_the_global_norm():
    params = {"kernel": jnp.zeros(2), "bias": jnp.zeros(2)}
    gradient = {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([0.0, 4.0])}  # norm 5
    # beta1 = 0: Adam's first moment is the clipped gradient itself, 2/5 of it.
    tx = optimizer.make_optimizer(section(grad_clip=2.0, beta1=0.0), 10)
    _, state = tx.update(gradient, tx.init(params), params)
    first_moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(first_moment["kernel"], [1.2, 0.0], rtol=1e-6)
    np.testing.assert_allclose(first_moment["bias"], [0.0, 1.6], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0, {0: 0.4, 60: 0.4, 110: 0.4}),
        # from a tenth of 0.4 up to all of it in 10 steps: 0.04 + 5 * 0.036 = 0.22
        ("constant", 10, {0: 0.04, 5: 0.22, 10: 0.4, 110: 0.4}),
        # from step 10 on 100 steps down to 0: a half at 60
        ("linear", 10, {0: 0.04, 5: 0.22, 10: 0.4, 60: 0.2, 85: 0.1, 110: 0.0}),
        # (1 + cos(pi x)) / 2: a quarter of the way (1 + sqrt(1/2)) / 2 = 0.853553
        ("cosine", 10, {5: 0.22, 10: 0.4, 35: 0.4 * 0.853553, 60: 0.2, 110: 0.0}),
        ("cosine", 0, {0: 0.4, 55: 0.2, 110: 0.0}),
    ],
)
def test_schedule_by_hand(name, warmup, expected):
    schedule = optimizer.make_schedule(
        section(learning_rate=0.4, schedule=name, warmup_steps=warmup), steps=110
    )
    got = {step: float(schedule(step)) for step in expected}
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-8)
