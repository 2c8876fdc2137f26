"""One training step: roll out a batch of prompts, score, grade, update. Stateless between steps."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import data, models
from opd_jax.grading.grader import Grader
from opd_jax.grading.rewards import RewardPool
from opd_jax.metrics.timing import Clock, peak_gib
from opd_jax.metrics.tracing import stage
from opd_jax.models import decoder
from opd_jax.rng import Stream, key_for
from opd_jax.training import batch as rows
from opd_jax.training import low_kl, nonfinite, update, variants
from opd_jax.training.advantages import advantages
from opd_jax.training.experience import Collector, Experience
from opd_jax.training.harness import Harness
from opd_jax.training.recording import drift
from opd_jax.training.setup import Setup
from opd_jax.training.step_functions import StepFunctions
from opd_jax.training.teachers import Teachers
from opd_jax.training.terms import ON_GOLDEN, Terms
from opd_jax.training.token_factor import divergence_gate, measured, token_factor
from opd_jax.training.weights import Weights
from opd_jax.types import Frozen, GoldenRows, RolloutRows, TrainState

Summary = dict[str, float]


@dataclasses.dataclass(frozen=True)
class StepState:
    """What a step changes and a checkpoint holds.

    Attributes:
      train: parameters and optimizer state. The next step donates its buffers.
      numerics: updates skipped so far, and the running mean of gradient norms.
      past_kl: the past rollouts that decide where the low-KL cut is.
    """

    train: TrainState
    numerics: nonfinite.State = dataclasses.field(default_factory=nonfinite.State)
    past_kl: low_kl.State = dataclasses.field(default_factory=low_kl.State)


@dataclasses.dataclass(frozen=True)
class _Updates:
    """The updates of a step.

    Attributes:
      measured: measurements of the applied updates. news: metrics of skipped updates, and of spikes.
      inputs, in_flight: of the last update, which the device may not have finished.
    """

    measured: tuple[dict[str, jax.Array], ...] = ()
    news: Summary = dataclasses.field(default_factory=dict)
    inputs: Any = None
    in_flight: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


class Step:
    """step(number, state, batch, weights) -> (state, metrics, lines of rollouts.jsonl).

    It holds the constants of a run: the compiled functions, the frozen models, the grader.
    """

    def __init__(
        self,
        setup: Setup,
        functions: StepFunctions,
        weights: Weights,
        grader: Grader,
        folder: pathlib.Path,
        pool: RewardPool | None = None,
    ):
        self.setup, self.config, self.functions = setup, setup.config, functions
        self.weights, self.folder = weights, folder
        self.teachers = Teachers(setup, functions, weights)
        self.harness = Harness(setup, functions)
        self.collector = Collector(setup, functions, grader, pool, self.teachers)
        self.rules = nonfinite.make_rules(setup.config.guard)
        self.cut = low_kl.make_rules(setup.config.loss)

    def __call__(
        self,
        number: int,
        state: StepState,
        batch: data.Batch,
        weights: Mapping[str, float],
        *,
        masking: bool = False,
        budget: int | None = None,
    ) -> tuple[StepState, Summary, list[dict]]:
        """Train on one batch of prompts.

        `number` counts batches of prompts, `state.train.step` the updates that were applied; the learning
        rate follows the latter. A skipped update and a batch whose rollouts cannot be used have the same
        effect: parameters and optimizer do not change. `weights` are those of the terms, `masking` masks
        repetitive tails in the loss: the collapse guard sets both. `budget` is the number of tokens that a
        response may have at this step; None for rollout.max_response_tokens.

        Raises NonFiniteError where more updates would be skipped than the config allows.
        """
        terms, clock = self.setup.terms, Clock()
        before = update.applied(state.train)
        experience = rollout_rows = golden_rows = student = teacher = None
        metrics, lines, tokens = Summary(), list[dict](), 0.0
        if terms.needs_rollouts or terms.golden_divergence:
            student, teacher = self._scorers(state.train)
        if terms.needs_rollouts:
            assert student is not None
            batch, written = self.harness(number, student, batch, clock)
            experience = self._collect(number, student, teacher, batch, clock, budget)
            with stage("rows"):
                state, kept_BT, metrics = self._cut_low_kl(state, experience)
                rollout_rows, lines, news = self._rollout_rows(
                    number, experience, batch, masking, kept_BT
                )
                lines = self.harness.lines(lines, batch)
                metrics |= measured(rollout_rows) | news | written
            if self.setup.replay is not None:
                metrics["replay/age"] = float(before)
                metrics |= drift(experience.rollout, experience.scores, experience.mask_BT)
        if batch.golden and any(weights[name] for name in ON_GOLDEN):
            golden_rows = self._golden_rows(batch, weights, student, teacher, clock)
            tokens += sum(map(len, batch.golden))
        reference = self.weights.reference if "reference_kl" in terms.names else None
        frozen = Frozen(reference, self._head(teacher))
        del teacher
        if self.setup.mesh.devices is None:
            student = None  # on one device the update casts layer by layer
        inputs = update.Inputs(frozen, rollout_rows, golden_rows, weights)
        unusable = False
        if experience is not None:
            state, news, unusable = self._check_scores(number, state, experience)
            metrics |= news
        with stage("update"):
            pending = None
            if not unusable:
                state, pending = self._start_updates(number, state, inputs, student)
            del student
            if experience is not None:  # while the device updates
                metrics |= self.collector.measure(experience)
            if pending is not None:
                state, news = self._finish_updates(number, state, pending)
                metrics |= news
        tokens += metrics.get("rollout/tokens", 0.0)
        clock.lap("update", None if unusable else tokens)
        metrics |= clock.row()
        metrics["optim/updates"] = float(count := update.applied(state.train))
        if count > before:
            metrics["optim/learning_rate"] = float(self.functions.schedule(count - 1))
        metrics["memory/peak_gib"] = peak_gib()
        # metrics.jsonl holds finite numbers only; guard/skipped counts the updates with others.
        return state, {k: x for k, x in metrics.items() if math.isfinite(x)}, lines

    def _scorers(self, state: TrainState) -> tuple[models.Params, models.Params | None]:
        """Return the compute weights of the student and of the teacher, None where no term needs it."""
        student = self.functions.compute_weights(state.params)
        return student, self.functions.teacher_weights(self.weights.scorer, state, student)

    def _collect(
        self,
        number: int,
        student: models.Params,
        teacher: models.Params | None,
        batch: data.Batch,
        clock: Clock,
        budget: int | None,
    ) -> Experience:
        """Roll out, score and grade; or read recorded rollouts and score them with the student."""
        key = key_for(self.config.seed, number, Stream.ROLLOUT)
        if self.setup.replay is not None:
            recorded = self.setup.replay.read(number)
            return self.collector.recall(student, recorded, clock=clock)
        return self.collector.collect(
            student, teacher, batch, key=key, clock=clock, reference=self.weights.reference,
            budget=budget,
        )  # fmt: skip

    def _head(self, teacher: models.Params | None) -> Any:
        """Return the teacher's output matrix, for a divergence over the full vocabulary; None without one."""
        if teacher is None or not self.setup.terms.reads_head:
            return None
        head = decoder.head_alone(teacher)
        if self.weights.scorer is None:  # the update may donate these buffers
            head = jax.tree.map(jnp.copy, head)
        return head

    def _golden_rows(
        self,
        batch: data.Batch,
        weights: Mapping[str, float],
        student: models.Params | None,
        teacher: models.Params | None,
        clock: Clock,
    ) -> GoldenRows:
        """Return golden solutions as rows for the update, with both models' scores for a divergence.

        Where that divergence is compiled in and its weight is 0, blank scores keep the program the same.
        """
        setup, weigh = self.setup, self.functions.weigh_golden
        golden = rows.as_rollout(batch.prompts, batch.golden, width=setup.width)
        if "golden_divergence" not in setup.terms.names:
            return rows.golden_rows(golden, weigh=weigh)
        assert student is not None
        scored_BT = rows.scored_mask(golden, setup.alignment.counted, setup.first_pieces)
        if not weights["golden_divergence"]:
            scores = self.functions.blank_golden_scores(student, teacher, len(batch.golden))
            return rows.golden_rows(
                golden, weigh=weigh, scores=scores, scored_BT=np.zeros_like(scored_BT)
            )
        teacher_rows = None
        if batch.teacher_prompts is not None:
            teacher_rows = rows.teacher_rows(
                golden, batch.teacher_prompts, setup.alignment.teacher_ids,
                width=setup.teacher_width,
            )  # fmt: skip
        with stage("score"):
            if self.teachers:
                teacher_B = self.teachers.of(batch.problems, group=1)
                scores = self.teachers.score_golden(student, golden, teacher_rows, teacher_B)
            else:
                scores = self.functions.score_golden(student, teacher, golden, teacher_rows)
        clock.lap("score_golden", golden.response_length_B.sum())
        return rows.golden_rows(golden, weigh=weigh, scores=scores, scored_BT=scored_BT)

    def _cut_low_kl(
        self, state: StepState, experience: Experience
    ) -> tuple[StepState, np.ndarray | None, Summary]:
        """Return the tokens before the low-KL cut, None for all; the state then knows these rollouts too."""
        if not self.cut.window:
            return state, None, {}
        scores, mask_BT = experience.scores, experience.mask_BT
        kept_BT, news = low_kl.kept(state.past_kl, scores, mask_BT, self.cut)
        after = low_kl.observe(state.past_kl, experience.rollout, scores, mask_BT, self.cut)
        return dataclasses.replace(state, past_kl=after), kept_BT, news

    def _rollout_rows(
        self,
        number: int,
        experience: Experience,
        batch: data.Batch,
        masking: bool,
        kept_BT: np.ndarray | None = None,
    ) -> tuple[RolloutRows, list[dict], Summary]:
        """Return rows for the update, lines for rollouts.jsonl, and now and then `variant/*`.

        `kept_BT`: tokens that may count, where that is not all of them.
        """
        terms, loss = self.setup.terms, self.config.loss
        rollout, scores = experience.rollout, experience.scores
        group, decode = self.config.rollout.samples_per_prompt, self.setup.tokenizer.decode
        counted_BT = rows.counted(
            rollout, experience.mask_BT, truncated=loss.truncated, tail=loss.truncated_tail
        )
        if loss.repeated == "mask" or masking:
            counted_BT = counted_BT & ~experience.repeated_BT
        if kept_BT is not None:
            counted_BT = counted_BT & kept_BT
        key = key_for(self.config.seed, number, Stream.GATE)
        gate_BT = divergence_gate(scores, counted_BT, terms, key=key)

        def build(terms: Terms) -> tuple[RolloutRows, np.ndarray]:
            """Return the rows with these numbers of the loss, and the advantages before any gate."""
            factor_BT = token_factor(
                experience, counted_BT, terms,
                weigh=self.functions.weigh, group=group, decode=decode,
            )  # fmt: skip
            advantage_BT = advantages(
                rollout, scores, experience.mask_BT, terms,
                reward=experience.reward(group), step=number,
                factor_BT=factor_BT if terms.token_weight_on == "teacher" else None,
            )  # fmt: skip
            rollout_rows = rows.rollout_rows(
                rollout, scores, counted_BT, advantage_BT, terms, weigh=self.functions.weigh,
                factor_BT=factor_BT, gate_BT=gate_BT,
            )  # fmt: skip
            return rollout_rows, advantage_BT

        rollout_rows, advantage_BT = build(terms)
        news = Summary()
        if (every := self.config.log.variants) and number % every == 0:
            news = variants.compare(rollout_rows, terms, scores, lambda other: build(other)[0])
        logged_BT = advantage_BT
        if terms.needs_teacher and (terms.on_support or not terms.pg_weight):
            by = scores if scores.spans is None else scores.spans
            logged_BT = by.teacher_logprob_BT - by.student_logprob_BT
        lines = rows.as_lines(
            number, rollout, scores, logged_BT,
            ids=[problem.id for problem in batch.problems], grades=experience.grades,
            count=min(self.config.log.rollouts, len(experience.texts)),
            decode=decode,
        )  # fmt: skip
        return rollout_rows, experience.with_rewards(lines), news

    def _check_scores(
        self, number: int, state: StepState, experience: Experience
    ) -> tuple[StepState, Summary, bool]:
        """Return whether rollouts have non-finite log-probs; their update is then skipped."""
        bad = nonfinite.bad_scores(experience.rollout, experience.scores, experience.mask_BT)
        if not bad:
            return state, {}, False
        state, news = self._leave_out(number, state, [], bad, {"rollouts": experience.rollout})
        return state, news, True

    def _start_updates(
        self, number: int, state: StepState, inputs: update.Inputs, student: models.Params | None
    ) -> tuple[StepState, _Updates]:
        """Take `updates_per_rollout` optimizer steps, each on its minibatch; leave the last one in flight.

        `student`: compute weights of `state`, where they exist already.
        """
        parts = self.config.optim.updates_per_rollout
        updates = _Updates()
        for i in range(parts):
            if i:
                state, updates = self._settle(number, state, updates)
            share = inputs._replace(
                rollout_rows=inputs.rollout_rows
                and rows.share(inputs.rollout_rows, i, parts, weigh=self.functions.weigh),
                golden_rows=inputs.golden_rows
                and rows.share(inputs.golden_rows, i, parts, weigh=self.functions.weigh_golden),
            )
            if student is None and self.setup.mesh.devices is not None:
                student = self.functions.compute_weights(state.train.params)
            separate = {}
            every = self.config.log.gradients
            if every and number % every == 0 and i == 0:
                params = state.train.params if student is None else student
                separate = update.term_gradients(self.functions.accumulate, params, *share)
            limit = None
            if self.rules.spike and self.rules.spike_action == "skip":
                limit = nonfinite.limit(state.numerics, self.rules)
            train, values = self.functions.update(state.train, *share, student=student, limit=limit)
            student = None  # these are the weights before this update
            state = dataclasses.replace(state, train=train)
            updates = dataclasses.replace(updates, inputs=share, in_flight=values | separate)
        return state, updates

    def _finish_updates(
        self, number: int, state: StepState, updates: _Updates
    ) -> tuple[StepState, Summary]:
        """Wait for the last update; return the mean of each measurement over the updates that have it."""
        state, updates = self._settle(number, state, updates)
        fetched = jax.device_get(updates.measured)
        names = {name: None for values in fetched for name in values}
        means = {
            name: float(np.mean([values[name] for values in fetched if name in values]))
            for name in names
        }
        return state, updates.news | means

    def _settle(
        self, number: int, state: StepState, updates: _Updates
    ) -> tuple[StepState, _Updates]:
        """Wait for the update in flight; count it as applied, or as skipped if its numbers are not finite."""
        names = ("loss/total", "optim/grad_norm")
        values = jax.device_get([updates.in_flight[name] for name in names])
        if np.isfinite(values).all():
            numerics, news = nonfinite.observe(state.numerics, float(values[1]), self.rules)
            state = dataclasses.replace(state, numerics=numerics)
            measured = (*updates.measured, updates.in_flight)
            return state, dataclasses.replace(updates, measured=measured, news=updates.news | news)
        params = state.train.params  # the update has not changed them
        if self.setup.mesh.devices is not None:
            params = self.functions.compute_weights(params)
        bad = nonfinite.bad_rows(self.functions.accumulate, params, *updates.inputs)
        terms = [name for name, x in zip(names, values, strict=True) if not np.isfinite(x)]
        held = {"rollouts": updates.inputs.rollout_rows, "golden": updates.inputs.golden_rows}
        state, news = self._leave_out(number, state, terms, bad, held)
        return state, dataclasses.replace(updates, news=updates.news | news)

    def _leave_out(
        self,
        number: int,
        state: StepState,
        terms: list[str],
        bad: list[nonfinite.Bad],
        held: dict[str, Any],
    ) -> tuple[StepState, Summary]:
        """Count a skipped update. Raises NonFiniteError where the config allows no more."""

        def text(one: nonfinite.Bad) -> str:
            rows_of = held[one.kind]
            ids = rows_of.tokens_BT[one.row, : rows_of.length_B[one.row]]
            return self.setup.tokenizer.decode(ids.tolist())

        file = nonfinite.save_texts(self.folder, number, bad, text)
        problem = nonfinite.described(number, terms, bad, file)
        numerics, news = nonfinite.leave_out(state.numerics, self.rules, problem)
        return dataclasses.replace(state, numerics=numerics), news
