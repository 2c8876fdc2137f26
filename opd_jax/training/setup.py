"""The record of a checked config and what follows from it; see make_setup.py."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from opd_jax import data, hardware, models
from opd_jax.sharding.mesh import Mesh
from opd_jax.training.model_limits import teacher_response
from opd_jax.training.other_teachers import OtherTeacher
from opd_jax.training.replay import Replay
from opd_jax.training.roles import (
    compute_dtype,
)
from opd_jax.training.step_spec import StepSpec
from opd_jax.training.terms import Terms


@dataclasses.dataclass(frozen=True)
class Setup:
    """A checked config and what follows from it.

    Attributes:
      config: the config with `steps` resolved. mesh: the devices.
      student, teacher: architectures; teacher is None where no term needs one.
      reference: architecture of the reference; `reference_section.path` holds its weights.
      tokenizer, teacher_tokenizer: of student and teacher (the same object without a teacher).
      student_style, teacher_style: prompt templates of both.
      separate_prompts: whether the teacher reads prompts or ids of its own.
      alignment: which ids mean the same to both.
      reader: how a teacher with another tokenizer reads responses; None where the two share ids.
      first_pieces: groups of ids whose first occurrence in a response is not scored.
      golden_end: end token of golden solutions.
      width, teacher_width: tokens of a row, prompt and response together.
      train, held_out: problems. prompts, teacher_prompts: ids of the held-out problems' prompts.
      jump_problems, jump_prompts: training problems that are held for jumps, and their prompts.
      notes: lines for the start of the run.
      replay: the recording that training reads instead of sampling; None without. Then there is no teacher.
      others: further teachers, which read what the first one reads.
      harness_style: template of the prompt to which the student writes for the teacher; None without.
    """

    config: ConfigDict
    mesh: Mesh
    terms: Terms
    student: models.ModelConfig
    teacher: models.ModelConfig | None
    reference: models.ModelConfig
    reference_section: Any
    tokenizer: data.Tokenizer
    teacher_tokenizer: data.Tokenizer
    student_style: data.PromptStyle
    teacher_style: data.PromptStyle
    separate_prompts: bool
    alignment: data.Alignment
    reader: data.Reader | None
    first_pieces: tuple[tuple[int, ...], ...]
    golden_end: int
    width: int
    teacher_width: int
    train: Sequence[data.Problem]
    held_out: Sequence[data.Problem]
    prompts: list[list[int]]
    teacher_prompts: list[list[int]]
    jump_problems: list[data.Problem]
    jump_prompts: list[list[int]]
    notes: list[str]
    replay: Replay | None = None
    others: tuple[OtherTeacher, ...] = ()
    harness_style: data.PromptStyle | None = None

    @property
    def spec(self) -> StepSpec:
        """Everything that decides which programs a step compiles."""
        return StepSpec(
            config=self.config,
            terms=self.terms,
            student=self.student,
            teacher=self.teacher,
            reference=self.reference,
            alignment=self.alignment,
            dtype=compute_dtype(self.config.student.dtype),
            teacher_width=self.teacher_width if self.separate_prompts else 0,
            mesh=self.mesh,
            tile=hardware.tile(gpu=jax.default_backend() == "gpu"),
            replayed=self.replay is not None,
            others=tuple(other.model for other in self.others),
        )

    @property
    def teacher_response(self) -> int:
        """Most tokens of a response in the teacher's rows."""
        return teacher_response(self.config, spans=self.reader is not None)

    @property
    def harness_room(self) -> int:
        """Tokens that the teacher's prompts have for what the student writes; 0 without a harness."""
        return self.config.harness.max_tokens if self.harness_style is not None else 0

    def read(self, problems: list[data.Problem]) -> data.Batch:
        """Tokenize the problems of a step; what the student writes for the teacher is empty here."""
        teacher_prompts, golden = None, []
        if self.separate_prompts:
            teacher_prompts = self.teacher_style.prompts(problems, self.teacher_tokenizer)
        if self.terms.needs_golden:
            solutions = self.student_style.golden(problems, self.tokenizer)
            golden = [[*ids, self.golden_end] for ids in solutions]
        prompts = self.student_style.prompts(problems, self.tokenizer)
        return data.Batch(problems, prompts, teacher_prompts, golden)
