"""Roll out a batch of prompts, score it with student and teacher, grade it."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from opd_jax import data, metrics, models
from opd_jax.grading.grader import Grade, Grader, decided
from opd_jax.losses import spans
from opd_jax.metrics import repetition
from opd_jax.metrics.timing import Clock
from opd_jax.metrics.tracing import stage
from opd_jax.rollout import Responses, read_responses
from opd_jax.sharding import multihost
from opd_jax.training import batch as rows
from opd_jax.training import span_scores
from opd_jax.training.setup import Setup
from opd_jax.training.step_functions import StepFunctions
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
    """

    rollout: Rollout
    scores: Scores
    mask_BT: np.ndarray
    repeated_BT: np.ndarray
    flagged_B: np.ndarray
    grades: Sequence[Grade | None]
    texts: list[str]

    @property
    def graded_B(self) -> np.ndarray:
        """Rollouts with a grade that decides whether they are correct; a time-out does not."""
        return np.array([decided(grade) for grade in self.grades])

    @property
    def correct_B(self) -> np.ndarray:
        """Rollouts whose answer is correct; known only where `graded_B` is true."""
        return np.array([grade is Grade.CORRECT for grade in self.grades])

    def reward(self, group: int) -> rows.Reward:
        """The reward of each rollout, 1 where it is correct, of `group` adjacent ones per prompt."""
        return rows.Reward(self.correct_B, group, self.graded_B)


class Collector:
    """Collect `Experience` according to the config; stateless between steps."""

    def __init__(self, setup: Setup, functions: StepFunctions, grader: Grader):
        self.setup, self.config, self.grader = setup, setup.config, grader
        self.functions = functions
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
        """Roll out, score, grade. All weights are in their compute dtypes.

        `budget`: response tokens of this step; None for rollout.max_response_tokens.
        """
        group = self.config.rollout.samples_per_prompt
        with stage("rollout"):
            grouped = [prompt for prompt in batch.prompts for _ in range(group)]
            rollout = self.functions.generate(student, grouped, key, budget)
        clock.lap("rollout", rollout.response_length_B.sum())
        teacher_rows = self._teacher_rows(rollout, batch.teacher_prompts)
        answers = [problem.answer for problem in batch.problems for _ in range(group)]
        reading = self._background.submit(self._read, rollout, answers)  # while the models score
        with stage("score"):
            scores = self.functions.score(student, teacher, rollout, teacher_rows, reference)
        clock.lap("score", rollout.response_length_B.sum())
        with stage("read"):
            read = reading.result()
            if multihost.several():  # an answer that timed out in one might not in another
                told = multihost.from_first(lambda: [g and g.value for g in read.grades])
                grades = [value and Grade(value) for value in told]
                read = dataclasses.replace(read, grades=grades)
            return self.understand(rollout, scores, read)

    def understand(self, rollout: Rollout, scores: Scores, read: Responses) -> Experience:
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
        return row

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

    def _read(self, rollout: Rollout, answers: list[str]) -> Responses:
        """Decode, grade and flag the responses; of several processes only the first one grades."""
        return read_responses(
            rollout.responses(),
            answers,
            self.setup.tokenizer,
            grader=self.grader if multihost.first() else None,
            repetition=metrics.make_repetition_rule(self.config.metrics),
        )
