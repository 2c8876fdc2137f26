"""Roll out a batch of prompts, score it with student and teacher, grade it."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from opd_jax import data, metrics, models
from opd_jax.grading.grader import Grade, Grader, decided
from opd_jax.grading.rewards import RewardPool
from opd_jax.losses import spans
from opd_jax.metrics import repetition
from opd_jax.metrics.timing import Clock
from opd_jax.metrics.tracing import stage
from opd_jax.rollout import Responses, read_responses
from opd_jax.sharding import multihost
from opd_jax.training import batch as rows
from opd_jax.training import rewards, span_scores
from opd_jax.training.advantages import Reward
from opd_jax.training.recording import Recorded
from opd_jax.training.rewards import Rewards
from opd_jax.training.setup import Setup
from opd_jax.training.step_functions import StepFunctions
from opd_jax.training.teachers import Teachers
from opd_jax.types import Rollout, Scores, TeacherRows, TextRows


@dataclasses.dataclass(frozen=True)
class Experience:
    """A step's rollouts with scores and grades; host arrays of `samples_per_prompt` rows per prompt.

    Attributes:
      rollout, scores: the records.
      mask_BT: tokens that both models score. repeated_BT: tokens that repeat earlier ones.
      flagged_B: repetitive rollouts.
      grades: of the responses; None where a problem has no answer.
      texts: of the responses.
      external: rewards from a function or a column; None where the verdicts are the rewards.
      teacher_B: the index of each rollout's teacher, where there are several; None for one or a mixture.
    """

    rollout: Rollout
    scores: Scores
    mask_BT: np.ndarray
    repeated_BT: np.ndarray
    flagged_B: np.ndarray
    grades: Sequence[Grade | None]
    texts: list[str]
    external: Rewards | None = None
    teacher_B: np.ndarray | None = None

    @property
    def rewards(self) -> Rewards:
        """The reward of each rollout, from 0 to 1, and whether it is known."""
        return rewards.of_verdicts(self.grades) if self.external is None else self.external

    @property
    def graded_B(self) -> np.ndarray:
        """Rollouts with a grade that decides whether they are correct; a time-out does not."""
        return np.array([decided(grade) for grade in self.grades])

    @property
    def correct_B(self) -> np.ndarray:
        """Rollouts whose answer is correct; known only where `graded_B` is true."""
        return np.array([grade is Grade.CORRECT for grade in self.grades])

    def reward(self, group: int) -> Reward:
        """`rewards` as terms and gates read them, with `group` adjacent rollouts per prompt."""
        found = self.rewards
        return Reward(found.reward_B, group, found.known_B)

    def with_rewards(self, lines: list[dict]) -> list[dict]:
        """Return lines of rollouts.jsonl with the reward of each rollout, where it is no verdict."""
        external = self.external
        if external is None:
            return lines
        return [line | {"reward": external.shown(i)} for i, line in enumerate(lines)]


class Collector:
    """Collect `Experience` according to the config; stateless between steps."""

    def __init__(
        self,
        setup: Setup,
        functions: StepFunctions,
        grader: Grader,
        pool: RewardPool | None = None,
        teachers: Teachers | None = None,
    ):
        self.setup, self.config, self.grader, self.pool = setup, setup.config, grader, pool
        self.functions, self.teachers = functions, teachers
        self._background = ThreadPoolExecutor(max_workers=1)  # decodes and grades

    def collect(
        self,
        student: models.Params,
        teacher: models.Params | None,
        batch: data.Batch,
        *,
        key: jax.Array,
        clock: Clock,
        reference: models.Params | None = None,
        budget: int | None = None,
    ) -> Experience:
        """Roll out, score, grade. All weights are in their compute dtypes; of several teachers none is read.

        `budget`: response tokens of this step; None for rollout.max_response_tokens.
        Raises RewardError where a reward function fails and the config does not leave its rollouts out.
        """
        group = self.config.rollout.samples_per_prompt
        with stage("rollout"):
            grouped = [prompt for prompt in batch.prompts for _ in range(group)]
            rollout = self.functions.generate(student, grouped, key, budget)
        clock.lap("rollout", rollout.response_length_B.sum())
        teacher_rows = self._teacher_rows(rollout, batch.teacher_prompts)
        reading = self._background.submit(self._read, rollout, batch.problems)  # while models score
        teacher_B = None
        with stage("score"):
            if self.teachers:
                assert not isinstance(teacher_rows, TextRows), "refused by open_others"
                teacher_B = self.teachers.of(batch.problems, group=group)
                scores = self.teachers.score(student, rollout, teacher_rows, teacher_B, reference)
            else:
                scores = self.functions.score(student, teacher, rollout, teacher_rows, reference)
        clock.lap("score", rollout.response_length_B.sum())
        with stage("read"):
            read, asked = reading.result()
            if multihost.several():  # an answer that timed out in one might not in another
                told = multihost.from_first(lambda: [g and g.value for g in read.grades])
                grades = [value and Grade(value) for value in told]
                read = dataclasses.replace(read, grades=grades)
            external = None
            if self.config.reward.column:
                column = self.config.reward.column
                external = rewards.of_column(batch.problems, column, group=group)
            elif self.config.reward.function:
                external = rewards.of_answers(
                    multihost.from_first(lambda: asked), on_error=self.config.reward.on_error
                )
            experience = self.understand(rollout, scores, read, external)
            return dataclasses.replace(experience, teacher_B=teacher_B)

    def recall(self, student: models.Params, recorded: Recorded, *, clock: Clock) -> Experience:
        """Score recorded rollouts with the student's compute weights; the teacher's scores are recorded."""
        rollout = recorded.rollout
        with stage("score"):
            scores = recorded.scores(self.functions.score(student, None, rollout))
        clock.lap("score", rollout.response_length_B.sum())
        with stage("read"):
            read, _ = self._read(rollout, None)
            read = dataclasses.replace(read, grades=recorded.grades)
            return self.understand(rollout, scores, read, recorded.rewards)

    def understand(
        self, rollout: Rollout, scores: Scores, read: Responses, external: Rewards | None = None
    ) -> Experience:
        """Mark the tokens that count and those that repeat."""
        section, alignment = self.config.metrics, self.setup.alignment
        mask_BT = rows.scored_mask(rollout, alignment.counted, self.setup.first_pieces)
        if scores.spans is not None:  # a span counts where all of its tokens do
            mask_BT = spans.closed(mask_BT=mask_BT, span_BT=scores.spans.span_BT)
        repeated_BT = repetition.repeated_mask(
            rollout,
            read.flagged_B,
            rule=section.repeated_tokens,
            tail=section.repetition_tail,
            ngram=section.repeated_ngram,
            decode=self.setup.tokenizer.decode,
        )
        return Experience(
            rollout=rollout,
            scores=scores,
            mask_BT=mask_BT,
            repeated_BT=repeated_BT,
            flagged_B=read.flagged_B,
            grades=read.grades,
            texts=read.texts,
            external=external,
        )

    def measure(self, experience: Experience) -> dict[str, float]:
        """Return the metrics `rollout/*` and `score/*`."""
        section, rollout = self.config.metrics, self.config.rollout
        has_grades = any(experience.grades)
        findings = metrics.Findings(
            experience.texts, experience.mask_BT, experience.repeated_BT, experience.flagged_B,
            correct_B=experience.correct_B if has_grades else None, graded_B=experience.graded_B,
        )  # fmt: skip
        row = metrics.step_metrics(
            experience.rollout, experience.scores, findings, positions=section.positions,
            hedging=section.hedging, max_response_tokens=rollout.max_response_tokens,
            stops_on_repetition=rollout.stop_on_repetition > 0,
        )  # fmt: skip
        if has_grades:
            row["rollout/grading_timeouts"] = float(experience.grades.count(Grade.TIMEOUT))
        if self.teachers:
            row |= self.teachers.metrics(
                experience.scores, experience.mask_BT, experience.teacher_B
            )
        return row | experience.rewards.metrics()

    def _teacher_rows(
        self, rollout: Rollout, prompts: Sequence[Sequence[int]] | None
    ) -> TeacherRows | TextRows | None:
        """Return the rollouts as the teacher reads them; None where it reads the student's rows."""
        setup, samples = self.setup, self.config.rollout.samples_per_prompt
        if prompts is None:
            return None
        grouped = [list(prompt) for prompt in prompts for _ in range(samples)]
        width = setup.teacher_width
        if setup.reader is not None:
            return span_scores.text_rows(
                rollout, grouped, setup.reader, width=width, response=setup.teacher_response
            )
        return rows.teacher_rows(rollout, grouped, setup.alignment.teacher_ids, width=width)

    def _read(
        self, rollout: Rollout, problems: Sequence[data.Problem] | None
    ) -> tuple[Responses, dict[str, Any] | None]:
        """Decode, grade and flag the responses, and ask the reward function about them.

        Of several processes only the first one grades and asks; without `problems`, none does.
        """
        group = self.config.rollout.samples_per_prompt
        answers = [""] * len(rollout.length_B)
        if problems is not None:
            answers = [problem.answer for problem in problems for _ in range(group)]
        read = read_responses(
            rollout.responses(),
            answers,
            self.setup.tokenizer,
            grader=self.grader if problems is not None and multihost.first() else None,
            repetition=metrics.make_repetition_rule(self.config.metrics),
        )
        if self.pool is None or problems is None:
            return read, None
        return read, rewards.asked(self.pool, problems, read.texts)
