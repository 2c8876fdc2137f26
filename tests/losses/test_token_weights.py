"""What each token weighs."""

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses

pytestmark = [pytest.mark.short, pytest.mark.usefixtures("strict_dtypes")]

LENGTHS_3_1_0 = np.array([[0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)


@pytest.mark.parametrize(
    ("aggregation", "first", "second"),
    [
        ("token", 1 / 4, 1 / 4),  # 3 + 1 tokens
        ("sequence", 1 / 6, 1 / 2),  # 2 responses: 1 / (2*3), 1 / (2*1)
    ],
)
def test_token_weights_by_hand(aggregation, first, second):
    weight = losses.token_weights(LENGTHS_3_1_0, aggregation)
    expected = [[0, first, first, first], [0, 0, second, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    assert weight.dtype == jnp.float32


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_token_weights_invariances(aggregation):
    mask = np.random.default_rng(1).random((6, 9)) < 0.4
    weight = losses.token_weights(mask, aggregation)
    np.testing.assert_allclose(np.sum(weight), 1.0, rtol=1e-6)
    order = np.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_array_equal(losses.token_weights(mask[order], aggregation), weight[order])
    padded = losses.token_weights(np.pad(mask, ((0, 2), (0, 3))), aggregation)
    np.testing.assert_array_equal(padded, np.pad(weight, ((0, 2), (0, 3))))
    np.testing.assert_array_equal(losses.token_weights(np.zeros((2, 3), bool), aggregation), 0.0)


def test_sequence_weights_count_responses_equally():
    per_response = np.sum(losses.token_weights(LENGTHS_3_1_0, "sequence"), axis=1)
    np.testing.assert_allclose(per_response, [0.5, 0.5, 0.0], rtol=1e-6)


def test_constant_weights_by_hand():
    """3 rows and a budget of 4: every token weighs 1 / 12, the empty row counts."""
    weight = losses.token_weights(LENGTHS_3_1_0, "constant", length=4)
    np.testing.assert_allclose(weight, LENGTHS_3_1_0 / 12.0, rtol=1e-6)
    assert weight.dtype == jnp.float32
