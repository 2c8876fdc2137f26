"""The decoder's own laws: causality, padding, independent rows, cache against full forward."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import decoder, kv_cache, rope
from opd_jax.models.rope_config import RopeScaling
from tests.conftest import noisy_params, random_rows, tiny_config
from tests.support.lanes import slow

CONFIGS = {
    "qwen2": tiny_config(num_layers=2),
    "qwen3": tiny_config(
        model_type="qwen3", num_layers=2, qkv_bias=False, qk_norm=True, head_dim=12, num_kv_heads=1
    ),
    "llama": tiny_config(
        model_type="llama", num_layers=2, qkv_bias=False, tie_embeddings=False, num_kv_heads=4
    ),
}

forward = jax.jit(decoder.forward, static_argnames="config")


@pytest.fixture(scope="module")
def params():
    return {name: noisy_params(config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def qwen2(params):
    """(config, params, tokens [3, 16], lengths, logits) of one model."""
    config = CONFIGS["qwen2"]
    tokens, length = random_rows(config, 3, 16)
    return config, params["qwen2"], tokens, length, forward(params["qwen2"], config, tokens, length)


def test_more_padding_changes_nothing(qwen2):
    config, params, tokens, length, logits = qwen2
    padded = forward(params, config, jnp.pad(tokens, ((0, 0), (0, 8)), constant_values=5), length)
    real = np.arange(16)[None] < np.asarray(length)[:, None]
    np.testing.assert_allclose(padded[:, :16][real], logits[real], atol=1e-5)


def test_a_token_changes_only_what_comes_after_it(qwen2):
    config, params, tokens, length, logits = qwen2
    changed = forward(params, config, tokens.at[:, 6].add(1), length)
    np.testing.assert_array_equal(changed[:, :6], logits[:, :6])
    assert (jnp.abs(changed - logits)[:, 6:8].max(axis=-1) > 1e-3).all()


def test_rows_do_not_see_their_neighbours(qwen2):
    config, params, tokens, length, logits = qwen2
    alone = forward(params, config, tokens[1:2], length[1:2])
    np.testing.assert_allclose(alone[0], logits[1], atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", *slow(*(name for name in CONFIGS if name != "qwen2"))])
def test_prefill_and_decode_equal_forward(params, name):
    config, width = CONFIGS[name], 12
    tokens, _ = random_rows(config, 3, width)
    logits = forward(params[name], config, tokens, jnp.full(3, width))
    prompt_length = jnp.array([5, 1, 3])
    layers = decoder.unstack(params[name])
    decode = jax.jit(decoder.decode, static_argnames="config")
    prefill = jax.jit(decoder.prefill, static_argnames="config")

    prompts = prefill(layers, config, tokens[:, :5], prompt_length)
    caches = kv_cache.init(config, 3, width, jnp.float32)
    caches = tuple(
        kv_cache.place(before, *pair, jnp.arange(3))
        for before, pair in zip(caches, prompts, strict=True)
    )
    for step in range(8):  # as the sampler does: the last prompt token is fed first
        position = prompt_length - 1 + step
        hidden, caches = decode(layers, config, tokens[np.arange(3), position], position, caches)
        got = decoder.logits(decoder.head(layers), hidden)
        np.testing.assert_allclose(got, logits[np.arange(3), position], atol=1e-4)


def test_a_model_without_a_head_uses_its_embedding(params):
    assert decoder.head(params["qwen2"]) is params["qwen2"]["embed"]["embedding"]
    assert decoder.head(params["llama"]) is params["llama"]["head"]["kernel"]


def test_bfloat16_weights_compute_in_bfloat16_and_give_float32_logits(qwen2):
    config, params, tokens, length, logits = qwen2
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    hidden = jax.eval_shape(lambda p: decoder.hidden_states(p, config, tokens, length), params)
    assert hidden.dtype == jnp.bfloat16
    rounded = forward(params, config, tokens, length)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, logits, atol=0.05)  # logits reach 2.5, bfloat16 has 8 bits


def test_rms_norm_by_hand():
    # mean([3, 4]^2) + eps = 12.5 + 12.5 = 25, so x / 5 * scale.
    x, scale = jnp.array([[3.0, 4.0]]), jnp.array([1.0, 10.0])
    y = decoder.RMSNorm(12.5).apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(y, [[0.6, 8.0]], rtol=1e-6)


def test_rotation_by_hand():
    # head_dim 4, theta 100: frequencies 1 and 1/10; the pairs are (x0, x2) and (x1, x3).
    config = tiny_config(head_dim=4, rope_theta=100.0)
    tables = rope.rotary(config, jnp.array([[2]]))
    turned = rope.rotate(jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4), tables)
    cos, sin, slow_cos, slow_sin = math.cos(2), math.sin(2), math.cos(0.2), math.sin(0.2)
    want = [
        cos - 3 * sin, 2 * slow_cos - 4 * slow_sin, 3 * cos + sin, 4 * slow_cos + 2 * slow_sin
    ]  # fmt: skip
    np.testing.assert_allclose(turned[0, 0, 0], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "want"),
    [
        (None, [1.0, 0.1, 0.01, 0.001]),
        (RopeScaling("linear", 4.0), [0.25, 0.025, 0.0025, 0.00025]),
        # Wavelengths 2 pi / f: 6.28 is under 100/4 (kept), 628 and 6283 over 100/1 (divided by 8);
        # 62.83 lies between: b = (100/62.83 - 1) / (4 - 1) = 0.19718, f = (1-b) 0.1/8 + b 0.1.
        (RopeScaling("llama3", 8.0, 1.0, 4.0, 100), [1.0, 0.02975353, 0.00125, 0.000125]),
        # Pairs with 32 turns and 1 turn in 1000 positions: 8 ln(1000 / (32 2 pi)) / (2 ln 1e4) =
        # 0.697 and 2.202, rounded outwards to 0 and 3; 1/1, 3/4, 2/4, 1/4 of each frequency is left.
        (RopeScaling("yarn", 4.0, original_max_position=1000), [1.0, 0.075, 0.005, 0.00025]),
        # Not rounded, the ramp runs from 0.69667 to 2.20182: 0, 0.20153, 0.86591, 1.
        (
            RopeScaling("yarn", 4.0, original_max_position=1000, truncate=False),
            [1.0, 0.0848854, 0.00350565, 0.00025],
        ),
    ],
    ids=["plain", "linear", "llama3", "yarn", "yarn not rounded"],
)
def test_frequencies_by_hand(scaling, want):
    config = tiny_config(head_dim=8, rope_theta=1e4, rope_scaling=scaling)
    np.testing.assert_allclose(rope.inverse_frequencies(config), want, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, 1.1386294),  # 0.1 ln 4 + 1
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 1.5, "mscale": 2.0, "mscale_all_dim": 1.0}, 1.5),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, 1.2772589 / 1.1386294),
        ({"mscale": 2.0}, 1.1386294),  # one of the two alone says nothing
    ],
)
def test_yarn_scales_cosines_and_sines_by_hand(changes, want):
    scaling = RopeScaling(**{"kind": "yarn", "factor": 4.0, "original_max_position": 64} | changes)
    np.testing.assert_allclose(rope.attention_factor(scaling), want, rtol=1e-6)
    cos, sin = rope.rotary(tiny_config(rope_scaling=scaling), jnp.arange(3)[None])
    np.testing.assert_allclose(cos[0, 0], want, rtol=1e-6)
    np.testing.assert_allclose(cos**2 + sin**2, want**2, rtol=1e-5)


def test_only_yarn_scales_cosines():
    assert rope.attention_factor(None) == rope.attention_factor(RopeScaling("linear", 4.0)) == 1.0
