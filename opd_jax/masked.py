"""Reductions over the True entries of a mask. A mask selects, it never multiplies: 0 * inf is nan."""

import jax
import jax.numpy as jnp


def masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum over the True entries, float32 scalar; 0 when there is none."""
    return jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0))


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the True entries, float32 scalar; 0 when there is none."""
    return masked_sum(values, mask) / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)


def masked_max(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Largest of the True entries, float32 scalar; 0 when there is none."""
    return jnp.where(
        jnp.any(mask), jnp.max(jnp.where(mask, values.astype(jnp.float32), -jnp.inf)), 0.0
    )
