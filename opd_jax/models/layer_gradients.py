"""Gradients of stacked layers, added to a running sum in place.

A scan's own backward pass stacks the gradients of all layers in a buffer of their own, which is added
to the sum afterwards. Here the sum travels with the residual stream: forward nothing happens to it;
backward it is the cotangent of its own carry, and each layer adds its part to its row. One buffer, no
pass over it; the compute copy of the weights exists one layer at a time.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def lend(dtype: jnp.dtype, weights: Tree, sums: Tree, index: jax.Array) -> tuple[Tree, Tree]:
    """A layer's `weights` in `dtype`, and `sums` [L, ...] as they are.

    Backward: what arrives for `sums`, plus in row `index` what arrives for the weights.
    """
    return jax.tree.map(lambda w: w.astype(dtype), weights), sums


def _lend_forward(dtype: jnp.dtype, weights: Tree, sums: Tree, index: jax.Array) -> tuple:
    return lend(dtype, weights, sums, index), index


def _lend_backward(_: jnp.dtype, index: jax.Array, cotangents: tuple[Tree, Tree]) -> tuple:
    new, sums = cotangents
    sums = jax.tree.map(lambda total, g: total.at[index].add(g.astype(total.dtype)), sums, new)
    return None, sums, None


lend.defvjp(_lend_forward, _lend_backward)


@jax.custom_vjp
def begin(x: jax.Array, sums: Tree, start: Tree) -> jax.Array:
    """`x` as it is; backward, `start` is where the sums begin."""
    return x


begin.defvjp(lambda x, sums, start: (x, start), lambda start, g: (g, start, None))
