"""Every program of a run's training steps by name, and compiling them before they are needed.

What is compiled here goes into the cache of compiled programs, from which the run's own calls take it.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from opd_jax import losses, models, scoring
from opd_jax.aot import Program
from opd_jax.sharding.partition import unwrapped
from opd_jax.training import batch as rows
from opd_jax.training.setup import Setup
from opd_jax.types import GoldenRows, Rollout, RolloutRows, TeacherRows


def worthwhile() -> bool:
    """Whether to compile ahead: on a GPU, where it takes minutes, and where programs are kept.

    On a CPU the programs that a run meets are compiled soon enough as it meets them.
    """
    return jax.default_backend() != "cpu" and bool(jax.config.values["jax_compilation_cache_dir"])


def compile_all(programs: Sequence[Program]) -> float:
    """Compile them, a few at a time; the seconds that took."""
    began = time.perf_counter()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(Program.compile, programs))
    return time.perf_counter() - began


def blank_rollout_rows(
    setup: Setup, student: Any, teacher: Any, asked: scoring.ScoreSpec
) -> RolloutRows:
    """Rows of the shapes and dtypes of one update's share of the rollouts, all zeros.

    `student`, `teacher`: the models that score, as shapes and dtypes; `asked`: what they are asked
    (Collector.scoring).
    """
    config, terms = setup.config, setup.terms
    batch = (
        config.rollout.prompts_per_step
        * config.rollout.samples_per_prompt
        // config.optim.updates_per_rollout
    )
    shape = (batch, setup.width)
    tokens_BT, length_B = np.zeros(shape, np.int32), np.zeros(batch, np.int32)
    theirs = None
    if setup.separate_prompts:
        width = setup.teacher_width
        theirs = TeacherRows(np.zeros((batch, width), np.int32), length_B, length_B)
    own = models.Model(setup.student, unwrapped(student))
    other = None
    if teacher is not None:
        assert setup.teacher is not None
        other = models.Model(setup.teacher, unwrapped(teacher))
    scores = jax.eval_shape(scoring.score_part, own, other, tokens_BT, length_B, theirs, asked)
    nothing_BT = np.zeros(shape, np.float32)
    return rows.rollout_rows(
        Rollout(tokens_BT, length_B, length_B, nothing_BT, length_B),
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), scores),
        np.zeros(shape, bool),
        nothing_BT,
        terms,
        weigh=partial(losses.token_weights, aggregation="token", length=1),
    )


def blank_golden_rows(setup: Setup) -> GoldenRows:
    """Rows of the shapes and dtypes of one update's share of the golden solutions, all zeros."""
    batch = setup.config.rollout.prompts_per_step // setup.config.optim.updates_per_rollout
    shape = (batch, setup.width)
    return GoldenRows(
        np.zeros(shape, np.int32), np.zeros(batch, np.int32), np.zeros(shape, np.float32)
    )
