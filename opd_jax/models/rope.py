"""Rotary position embedding in the Hugging Face layout (first half, second half)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models.config import ModelConfig
from opd_jax.models.rope_config import RopeScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Return theta^(-2i/H) for i < H/2 with the config's scaling; float32 [H/2], a constant of the model."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inverse = (np.float32(1.0) / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    if scaling.kind == "linear":
        return inverse / np.float32(scaling.factor)
    if scaling.kind == "yarn":
        return _yarn(inverse, scaling, config)
    # llama3: low frequencies are divided by the factor, high ones kept, and those between blended.
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


def attention_factor(scaling: RopeScaling | None) -> float:
    """Return the factor of cosines and sines in yarn, whose square scales the logits; 1 otherwise."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor:
        return scaling.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


def rotary(config: ModelConfig, position_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cosine and sine tables of the positions, float32 [B, T, 1, H/2]."""
    inverse = jnp.asarray(inverse_frequencies(config))[None, None, None]
    angle = position_BT.astype(jnp.float32)[..., None, None] * inverse
    factor = attention_factor(config.rope_scaling)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each pair (x_i, x_{i + H/2}) by its position's angle, in float32; keeps the dtype."""
    cos, sin = tables
    x = x_BTNH.astype(jnp.float32)
    other = jnp.roll(x, x.shape[-1] // 2, axis=-1)  # the second half, then the first
    turned = x * jnp.concatenate([cos, cos], -1) + other * jnp.concatenate([-sin, sin], -1)
    return turned.astype(x_BTNH.dtype)


def _yarn(inverse: np.ndarray, scaling: RopeScaling, config: ModelConfig) -> np.ndarray:
    """Scale frequencies by YaRN (arXiv 2309.00071): high ones are kept, low ones divided by the factor.

    In between is a linear ramp over the pair's index, from the pair that makes beta_fast turns in
    the original context to the pair that makes beta_slow.
    """
    size = config.head_dim

    def pair_with_turns(turns: float) -> float:
        wavelength = scaling.original_max_position / (turns * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = pair_with_turns(scaling.beta_fast), pair_with_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # as in transformers, against a division by zero
    ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    kept = (1 - ramp).astype(np.float32)
    return (inverse / np.float32(scaling.factor) * (1 - kept) + inverse * kept).astype(np.float32)
