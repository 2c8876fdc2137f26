"""The compiled functions of a training step, wired in one place.

A run, its memory plan and the benchmarks all call `make_step_functions`, so the planned and measured
step is the one that trains. It needs the numbers of a config and architectures, but no weights, tokenizer
or data.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from opd_jax import losses, scoring
from opd_jax.aot import Program
from opd_jax.models import Model, Params, decoder
from opd_jax.rollout import programs as rollout_programs
from opd_jax.rollout import row_keys, sample_responses
from opd_jax.scoring import Models
from opd_jax.sharding.partition import unwrapped
from opd_jax.training import blank_rows, objective, span_scores, update
from opd_jax.training.optimizer import make_optimizer, make_schedule
from opd_jax.training.step_spec import StepSpec
from opd_jax.types import (
    Frozen,
    Rollout,
    Scores,
    TeacherRows,
    TextRows,
    TrainState,
)


@dataclasses.dataclass(frozen=True)
class StepFunctions:
    """The stages of a step as functions of arrays; see `make_step_functions`.

    Attributes:
      schedule: learning rate by the number of applied updates.
      accumulate: gradients of the loss, summed over micro-batches.
      update: gradients and AdamW; donates the state.
    """

    spec: StepSpec
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    accumulate: update.Gradients
    update: update.Update

    def initial_state(self, student: Params) -> TrainState:
        """The state before the first update; takes the buffers of `student` over."""
        return self.spec.mesh.init_masters(self._begin, student)

    def abstract_state(self) -> TrainState:
        """Return shapes, dtypes and shardings of the state."""
        state = jax.eval_shape(self._begin, decoder.abstract_params(self.spec.student))
        return self.spec.mesh.structs(state, self.spec.mesh.masters(state))

    def compute_weights(self, masters: Params) -> Params:
        """Reshard and cast float32 weights to the student's compute weights."""
        return self.spec.mesh.compute_weights(masters, self.spec.dtype)

    def teacher_weights(
        self, scorer: Params | None, state: TrainState, student: Params | None = None
    ) -> Params | None:
        """The weights that score: the frozen `scorer`, the student's average or copy, or the student's own.

        `student`: the student's compute weights, where they exist already. None without a teacher.
        """
        if scorer is not None or self.spec.teacher is None:
            return scorer
        if state.average is None and student is not None:
            return student
        return self.compute_weights(state.params if state.average is None else state.average)

    def generate(
        self,
        student: Params,
        prompts: Sequence[Sequence[int]],
        key: jax.Array,
        budget: int | None = None,
    ) -> Rollout:
        """Sample one response to each prompt from the student's compute weights.

        `budget`: tokens that a response of this step may have; None for rollout.max_response_tokens, the
        most. It is an argument of the compiled programs: another one compiles nothing.
        """
        spec = self.spec
        sampling = spec.sampling
        if budget is not None:
            sampling = sampling.replace(max_response_tokens=budget)
        return sample_responses(
            Model(spec.student, student), prompts, sampling,
            keys=row_keys(key, len(prompts)), batching=spec.batching,
        )  # fmt: skip

    def write(self, student: Params, prompts: Sequence[Sequence[int]], key: jax.Array) -> Rollout:
        """Sample what the student writes for the teacher's prompts, in budgets of its own."""
        spec = self.spec
        sampling = spec.sampling.replace(max_response_tokens=spec.config.harness.max_tokens)
        return sample_responses(
            Model(spec.student, student), prompts, sampling,
            keys=row_keys(key, len(prompts)), batching=spec.harness_batching,
        )  # fmt: skip

    def score(
        self,
        student: Params,
        teacher: Params | None,
        rollout: Rollout,
        teacher_rows: TeacherRows | TextRows | None = None,
        reference: Params | None = None,
        batch: int | None = None,
    ) -> Scores:
        """Score rollouts with the student and, where a term needs them, teacher and reference.

        A teacher with another tokenizer scores rows of its own, and is compared by spans of text. With
        `batch` the micro-batches are those of so many rows, whatever the number here is.
        """
        spec = self.spec
        if isinstance(teacher_rows, TextRows):
            return self._score_text(student, teacher, rollout, teacher_rows)
        return scoring.score(
            spec.models(student, teacher, reference), rollout.tokens_BT, rollout.length_B, spec.scoring,
            first_B=rollout.prompt_length_B, teacher_rows=teacher_rows,
            microbatch_tokens=spec.config.optim.microbatch_tokens, mesh=spec.mesh, batch=batch,
        )  # fmt: skip

    def score_golden(
        self,
        student: Params,
        teacher: Params | None,
        golden: Rollout,
        teacher_rows: TeacherRows | None = None,
        batch: int | None = None,
    ) -> Scores:
        """Score golden solutions (`batch.as_rollout`) with student and teacher, for their divergence."""
        spec = self.spec
        return scoring.score(
            spec.models(student, teacher), golden.tokens_BT, golden.length_B, spec.golden_scoring,
            first_B=golden.prompt_length_B, teacher_rows=teacher_rows,
            microbatch_tokens=spec.config.optim.microbatch_tokens, mesh=spec.mesh, batch=batch,
        )  # fmt: skip

    def blank_golden_scores(self, student: Params, teacher: Params | None, count: int) -> Scores:
        """Return zeros with the shapes and dtypes of the scores of so many golden solutions."""
        models = self.spec.models(unwrapped(student), unwrapped(teacher))
        return blank_rows.row_scores(self.spec, models, self.spec.golden_scoring, count)

    def _score_text(
        self, student: Params, teacher: Params | None, rollout: Rollout, rows: TextRows
    ) -> Scores:
        """Score rollouts with the student, and the teacher's rows of them with the teacher; join by spans."""
        spec = self.spec
        models = spec.models(student, teacher)
        assert models.teacher is not None, "the rows of a teacher: there is none"
        assert spec.text_scoring is not None
        more: dict[str, Any] = {
            "microbatch_tokens": spec.config.optim.microbatch_tokens, "mesh": spec.mesh,
        }  # fmt: skip
        mine = scoring.score(
            Models(models.student), rollout.tokens_BT, rollout.length_B, spec.scoring,
            first_B=rollout.prompt_length_B, **more,
        )  # fmt: skip
        theirs = scoring.score(
            Models(models.teacher), rows.tokens_BT, rows.length_B, spec.text_scoring,
            first_B=rows.first_B, **more,
        )  # fmt: skip
        compared = spec.terms.span_events if spec.terms.over_vocabulary else None
        return span_scores.joined(mine, theirs, rows, compared=compared)

    def weigh(self, counted_BT: np.ndarray) -> Any:
        """Return the weight of each rollout token in the loss; see `losses.token_weights`."""
        aggregation, length = (
            self.spec.config.loss.aggregation,
            self.spec.config.rollout.max_response_tokens,
        )
        return losses.token_weights(counted_BT, aggregation=aggregation, length=length)

    def weigh_golden(self, counted_BT: np.ndarray) -> Any:
        """Return the weight of each token of a golden solution in the loss."""
        return losses.token_weights(counted_BT, aggregation=self.spec.config.loss.gold_aggregation)

    def programs(
        self,
        teacher: Any,
        reference: Any,
        weights: Mapping[str, float],
        others: Sequence[Any] = (),
    ) -> list[Program]:
        """Return every program that a step compiles, whatever the lengths of its rows.

        `teacher`, `reference`: their weights, or shapes, dtypes and shardings of these; None where no term
        needs the model, and for a teacher that follows the student. `weights`: of the terms. `others`: of
        further teachers.
        """
        spec, mesh, terms = self.spec, self.spec.mesh, self.spec.terms
        state = self.abstract_state()
        student = jax.eval_shape(partial(mesh.compute_weights, dtype=spec.dtype), state.params)
        student = mesh.structs(student, mesh.weights(student))
        if teacher is None and spec.teacher is not None:
            teacher = student
        elif teacher is not None:
            teacher = mesh.structs(teacher, mesh.weights(teacher))
        further = self._further(teacher, others)
        out = mesh.weight_programs(state.params, spec.dtype)
        rollout_rows = golden_rows = None
        if terms.needs_rollouts:
            rollout_rows = blank_rows.rollout_rows(spec, student, teacher, reference)
            models = spec.models(student, teacher, reference)
            if not spec.replayed:
                out += rollout_programs(
                    models.student, spec.rollouts, spec.sampling, batching=spec.batching
                )
                out += self._harness_programs(models.student)
            out += self._score_programs(models)
            for spec_k, other, name in further:
                scored = self._score_programs(spec_k.models(student, other, reference))
                out += [dataclasses.replace(one, name=one.name + name) for one in scored]
        if terms.golden_divergence:
            for spec_k, other, name in [(spec, teacher, ""), *further]:
                scored = scoring.programs(
                    spec_k.models(student, other),
                    spec.scored_together(spec.config.rollout.prompts_per_step), spec.width,
                    spec.golden_scoring, teacher_width=spec.teacher_width,
                    microbatch_tokens=spec.config.optim.microbatch_tokens, mesh=mesh,
                )  # fmt: skip
                out += [dataclasses.replace(one, name=f"golden {one.name}{name}") for one in scored]
        if terms.needs_golden:
            golden_rows = blank_rows.golden_rows(spec, student, teacher)
        head = decoder.head_alone(teacher) if teacher and terms.reads_head else None
        frozen = Frozen(reference if "reference_kl" in terms.names else None, head)
        frozen = mesh.structs(frozen, mesh.weights(frozen))
        params = state.params if mesh.devices is None else student
        out += self.accumulate.programs(params, frozen, rollout_rows, golden_rows, weights)
        limited = bool(spec.config.guard.spike) and spec.config.guard.spike_action == "skip"
        return [*out, self.update.program(state, limited=limited)]

    def _further(self, teacher: Any, others: Sequence[Any]) -> list[tuple[StepSpec, Any, str]]:
        """Return spec, abstract weights and a name for each teacher that needs programs of its own.

        Teachers of one architecture, down to their end tokens, share programs.
        """
        mesh, seen, found = self.spec.mesh, [(self.spec.teacher, _structure(teacher))], []
        for index, weights in enumerate(others, start=1):
            one = mesh.structs(weights, mesh.weights(weights))
            spec = self.spec.taught_by(index)
            if (spec.teacher, _structure(one)) not in seen:
                seen.append((spec.teacher, _structure(one)))
                found.append((spec, one, f", teacher {index + 1}"))
        return found

    def _harness_programs(self, student: Model) -> list[Program]:
        """Return the programs of `write` that rollouts do not have as well."""
        spec, section = self.spec, self.spec.config.harness
        if not section.prompt:
            return []
        prompts = spec.config.rollout.prompts_per_step
        sampling = spec.sampling.replace(max_response_tokens=section.max_tokens)
        rollout = spec.config.rollout
        if (prompts, section.max_prompt_tokens, section.max_tokens) == (
            spec.rollouts, rollout.max_prompt_tokens, rollout.max_response_tokens,
        ):  # fmt: skip
            return []
        found = rollout_programs(student, prompts, sampling, batching=spec.harness_batching)
        return [
            dataclasses.replace(one, name=f"harness {one.name}")
            for one in found
            if one.name != "unstack"
        ]

    def _score_programs(self, models: Models) -> list[Program]:
        """Return the programs that score: all models together, or each on its own rows."""
        spec = self.spec
        more: dict[str, Any] = {
            "microbatch_tokens": spec.config.optim.microbatch_tokens, "mesh": spec.mesh,
        }  # fmt: skip
        if spec.text_scoring is None:
            return scoring.programs(
                models,
                spec.scored_together(spec.rollouts),
                spec.width,
                spec.scoring,
                teacher_width=spec.teacher_width,
                **more,
            )
        assert models.teacher is not None, "the rows of a teacher: there is none"
        out = []
        for whose, model, width, asked in (
            ("", models.student, spec.width, spec.scoring),
            ("teacher: ", models.teacher, spec.teacher_width, spec.text_scoring),
        ):
            found = scoring.programs(Models(model), spec.rollouts, width, asked, **more)
            out += [dataclasses.replace(one, name=whose + one.name) for one in found]
        return out

    @property
    def _begin(self) -> Any:
        average = self.spec.config.teacher.follow in ("average", "every")
        return partial(update.init_state, tx=self.optimizer, average=average)


