"""Rollouts and scores are the same on any mesh. Needs eight devices: test_mesh.py starts it so."""

import functools

import jax
import numpy as np
import pytest

from opd_jax.models import decoder
from opd_jax.models.end_tokens import Events
from opd_jax.rollout import SamplingParams, decode_state
from opd_jax.sharding.mesh import ONE, Mesh
from opd_jax.types import Ends
from tests.conftest import noisy_params, random_rows
from tests.sharding.eight_devices import (
    CONFIG,
    EVENTS,
    TEACHER,
    B,
    T,
    collectives,
    devices,
    make,
    on,
    params,
)
from tests.support import calls

__all__ = ["devices", "params"]  # fixtures

# Rollouts.


def roll(devices: Mesh, params: decoder.Params, count: int, **settings: int):
    generator = np.random.default_rng(0)
    prompts = [generator.integers(2, 99, 1 + i % 6).tolist() for i in range(count)]
    return calls.roll(
        on(devices, params), CONFIG, prompts, key=jax.random.key(3), max_response_tokens=14,
        max_prompt_tokens=6, stop_ids=tuple(range(8)), chunk=4, mesh=devices,
        events=Events(ends=Ends(id=3, student=tuple(range(8)))), **settings,
    )  # fmt: skip


@functools.cache
def roll_alone(**settings: int):
    return roll(ONE, noisy_params(CONFIG), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"count": 5},  # more devices than rows
        pytest.param({"count": 11, "slots": 3}, marks=pytest.mark.slow),
        pytest.param({"count": 37, "slots": 17, "stop_on_repetition": 2}, marks=pytest.mark.slow),
    ],
    ids=["five", "three slots", "refilled"],
)
def test_rollouts_are_the_same_on_any_mesh(devices, params, settings):
    want, got = roll_alone(**settings), roll(devices, params, **settings)
    for name in ("tokens_BT", "length_B", "prompt_length_B", "outcome_B"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    np.testing.assert_allclose(got.sampler_logprob_BT, want.sampler_logprob_BT, atol=1e-5)
    assert len(set(want.length_B - want.prompt_length_B)) > 2  # rows end at different times


def test_decoding_moves_no_cache_between_devices(devices, params):
    slots, total = 4, 256
    model = decode_state.unstack(decoder.Model(CONFIG, on(devices, params)), devices)
    state = decode_state.empty(model, slots, total, 0, devices)
    sampling = SamplingParams(0, stop_ids=(1,))
    rows = 2 * devices.replicas
    row, wide = np.zeros(rows, np.int32), np.zeros((rows, 6), np.int32)
    keys_B2 = np.zeros((rows, 2), np.uint32)
    admitted = devices.rows(decode_state.Admitted(wide, row + 1, row + 9, row, keys_B2))
    texts = [
        decode_state.decode_chunk.lower(
            model, state, np.int32(0), sampling, steps=4, mesh=devices
        ).compile(),
        decode_state.prefill.lower(model, state, admitted, mesh=devices).compile(),
    ]
    _, values = state.caches[0][0]
    part = values.sharding.shard_shape(values.shape)
    assert part[:2] == (slots, CONFIG.num_kv_heads // devices.devices.shape["tensor"])
    whole = np.prod(part)
    for compiled in texts:
        moved = collectives(compiled.as_text())
        if devices.devices.shape["tensor"] == 1:
            assert moved == []  # not a word
        assert all(size < whole / 4 for _, size in moved), moved
        places = jax.tree.map(lambda x: x.sharding, state)
        same = jax.tree.map(
            lambda leaf, a, b: a.is_equivalent_to(b, leaf.ndim), state, places,
            compiled.output_shardings,
        )  # fmt: skip
        assert all(jax.tree.leaves(same))


# Scoring.


def score(devices: Mesh, student: decoder.Params, teacher: decoder.Params, **settings):
    tokens_BT, length_B = random_rows(CONFIG, B, T)
    return calls.score(
        on(devices, student), CONFIG, on(devices, teacher), TEACHER, tokens_BT, length_B,
        vocabulary=90, top_k=3, token_chunk=7, microbatch_tokens=2 * T, mesh=devices,
        support=("union", 2), events=EVENTS, **settings,
    )  # fmt: skip


@functools.cache
def score_alone():
    return score(ONE, noisy_params(CONFIG), noisy_params(TEACHER, seed=1))


def test_scores_are_the_same_on_any_mesh(devices, params):
    teacher = noisy_params(TEACHER, seed=1)
    want, got = score_alone(), score(devices, params, teacher)
    inside_BT = np.arange(T)[None] < random_rows(CONFIG, B, T)[1][:, None]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a[inside_BT], b[inside_BT], atol=2e-5)


def test_the_reference_scores_alike_on_a_mesh(params):
    teacher, reference = noisy_params(TEACHER, seed=1), noisy_params(CONFIG, seed=2)
    results = [
        score(devices, own, teacher, reference=decoder.Model(CONFIG, on(devices, reference)))
        for devices, own in ((ONE, noisy_params(CONFIG)), (make("2x2x2"), params))
    ]
    inside_BT = np.arange(T)[None] < random_rows(CONFIG, B, T)[1][:, None]
    want, got = (scores.reference_logprob_BT[inside_BT] for scores in results)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert np.abs(want).max() > 1.0
