"""Rows and scores of zeros in the shapes of a step, from which its programs are known before the run."""

from functools import partial
from typing import Any

import jax
import numpy as np

from opd_jax import losses, scoring
from opd_jax.scoring import Models, ScoreSpec
from opd_jax.sharding.partition import unwrapped
from opd_jax.training import batch
from opd_jax.training.step_spec import StepSpec
from opd_jax.types import (
    GoldenRows,
    Rollout,
    RolloutRows,
    Scores,
    Support,
    TeacherRows,
)


def rollout_rows(spec: StepSpec, student: Any, teacher: Any, reference: Any) -> RolloutRows:
    """Return zeros with the shapes and dtypes of one update's minibatch of rollouts."""
    count = spec.rollouts // spec.config.optim.updates_per_rollout
    models = spec.models(unwrapped(student), unwrapped(teacher), unwrapped(reference))
    rollout = _rollout(spec, count)
    zeros_BT = rollout.sampler_logprob_BT
    scores = row_scores(spec, models, spec.scoring, count)
    if spec.replayed and spec.terms.scored_support:  # recorded, so no result of the scorer
        places_BTX = np.zeros((*zeros_BT.shape, spec.terms.scored_support[1]), np.float32)
        ids_BTX = places_BTX.astype(np.int32)
        scores = scores.replace(
            support=Support(ids_BTX, places_BTX, places_BTX, places_BTX[..., 0])
        )
    return batch.rollout_rows(
        rollout,
        scores,
        np.zeros(zeros_BT.shape, bool),
        zeros_BT,
        spec.terms,
        weigh=partial(losses.token_weights, aggregation="token", length=1),
        gate_BT=zeros_BT if spec.terms.gated else None,
    )


def golden_rows(spec: StepSpec, student: Any, teacher: Any) -> GoldenRows:
    """Return zeros with the shapes and dtypes of one update's minibatch of golden solutions."""
    count = spec.config.rollout.prompts_per_step // spec.config.optim.updates_per_rollout
    golden, scores = _rollout(spec, count), None
    if spec.terms.golden_divergence:
        models = spec.models(unwrapped(student), unwrapped(teacher))
        scores = row_scores(spec, models, spec.golden_scoring, count)
    return batch.golden_rows(
        golden,
        weigh=partial(losses.token_weights, aggregation="token"),
        scores=scores,
        scored_BT=golden.response_mask_BT,
    )


def _rollout(spec: StepSpec, count: int) -> Rollout:
    """Return so many empty rows."""
    length_B = np.zeros(count, np.int32)
    shape = (count, spec.width)
    return Rollout(
        np.zeros(shape, np.int32), length_B, length_B, np.zeros(shape, np.float32), length_B
    )


def row_scores(spec: StepSpec, models: Models, asked: ScoreSpec, count: int) -> Scores:
    """Return zeros with the shapes and dtypes of the scores of so many rows."""
    rows, teacher_rows = _rollout(spec, count), None
    length_B = rows.length_B
    if spec.alignment.teacher is not None:
        models = models.replace(teacher=None)  # its scores meet the student's on the host
    elif spec.teacher_width:
        teacher_BT = np.zeros((count, spec.teacher_width), np.int32)
        teacher_rows = TeacherRows(teacher_BT, length_B, length_B)
    scores = jax.eval_shape(
        scoring.score_part, models, rows.tokens_BT, length_B, length_B, teacher_rows, asked
    )
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), scores)
