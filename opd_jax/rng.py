"""Random keys: every use has a name, so a resumed run draws the same numbers without saved keys."""

from enum import IntEnum

import jax


class Stream(IntEnum):
    """The purpose of a key. The numbers are part of a run's identity: never reuse or renumber them."""

    ROLLOUT = 1
    EVAL = 2
    SAMPLE = 3  # cold-start solutions of the teacher; the step is the batch of problems
    PROBE = 4  # a probe; the step is the length of the prefix, then model and batch are folded in
    BENCHMARK = 5  # answers of launch/evaluate.py; the step is 0, then the answer is folded in
    GATE = 6  # draws of a gate, one a token; the rollout's place in the batch is folded in
    JUMP = 7  # answers to the problems held for jumps; the place of their batch is folded in
    HINT = 8  # cold-start solutions of the teacher where its prompt shows the answer; as for SAMPLE
    AGREEMENT = 9  # the student's responses that solutions are compared with; likewise
    HARNESS = 10  # what the student writes into the teacher's prompts


def key_for(seed: int, step: int, stream: Stream) -> jax.Array:
    """Return the key of `stream` at `step` of the run with `seed`; a scalar typed PRNG key.

    The sampler folds in the rollout id and then the token's position, so a sample depends on
    (seed, step, rollout id, position) and on nothing else.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), int(stream))
