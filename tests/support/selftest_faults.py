"""Faults that the self-test of a run must find, and what it measures with each of them.

    python -m tests.support.selftest_faults opd_jax/tiny/student bfloat16
    python -m tests.support.selftest_faults MODEL float32 change_the_temperature

A line for the sound programs and one for each fault: differences between sampler and scorer, in nats.
"""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import opd
from opd_jax.models import attention, kv_cache
from opd_jax.scoring import chunked
from opd_jax.training import selftest
from opd_jax.training.make_setup import make_setup
from opd_jax.training.step_functions import make_step_functions
from opd_jax.training.weights import load_weights


def prepared(
    student: str, teacher: str, dtype: str, *, rollouts: int = 16, budget: int = 96
) -> tuple:
    """What `selftest.run` takes, of the generated problems."""
    config = opd.get_config("tiny")
    config.student.path, config.teacher.path = student, teacher
    config.student.dtype = config.teacher.dtype = dtype
    config.rollout.prompts_per_step, config.rollout.samples_per_prompt = rollouts // 4, 4
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 128, budget
    config.optim.microbatch_tokens = 8 * (config.rollout.max_prompt_tokens + budget)
    config.eval.data = ""
    setup = make_setup(config)
    functions = make_step_functions(setup.spec)
    weights = load_weights(setup, student=True)
    assert weights.student is not None
    student_weights = functions.compute_weights(weights.student)
    return setup, functions, student_weights, weights.scorer, weights.reference


def flipped(params):
    """The same weights, the largest number of one matrix with its sign changed."""
    flat = dict(jax.tree_util.tree_leaves_with_path(params))
    path = max(
        (p for p in flat if flat[p].ndim > 1), key=lambda p: abs(flat[p].astype(jnp.float32)).max()
    )
    matrix = np.asarray(flat[path])
    at = np.unravel_index(np.abs(matrix.astype(np.float32)).argmax(), matrix.shape)
    changed = flat[path].at[at].multiply(-1)
    return jax.tree_util.tree_map_with_path(lambda p, x: changed if p == path else x, params)


def flip_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler's copy of the weights has another sign in one place."""
    sound = selftest.sample
    monkeypatch.setattr(
        selftest,
        "sample",
        lambda functions, student, prompts: sound(functions, flipped(student), prompts),
    )


def change_the_temperature(monkeypatch):
    """The scorer divides logits by 1.1."""
    sound = chunked._log_softmax
    monkeypatch.setattr(chunked, "_log_softmax", lambda logit, *more: sound(logit / 1.1, *more))


def shift_the_mask_of_the_cache(monkeypatch):
    """A token is sampled without a look at the position before it."""
    sound = kv_cache.attend
    monkeypatch.setattr(
        kv_cache,
        "attend",
        lambda query, cache, length: sound(query, cache, jnp.maximum(length - 1, 1)),
    )


def shift_the_mask_of_the_scorer(monkeypatch):
    """A query of the scorer also attends to the position after it."""
    sound = attention._logits

    def shifted(query, keys, rows):
        ahead = jnp.concatenate([keys[:, :, 1:], keys[:, :, -1:]], axis=2)
        return sound(query, ahead, rows)

    monkeypatch.setattr(attention, "_logits", shifted)


def sum_in_bfloat16(monkeypatch):
    """Logits and their log-sum-exp in bfloat16."""
    sound = chunked._log_softmax
    monkeypatch.setattr(
        chunked, "_log_softmax",
        lambda logit, *more: sound(logit.astype(jnp.bfloat16), *more).astype(jnp.float32),
    )  # fmt: skip


FAULTS = (
    flip_a_weight, change_the_temperature, shift_the_mask_of_the_cache, shift_the_mask_of_the_scorer,
    sum_in_bfloat16,
)  # fmt: skip


def measure(given: tuple, fault: Callable | None) -> tuple[selftest.Found, str]:
    """Run the self-test with a fault in the programs; return its result, and the differences in words."""
    differences = []
    sound = selftest.gap

    def gap(a_BT: np.ndarray, b_BT: np.ndarray, mask_BT: np.ndarray) -> selftest.Gap:
        differences.append((a_BT.astype(np.float64) - b_BT)[mask_BT])
        return sound(a_BT, b_BT, mask_BT)

    jax.clear_caches()  # programs traced with a fault are not kept
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selftest, "gap", gap)
            if fault is not None:
                fault(patch)
            found = selftest.run(*given)
    finally:
        jax.clear_caches()
    of_sampler = differences[-1]
    size = np.abs(of_sampler)
    return found, (
        f"mean {of_sampler.mean():+.1e} (error {of_sampler.std() / len(size) ** 0.5:.0e}), size "
        f"{size.mean():.1e}, 99 % below {np.quantile(size, 0.99):.1e}, largest {size.max():.1e}, {len(size)} "
        "tokens"
    )


def main(model: str, dtype: str, *names: str) -> None:
    """Print a line for the sound programs and one for each fault."""
    given = prepared(model, model, dtype)
    for fault in (None, *(fault for fault in FAULTS if not names or fault.__name__ in names)):
        _, text = measure(given, fault)
        print(f"{dtype} {fault.__name__ if fault else 'sound'}: {text}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
