"""A key is a function of (seed, step, stream), and of nothing else."""

import itertools

import jax
import numpy as np

from opd_jax.rng import Stream, key_for


def numbers(*, seed: int, step: int, stream: Stream) -> tuple[int, ...]:
    return tuple(jax.random.key_data(key_for(seed, step, stream)).tolist())


def test_same_inputs_same_key():
    key = key_for(3, 7, Stream.ROLLOUT)
    assert key.shape == ()
    np.testing.assert_array_equal(
        jax.random.normal(key, (4,)), jax.random.normal(key_for(3, 7, Stream.ROLLOUT), (4,))
    )


def test_seeds_steps_and_streams_differ():
    grid = list(itertools.product((0, 1, 2), (0, 1, 2, 1000), Stream))
    keys = {numbers(seed=seed, step=step, stream=stream) for seed, step, stream in grid}
    assert len(keys) == len(grid) == 120


def test_step_may_be_traced():
    traced = jax.jit(lambda step: jax.random.key_data(key_for(5, step, Stream.EVAL)))(9)
    assert tuple(traced.tolist()) == numbers(seed=5, step=9, stream=Stream.EVAL)


def test_stream_numbers_stay():
    # They are part of what a run is: another number, and an old run cannot be repeated.
    assert {stream.name: stream.value for stream in Stream} == {
        "ROLLOUT": 1, "EVAL": 2, "SAMPLE": 3, "PROBE": 4, "BENCHMARK": 5, "GATE": 6, "JUMP": 7,
        "HINT": 8, "AGREEMENT": 9, "HARNESS": 10,
    }  # fmt: skip
