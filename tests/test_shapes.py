"""Shapes are compared by the letters that end a name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.errors import ShapeError
from opd_jax.shapes import check_shapes


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
