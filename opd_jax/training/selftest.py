"""A self-test at the start of a run: sampler and scorer must agree about the same tokens.

A wrong kernel on a new machine, weights that differ between two copies, or a mask that is off by one does
not raise an error: the run trains on wrong advantages. The programs of the run sample a few tokens and
score them, so nothing else is compiled. Scores are taken twice, and a third time in a micro-batch of
another shape; the log-probs of the sampler, from its key-value cache, are compared with them.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import models, scoring
from opd_jax.data import microbatches
from opd_jax.errors import SelfTestError
from opd_jax.models import Model
from opd_jax.rng import Stream, key_for
from opd_jax.rollout import row_keys, sample_responses
from opd_jax.training import batch as rows
from opd_jax.training.setup import Setup
from opd_jax.training.step_functions import StepFunctions
from opd_jax.types import Rollout, Scores, TeacherRows

TOKENS = 64  # sampled for each row, at most


@dataclasses.dataclass(frozen=True)
class Gap:
    """Absolute differences of log-probs over the compared tokens, in nats: their mean and their largest."""

    mean: float
    largest: float


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a self-test.

    Attributes:
      repeated: between two passes of one program over the same rows.
      resplit: between micro-batches of two shapes; of student and teacher, the larger one.
      sampled: between sampler and scorer.
      tokens: number of compared tokens.
      dtype: compute dtype of the student, which decides the bound.
      seconds: duration of the test.
    """

    repeated: Gap
    resplit: Gap
    sampled: Gap
    tokens: int
    dtype: str
    seconds: float


# Largest mean and largest single difference that rounding explains. docs/reliability.md has the measured
# differences, with and without faults.
BOUNDS = {"float32": Gap(1e-4, 1e-2), "bfloat16": Gap(3e-2, 1.0)}


def wanted(field: str, platform: str) -> bool:
    """Return whether to test: `field` is guard.self_test, `platform` that of JAX."""
    return field == "always" or (field == "gpu" and platform == "gpu")


def gap(a_BT: np.ndarray, b_BT: np.ndarray, mask_BT: np.ndarray) -> Gap:
    """Return the differences where the mask is True; not finite where a log-prob is not."""
    difference = np.abs(a_BT.astype(np.float64) - b_BT)[mask_BT]
    if not difference.size:
        return Gap(0.0, 0.0)
    return Gap(float(difference.mean()), float(difference.max()))


def run(
    setup: Setup,
    functions: StepFunctions,
    student: models.Params,
    teacher: models.Params | None,
    reference: models.Params | None,
) -> Found | None:
    """Sample a few tokens from the first problems and score them; None where a run samples no rollouts.

    The weights are those that a step samples and scores with. All processes of a run call this together.
    """
    spec = functions.spec
    if not spec.terms.needs_rollouts or spec.replayed:
        return None
    began = time.perf_counter()
    group = spec.config.rollout.samples_per_prompt
    count = spec.config.rollout.prompts_per_step
    problems = [setup.train[i % len(setup.train)] for i in range(count)]
    batch = setup.read(problems)
    rollout = sample(functions, student, [p for p in batch.prompts for _ in range(group)])
    teacher_rows = None
    if batch.teacher_prompts is not None:
        teacher_rows = rows.teacher_rows(
            rollout, [p for p in batch.teacher_prompts for _ in range(group)],
            setup.alignment.teacher_ids, width=setup.teacher_width,
        )  # fmt: skip
    first, second = shapes(functions, rollout, teacher_rows)
    some = np.arange(min(first.count, spec.rollouts))

    def scored(shape: microbatches.MicroBatch, order: np.ndarray) -> Scores:
        return score(functions, (student, teacher, reference), rollout, teacher_rows, shape, order)

    one, again, other = scored(first, some), scored(first, some), scored(second, some[::-1])
    mask_BT = rows.scored_mask(rollout, setup.alignment.counted)
    mask_BT[len(some) :] = False
    resplit = gap(one.student_logprob_BT, other.student_logprob_BT, mask_BT)
    if teacher is not None:
        of_teacher = gap(one.teacher_logprob_BT, other.teacher_logprob_BT, mask_BT)
        resplit = Gap(max(resplit.mean, of_teacher.mean), max(resplit.largest, of_teacher.largest))
    return Found(
        repeated=gap(one.student_logprob_BT, again.student_logprob_BT, mask_BT),
        resplit=resplit,
        sampled=gap(rollout.sampler_logprob_BT, one.student_logprob_BT, mask_BT),
        tokens=int(mask_BT.sum()),
        dtype=jnp.dtype(spec.dtype).name,
        seconds=time.perf_counter() - began,
    )


