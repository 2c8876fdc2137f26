"""Gradients of stacked layers, added to a running sum in place.

The backward pass of a scan stacks the gradients of all layers in a buffer of its own, which is then
added to the sum. Here the sum travels with the residual stream: forward it is an identity; backward it is
the cotangent of its own carry, and each layer adds its gradient to its row. This takes one buffer and no
pass over it, and the compute copy of the weights exists one layer at a time.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def add_to_sums(dtype: jnp.dtype, weights: Tree, sums: Tree, index: jax.Array) -> tuple[Tree, Tree]:
    """Cast a layer's `weights` to `dtype`; identity on `sums` [L, ...].

    In the backward pass the cotangent of the weights is added to row `index` of the cotangent of `sums`.
    """
    return jax.tree.map(lambda w: w.astype(dtype), weights), sums


def _forward(dtype: jnp.dtype, weights: Tree, sums: Tree, index: jax.Array) -> tuple:
    return add_to_sums(dtype, weights, sums, index), index


def _backward(_: jnp.dtype, index: jax.Array, cotangents: tuple[Tree, Tree]) -> tuple:
    new, sums = cotangents
    sums = jax.tree.map(lambda total, g: total.at[index].add(g.astype(total.dtype)), sums, new)
    return None, sums, None


add_to_sums.defvjp(_forward, _backward)


@jax.custom_vjp
def seed_sums(x: jax.Array, sums: Tree, start: Tree) -> jax.Array:
    """Identity on `x`; the backward pass seeds the cotangent of `sums` with `start`, the gradient so far."""
    return x


seed_sums.defvjp(lambda x, sums, start: (x, start), lambda start, g: (g, start, None))
