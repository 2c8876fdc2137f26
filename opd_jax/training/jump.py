"""Jumps along the direction of training (EffOPD, 2605.11739), kept where they answer problems no worse.

At the steps 2^n the weights have moved by Delta = W - W_prev since the last such step. Candidates
W + 2 k Delta, k = 1, 2, ..., answer training problems that are held for it, one after the other; the last
one whose score is not below the best so far becomes the student. The optimizer keeps its moments and its
count, and a moving average keeps its weights: the paper does not say otherwise. After a jump, W_prev of the
next one is where this jump ended, so a jump is not part of the next direction.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.grading.grader import Grade, Grader
from opd_jax.metrics import make_repetition_rule
from opd_jax.metrics.tracing import stage
from opd_jax.rng import Stream, key_for
from opd_jax.rollout import read_responses
from opd_jax.sharding.mesh import Mesh
from opd_jax.training.setup import Setup
from opd_jax.training.step_functions import StepFunctions
from opd_jax.types import TrainState


def is_jump(step: int) -> bool:
    """Return whether `step` is 2^n, n = 0, 1, 2, ..."""
    return step >= 1 and step & (step - 1) == 0


def extrapolate(params: Any, previous: Any, k: int) -> Any:
    """W + 2 k (W - W_prev), leaf by leaf, in the dtype of the leaves. (2605.11739)

    Two trees of the same shapes; k = 0 returns `params` itself. One note on the paper reads 2^k for 2 k.
    """
    if k == 0:
        return params
    return jax.tree.map(lambda w, w_prev: w + (w - w_prev) * w.dtype.type(2 * k), params, previous)


def search(score: Callable[[int], float], candidates: int) -> tuple[int, list[float]]:
    """Return the accepted k and the scores of k = 0, 1, ... as far as they were tried.

    k is accepted while its score is not below that of the one accepted before, k = 0 (no jump) at first;
    the first that is below ends the search.
    """
    accepted, scores = 0, [score(0)]
    for k in range(1, candidates + 1):
        scores.append(score(k))
        if not scores[k] >= scores[accepted]:
            break
        accepted = k
    return accepted, scores


def to_host(params: Any) -> Any:
    """Return a copy of the weights in host memory, which no later step overwrites."""
    return jax.tree.map(np.array, jax.device_get(params))


def overwrite(tree: Any, leaves: Iterable[np.ndarray], mesh: Mesh) -> Any:
    """Return host arrays in the layout of the arrays of `tree`, which are deleted one by one.

    So a device holds one leaf more than the tree at any time. `leaves`: the new ones, in order.
    """

    def one(old: jax.Array, new: np.ndarray) -> jax.Array:
        sharding = old.sharding
        old.delete()
        if mesh.devices is None:  # uncommitted, like the weights that a run starts from
            return jax.block_until_ready(jnp.array(new))
        return jax.make_array_from_callback(new.shape, sharding, lambda i: np.array(new[i]))

    old, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(one, old, leaves))


class Jumps:
    """The stage of a run: try a jump at every step 2^n. `previous` is the snapshot of the last one.

    A device holds one set of master weights at any time: a candidate takes the place of the weights, which
    wait in host memory. Problems are answered as rollouts are sampled, in batches of a step's size, so
    that nothing is compiled and no other memory is taken; all candidates of a step use the same keys.
    """

    def __init__(self, setup: Setup, functions: StepFunctions, grader: Grader):
        self.setup, self.functions, self.grader = setup, functions, grader
        self.previous: Any = None

    def __bool__(self) -> bool:
        """Whether the run has problems for jumps."""
        return bool(self.setup.jump_problems)

    def start(self, params: Any) -> None:
        """Take the snapshot of step 0, or of a checkpoint that has none."""
        if self:
            self.previous = to_host(params)

    def __call__(
        self, step: int, train: TrainState, *, alarmed: bool
    ) -> tuple[TrainState, dict[str, float]]:
        """Return the state with the accepted weights, and the metrics `jump/*`; donates the parameters.

        `alarmed`: the collapse guard has raised an alarm that is still on. The direction of a collapse is
        not followed: then only the snapshot is taken.
        """
        began = time.perf_counter()
        here, previous, params = to_host(train.params), self.previous, train.params
        if alarmed:
            self.previous = here
            return train, {}
        placed = 0

        def place(k: int) -> None:
            nonlocal params, placed
            if k != placed:
                leaves = (extrapolate(w, w_prev, k) for w, w_prev in pairs(here, previous))
                params, placed = overwrite(params, leaves, self.setup.mesh), k

        def score(k: int) -> float:
            place(k)
            return self._accuracy(step, params)

        with stage("jump"):
            accepted, scores = search(score, self.setup.config.jump.candidates)
            place(accepted)
        self.previous = here if accepted == 0 else to_host(params)
        return train.replace(params=params), {
            "jump/accepted": float(accepted),
            "jump/tried": float(len(scores) - 1),
            "jump/score_before": scores[0],
            "jump/score": scores[accepted],
            "time/jump_s": time.perf_counter() - began,
        }

    def _accuracy(self, step: int, params: Any) -> float:
        """Return the share of the problems that the student with these master weights answers correctly."""
        setup, count = self.setup, self.functions.spec.rollouts
        problems, prompts = setup.jump_problems, setup.jump_prompts
        student = self.functions.compute_weights(params)
        responses: list[list[int]] = []
        for start in range(0, len(prompts), count):
            batch = [prompts[(start + i) % len(prompts)] for i in range(count)]
            key = jax.random.fold_in(key_for(setup.config.seed, step, Stream.JUMP), start)
            responses += self.functions.generate(student, batch, key).responses()
        answers = [problem.answer for problem in problems]

        read = read_responses(
            responses[: len(answers)], answers, setup.tokenizer, grader=self.grader,
            repetition=make_repetition_rule(setup.config.metrics),
        )  # fmt: skip
        return float(np.mean([grade is Grade.CORRECT for grade in read.grades]))


def pairs(params: Any, previous: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the leaves of two trees side by side."""
    return list(zip(jax.tree.leaves(params), jax.tree.leaves(previous), strict=True))


def describe(metrics: dict[str, float], step: int) -> str:
    """Return one line about a jump that was tried."""
    before, after = metrics["jump/score_before"], metrics["jump/score"]
    k, tried = int(metrics["jump/accepted"]), int(metrics["jump/tried"])
    if not k:
        return f"step {step}: no jump: {before:.1%} of the problems held for it, less after one"
    return (
        f"step {step}: jump by {2 * k} times the way since the last one ({tried} tried): "
        f"{before:.1%} -> {after:.1%} of the problems held for it"
    )