def sample(
    functions: StepFunctions, student: models.Params, prompts: Sequence[Sequence[int]]
) -> Rollout:
    """Sample a few tokens for each prompt with the programs of the run's rollouts."""
    spec = functions.spec
    longest = spec.config.rollout.max_response_tokens
    batching = dataclasses.replace(spec.batching, largest_budget=longest)
    sampling = spec.sampling.replace(max_response_tokens=min(TOKENS, longest))
    key = key_for(spec.config.seed, 0, Stream.ROLLOUT)  # the steps of a run count from 1
    return sample_responses(
        Model(spec.student, student), prompts, sampling,
        keys=row_keys(key, len(prompts)), batching=batching,
    )  # fmt: skip


def shapes(
    functions: StepFunctions, rollout: Rollout, teacher_rows: TeacherRows | None
) -> tuple[microbatches.MicroBatch, microbatches.MicroBatch]:
    """Return the narrowest micro-batch of the run's scoring that holds the rows, and the next wider one.

    They are the same one where every row is as wide as the widest.
    """
    spec = functions.spec
    parts = microbatches.shapes(
        spec.scored_together(spec.rollouts), width=spec.width, tokens=spec.config.optim.microbatch_tokens,
        teacher_width=spec.teacher_width if teacher_rows is not None else 0,
        replicas=spec.mesh.replicas, tile=spec.tile,
    )  # fmt: skip
    longest = rollout.length_B.max()
    longest_of_teacher = 0 if teacher_rows is None else teacher_rows.length_B.max()
    fitting = [
        part for part in parts
        if part.width >= longest and part.teacher_width >= longest_of_teacher
    ]  # fmt: skip
    return fitting[-1], fitting[-2] if len(fitting) > 1 else fitting[-1]


def score(
    functions: StepFunctions,
    weights: tuple[models.Params, models.Params | None, models.Params | None],
    rollout: Rollout,
    teacher_rows: TeacherRows | None,
    shape: microbatches.MicroBatch,
    order: np.ndarray,
) -> Scores:
    """Score the rows `order`, in this order, in micro-batches of one shape; host arrays of [B, T, ...].

    `weights`: of student, teacher and reference. Rows that are not in `order` are 0.
    """
    spec, mesh = functions.spec, functions.spec.mesh
    scorers = spec.models(*weights)
    inputs = (rollout.tokens_BT, rollout.length_B, rollout.prompt_length_B)
    out = None
    for start in range(0, len(order), shape.count):
        part = dataclasses.replace(shape, rows=order[start : start + shape.count])
        tokens, length, first = microbatches.gather(inputs, part)
        other = None if teacher_rows is None else microbatches.gather_teacher(teacher_rows, part)
        scores = mesh.fetch(
            scoring.score_part(
                scorers, *mesh.rows((tokens, length, first, other)), spec.scoring, mesh=mesh
            )
        )
        if out is None:
            size = rollout.tokens_BT.shape
            out = jax.tree.map(
                lambda x, size=size: np.zeros((*size, *x.shape[2:]), x.dtype), scores
            )
        jax.tree.map(lambda a, b, part=part: microbatches.scatter(a, b, part), out, scores)
    assert out is not None
    return out


def line(found: Found) -> str:
    """Return the line about a self-test for the start of the run."""
    bound = BOUNDS[found.dtype]
    repeated = "repeats bit for bit"
    if found.repeated.largest > 0:
        repeated = f"differs by {_text(found.repeated)} when it is repeated"
    return (
        f"self-test: over {found.tokens} tokens the scorer {repeated}, and differs by "
        f"{_text(found.resplit)} in another micro-batch and by {_text(found.sampled)} from the sampler "
        f"(mean and largest, in nats; bound {_text(bound)}); {found.seconds:.1f} s"
    )


def require(found: Found) -> None:
    """Raise SelfTestError where a difference is above the bound of the dtype, or is not a number."""
    bound = BOUNDS[found.dtype]
    for name, what in (
        ("repeated", "two passes of the scorer over the same rows"),
        ("resplit", "the scorer in two micro-batches of different shapes"),
        ("sampled", "sampler and scorer"),
    ):
        one: Gap = getattr(found, name)
        if one.mean <= bound.mean and one.largest <= bound.largest:
            continue
        raise SelfTestError(
            f"self-test: log-probs of {what} differ by {_text(one)} nats (mean and largest), wanted at most "
            f"{_text(bound)} in {found.dtype}; see docs/first_day.md, or set --config.guard.self_test=off"
        )


def _text(one: Gap) -> str:
    return f"{one.mean:.1e} and {one.largest:.1e}"