def _structure(tree: Any) -> tuple[Any, list[Any]]:
    """Return what jit reads of a tree of arrays or abstract ones."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]


def make_step_functions(spec: StepSpec) -> StepFunctions:
    """Wire sampler, scorer, losses and optimizer. Nothing compiles before its first call."""
    optim = spec.config.optim
    shared: dict[str, Any] = {"token_chunk": optim.token_chunk, "remat": optim.remat}
    rollout_loss = golden_loss = None
    if spec.terms.needs_rollouts:
        rollout_loss = objective.make_rollout_loss(
            spec.terms, spec.student, spec.reference, events=spec.events, span_term=spec.span_term,
            **shared,
        )  # fmt: skip
    if spec.terms.needs_golden:
        golden_loss = objective.make_golden_loss(
            spec.terms, spec.student, events=spec.events, **shared
        )
    accumulate = update.make_accumulate(
        rollout_loss, golden_loss,
        microbatch_tokens=optim.microbatch_tokens, dtype=spec.dtype, mesh=spec.mesh, tile=spec.tile,
    )  # fmt: skip
    updates = spec.config.steps * optim.updates_per_rollout
    optimizer = make_optimizer(optim, updates)
    teacher = spec.config.teacher
    return StepFunctions(
        spec=spec,
        optimizer=optimizer,
        schedule=make_schedule(optim, updates),
        accumulate=accumulate,
        update=update.make_update(
            optimizer,
            accumulate,
            decay=teacher.decay,
            mesh=spec.mesh,
            every=teacher.every if teacher.follow == "every" else 0,
        ),
    )
