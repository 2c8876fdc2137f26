"""What decides the programs of a training step: a config's numbers, architectures, ids and devices."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from opd_jax import data
from opd_jax.models import Model, ModelConfig, Params
from opd_jax.models.end_tokens import Events
from opd_jax.rollout import Batching, SamplingParams
from opd_jax.scoring import Models, ScoreSpec
from opd_jax.sharding.mesh import ONE, Mesh
from opd_jax.training.span_objective import SpanTerm
from opd_jax.training.terms import Terms


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Everything that decides what a training step compiles.

    Attributes:
      config: only the sections rollout, harness, scoring, loss, optim, teacher and teachers, and `steps`,
        are read.
      terms: the loss.
      student, teacher, reference: architectures; None where no term needs the model.
      alignment: the ids that are sampled, those that are scored, and the end tokens.
      dtype: compute dtype of the student.
      teacher_width: tokens of the teacher's own rows; 0 where it reads the student's.
      mesh: the devices.
      tile: widths of batches are multiples of it (hardware.tile).
      replayed: whether rollouts are read from a recording; then there is no teacher.
      others: architectures of further teachers.
    """

    config: ConfigDict
    terms: Terms
    student: ModelConfig
    teacher: ModelConfig | None
    reference: ModelConfig | None
    alignment: data.Alignment
    dtype: Any
    teacher_width: int = 0
    mesh: Mesh = ONE
    tile: int = 1
    replayed: bool = False
    others: tuple[ModelConfig, ...] = ()

    @property
    def teachers(self) -> tuple[ModelConfig | None, ...]:
        """The architectures of all teachers."""
        return (self.teacher, *self.others)

    def taught_by(self, index: int) -> "StepSpec":
        """Return what one of the teachers compiles."""
        return dataclasses.replace(self, teacher=self.teachers[index], others=())

    def scored_together(self, rows: int) -> int:
        """Return of how many rows the micro-batches of scoring are made, of so many of a step.

        It is an even share of them where there are several teachers and each row has one.
        """
        routed = bool(self.others and self.config.teachers.column)
        return -(-rows // len(self.teachers)) if routed else rows

    @property
    def width(self) -> int:
        """Tokens of a row: prompt and response."""
        return self.config.rollout.max_prompt_tokens + self.config.rollout.max_response_tokens

    @property
    def rollouts(self) -> int:
        """Rollouts of a step."""
        return self.config.rollout.prompts_per_step * self.config.rollout.samples_per_prompt

    @property
    def events(self) -> Events:
        """The outcomes over which the sampler, the scorer and the losses normalise log-probs."""
        return _events(self.alignment, self.config.scoring.temperature)

    @property
    def sampling(self) -> SamplingParams:
        """How the student's rollouts are sampled."""
        section, alignment = self.config.rollout, self.alignment
        return SamplingParams(
            section.max_response_tokens,
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            stop_ids=alignment.stop_ids,
            vocabulary=alignment.vocabulary,
            drawn_V=None if alignment.drawn.all() else alignment.drawn,
            events=self.events,
            stop_on_repetition=section.stop_on_repetition,
            repetition_period=section.repetition_period,
        )

    @property
    def batching(self) -> Batching:
        """How rollouts are batched while they decode."""
        section = self.config.rollout
        return Batching(
            slots=section.slots or None,
            max_prompt_tokens=section.max_prompt_tokens,
            largest_budget=section.max_response_tokens,
            mesh=self.mesh,
            tile=self.tile,
        )

    @property
    def harness_batching(self) -> Batching:
        """How what the student writes for the teacher is batched; its budgets are its own."""
        section = self.config.harness
        return dataclasses.replace(
            self.batching,
            max_prompt_tokens=section.max_prompt_tokens,
            largest_budget=section.max_tokens,
        )

    @property
    def scoring(self) -> ScoreSpec:
        """What is computed of each token of the rollouts."""
        return ScoreSpec(
            top_k=self.config.scoring.overlap_top_k,
            token_chunk=self.config.scoring.token_chunk,
            events=self.events,
            support=self.terms.scored_support,
            statistic=self.terms.scored_statistic,
            keep_hidden=self.terms.over_vocabulary and self.alignment.teacher is None,
            tile=self.tile,
        )

    @property
    def golden_scoring(self) -> ScoreSpec:
        """What is computed of each token of golden solutions."""
        terms = self.terms
        return self.scoring.replace(
            support=terms.golden_scored_support,
            statistic=None,
            keep_hidden=terms.golden_over_vocabulary,
        )

    @property
    def text_scoring(self) -> ScoreSpec | None:
        """What is computed of each token of the rows of a teacher with another tokenizer, if there is one."""
        own = self.alignment.teacher
        if own is None:
            return None
        section = self.config.scoring
        return ScoreSpec(
            top_k=1,
            token_chunk=section.token_chunk,
            events=_events(own, section.temperature),
            keep_hidden=self.terms.over_vocabulary,
            tile=self.tile,
        )

    @property
    def span_term(self) -> SpanTerm | None:
        """The divergence by spans of text, where the teacher has another tokenizer and a term has one."""
        own, terms = self.alignment.teacher, self.terms
        if own is None or not terms.over_vocabulary:
            return None
        assert self.alignment.shared is not None
        return SpanTerm(
            compared=terms.span_events,
            of=terms.on_rollouts,
            shared=self.alignment.shared,
            teacher_events=_events(own, self.config.scoring.temperature),
            teacher_ids=int(own.scored.sum()),
        )

    def models(
        self, student: Params, teacher: Params | None, reference: Params | None = None
    ) -> Models:
        """The models that score rollouts, with their architectures; weights may be shapes and dtypes alone.

        The reference is among them only where a term scores rollouts with it.
        """
        if not self.terms.scores_reference:
            reference = None
        return Models(
            Model(self.student, student),
            _model(self.teacher, teacher),
            _model(self.reference, reference),
        )


def _events(ids: data.Alignment, temperature: float) -> Events:
    """Return the outcomes over which log-probs are normalised."""
    return Events(
        vocabulary=ids.vocabulary,
        scored_V=None if ids.scored.all() else ids.scored,
        ends=None if ids.ends is None or ids.ends.one_token else ids.ends,
        temperature=temperature,
    )


def _model(config: ModelConfig | None, params: Params | None) -> Model | None:
    """Join weights to their architecture; None without weights."""
    if params is None:
        return None
    assert config is not None
    return Model(config, params)
