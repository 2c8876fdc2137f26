"""Random keys: every draw has a name, so a resumed run draws the same numbers and none is saved."""

from enum import IntEnum

import jax


class Stream(IntEnum):
    """What a key is for. Numbers are part of the run's identity: never reuse or renumber."""

    ROLLOUT = 1
    EVAL = 2
    SAMPLE = 3  # cold-start solutions of the teacher; the step is the batch of problems
    PROBE = (
        4  # of a probe; the step is the length of the prefix, then folds say who and which batch
    )
    BENCHMARK = 5  # answers of launch/evaluate.py; the step is 0, then folds say which answer


def key_for(seed: int, step: int, stream: Stream) -> jax.Array:
    """The key of `stream` at `step` of the run with `seed`; a scalar typed PRNG key.

    The sampler folds in the rollout id and then the token's position, so a sample depends on
    (seed, step, rollout id, position) and on nothing else.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), int(stream))
