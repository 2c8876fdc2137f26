"""What the tests of the equations share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

P = np.array([0.5, 0.3, 0.2])
Q = np.array([0.25, 0.25, 0.5])


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
