"""Masks select and never multiply; shapes are compared by the letters that end a name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.errors import ShapeError
from opd_jax.masked import masked_max, masked_mean, masked_sum
from opd_jax.shapes import check_shapes

REDUCTIONS = {"sum": masked_sum, "mean": masked_mean, "max": masked_max}
VALUES = np.array([[1.0, np.nan, -4.0], [np.inf, -9.0, -np.inf]], np.float32)
MASK = np.isfinite(VALUES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("sum", -12.0), ("mean", -4.0), ("max", 1.0)],  # of 1, -4, -9
)
@pytest.mark.usefixtures("strict_dtypes")
def test_what_is_masked_does_not_count(name, expected):
    value, gradient = jax.value_and_grad(REDUCTIONS[name])(jnp.asarray(VALUES), jnp.asarray(MASK))
    assert value == expected
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient[~MASK], 0.0)
    per_value = {"sum": [1.0, 1.0, 1.0], "mean": [1 / 3, 1 / 3, 1 / 3], "max": [1.0, 0.0, 0.0]}
    np.testing.assert_allclose(gradient[MASK], per_value[name], rtol=1e-6)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_an_empty_mask_gives_zero_without_gradient(name):
    empty = jnp.zeros_like(MASK)
    value, gradient = jax.value_and_grad(REDUCTIONS[name])(jnp.asarray(VALUES), empty)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_max_of_negative_values_is_negative():
    assert masked_max(jnp.array([-3.0, -2.0, 5.0]), jnp.array([True, True, False])) == -2.0


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_float32(name):
    assert REDUCTIONS[name](jnp.ones(3, jnp.bfloat16), jnp.ones(3, bool)).dtype == jnp.float32


def test_sums_accumulate_in_float32():
    ones = jnp.ones(300, jnp.bfloat16)  # 299 is not a bfloat16 number: near 256 they are 2 apart
    assert masked_sum(ones, jnp.arange(300) < 299) == 299.0


def test_check_shapes_returns_sizes():
    sizes = check_shapes(
        logprob_BTV=np.zeros((2, 3, 5)), response_mask_BT=np.zeros((2, 3)), length_B=np.zeros(2)
    )
    assert sizes == {"B": 2, "T": 3, "V": 5}


def test_check_shapes_names_both_arrays():
    with pytest.raises(ShapeError, match=r"^mask_BT: got T=4, but logprob_BT has T=3$"):
        check_shapes(logprob_BT=np.zeros((2, 3)), length_B=np.zeros(2), mask_BT=np.zeros((2, 4)))


def test_check_shapes_counts_dimensions():
    with pytest.raises(
        ShapeError, match=r"^mask_BT: got shape \(6,\), wanted 2 dimensions \(BT\)$"
    ):
        check_shapes(mask_BT=np.zeros(6))


def test_check_shapes_compares_letters_within_one_name():
    with pytest.raises(ShapeError, match="weight_DD: got D=3, but weight_DD has D=2"):
        check_shapes(weight_DD=np.zeros((2, 3)))


def test_check_shapes_works_while_tracing():
    def add(x, y):
        check_shapes(x_BT=x, y_BT=y)
        return x + y

    with pytest.raises(ShapeError):
        jax.eval_shape(add, jnp.zeros((2, 3)), jnp.zeros((3, 2)))
