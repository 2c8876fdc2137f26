"""Scoring with several teachers: one after the other, each on the rollouts that name it, or all on all."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from opd_jax import data, models
from opd_jax.losses.teachers import shares
from opd_jax.scoring import teachers as joining
from opd_jax.training.other_teachers import names_of, teacher_of
from opd_jax.training.setup import Setup
from opd_jax.training.step_functions import StepFunctions
from opd_jax.training.weights import Weights
from opd_jax.types import Rollout, Scores, TeacherRows

# (functions of one teacher, its weights, rows, its own rows) -> scores
_Score = Callable[[StepFunctions, models.Params | None, Rollout, TeacherRows | None], Scores]


class Teachers:
    """The teachers of a run, where there are several.

    A teacher scores together with the student, by the program of one teacher, so at any time the devices
    hold the scores of one. Where every rollout has one teacher, the micro-batches are those of an even
    share of the rollouts, whatever number names a teacher in a step: no step compiles another program.
    """

    def __init__(self, setup: Setup, functions: StepFunctions, weights: Weights):
        section = setup.config.teachers
        self.setup, self.functions, self.weights = setup, functions, weights
        self.names, self.column = names_of(setup.config), section.column
        self.share_K = shares(section.weights) if section.weights else None

    def __bool__(self) -> bool:
        """Whether the run has several teachers."""
        return bool(self.names)

    def of(self, problems: Sequence[data.Problem], *, group: int) -> np.ndarray | None:
        """Return the index of the teacher of each of `group` rollouts per problem; None for a mixture."""
        if not (self.names and self.column):
            return None
        found = [teacher_of(problem, self.column, self.names) for problem in problems]
        assert all(isinstance(index, int) for index in found), "checked when the data was opened"
        return np.repeat(np.array(found, np.int32), group)

    def score(
        self,
        student: models.Params,
        rollout: Rollout,
        teacher_rows: TeacherRows | None,
        teacher_B: np.ndarray | None,
        reference: models.Params | None = None,
    ) -> Scores:
        """Score rollouts; `teacher_B` is that of `of`."""

        def one(functions: StepFunctions, teacher: Any, rollout: Rollout, rows: Any) -> Scores:
            batch = self.functions.spec.scored_together(functions.spec.rollouts)
            return functions.score(student, teacher, rollout, rows, reference, batch=batch)

        return self._each(one, rollout, teacher_rows, teacher_B)

    def score_golden(
        self,
        student: models.Params,
        golden: Rollout,
        teacher_rows: TeacherRows | None,
        teacher_B: np.ndarray | None,
    ) -> Scores:
        """Score golden solutions, one of each problem, for their divergence."""

        def one(functions: StepFunctions, teacher: Any, golden: Rollout, rows: Any) -> Scores:
            batch = self.functions.spec.scored_together(
                functions.spec.config.rollout.prompts_per_step
            )
            return functions.score_golden(student, teacher, golden, rows, batch=batch)

        return self._each(one, golden, teacher_rows, teacher_B)

    def _each(
        self,
        score: _Score,
        rollout: Rollout,
        teacher_rows: TeacherRows | None,
        teacher_B: np.ndarray | None,
    ) -> Scores:
        """Let each teacher that has rows score them, and join the scores."""
        batch = len(rollout.length_B)
        found = []
        for index in range(len(self.names)):
            if self.share_K is not None and not self.share_K[index]:
                continue
            rows = np.arange(batch) if teacher_B is None else np.flatnonzero(teacher_B == index)
            if not len(rows):
                continue
            spec = self.functions.spec.taught_by(index)
            functions = dataclasses.replace(self.functions, spec=spec)
            teacher = self.weights.placed(self.weights.scorers[index], self.setup.mesh)
            part, own = _rows_of((rollout, teacher_rows), rows)
            found.append((index, rows, score(functions, teacher, part, own)))
            del teacher  # before the next one takes its place
        if teacher_B is not None:
            return joining.routed([(rows, scores) for _, rows, scores in found], batch=batch)
        assert self.share_K is not None
        share_K = self.share_K[[index for index, _, _ in found]]
        return joining.mixed([scores for _, _, scores in found], share_K)

    def metrics(
        self, scores: Scores, mask_BT: np.ndarray, teacher_B: np.ndarray | None
    ) -> dict[str, float]:
        """Return `teacher/NAME/rollouts` and `teacher/NAME/log_ratio` of each teacher that has rollouts."""
        if teacher_B is None:
            return {}
        ratio_BT = np.asarray(scores.teacher_logprob_BT) - np.asarray(scores.student_logprob_BT)
        row = {}
        for index, name in enumerate(self.names):
            own_BT = mask_BT & (teacher_B == index)[:, None]
            row[f"teacher/{name}/rollouts"] = float(np.sum(teacher_B == index))
            if own_BT.any():
                row[f"teacher/{name}/log_ratio"] = float(np.mean(ratio_BT[own_BT], dtype=float))
        return row


def _rows_of(tree: Any, rows: np.ndarray) -> Any:
    """Return these rows of every array of a tree."""
    return jax.tree.map(lambda x: np.asarray(x)[rows], tree)
