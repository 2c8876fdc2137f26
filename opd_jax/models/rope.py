"""Rotary position embedding in the Hugging Face layout (first half, second half)."""

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models.architecture import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """theta^(-2i/H) for i < H/2, scaled as the config asks; float32 [H/2], a constant of the model."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inverse = (np.float32(1.0) / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    if scaling.kind == "linear":
        return inverse / np.float32(scaling.factor)
    # llama3: long wavelengths are divided by the factor, short ones kept, blended in between.
    wavelength = 2 * np.pi / inverse
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    blend = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * inverse / scaling.factor + blend * inverse
    inverse = np.where(wavelength > low, inverse / scaling.factor, inverse)
    between = (wavelength <= low) & (wavelength >= high)
    return np.where(between, blended, inverse).astype(np.float32)


def rotary(config: ModelConfig, position_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine tables of the positions, float32 [B, T, 1, H/2]."""
    inverse = jnp.asarray(inverse_frequencies(config))[None, None, None]
    angle = position_BT.astype(jnp.float32)[..., None, None] * inverse
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each pair (x_i, x_{i + H/2}) by its position's angle, in float32; keeps the dtype."""
    cos, sin = tables
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
