"""One training step: a batch of prompts is rolled out and scored, and the weights are updated."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import data, losses, models
from opd_jax.aot import Program
from opd_jax.errors import NonFiniteError
from opd_jax.grading.grader import Grader
from opd_jax.metrics.timing import Clock, peak_gib
from opd_jax.metrics.tracing import stage
from opd_jax.models import decoder
from opd_jax.rng import Stream, key_for
from opd_jax.sharding import multihost, replica_check
from opd_jax.training import batch as rows
from opd_jax.training import nonfinite, objective, precompile, update
from opd_jax.training.experience import Collector, Experience
from opd_jax.training.roles import compute_dtype
from opd_jax.training.setup import Setup
from opd_jax.training.weights import Weights
from opd_jax.types import Frozen, RolloutRows, TrainState

Summary = dict[str, float]


def abstract_state(setup: Setup) -> TrainState:
    """The shapes and dtypes of the state of a run."""
    tx = update.make_optimizer(setup.config.optim, 1)
    average = setup.config.teacher.follow == "average"
    begin = partial(update.init_state, tx=tx, average=average)
    return jax.eval_shape(begin, decoder.abstract_params(setup.student))


class Stepper:
    """What a step is made with, and the state that it changes; which steps there are is not known here.

    `state` is for the run to set: it comes from `begin` or from a checkpoint. `weights` (by term) and
    `masking` (of repetitive tails) are the guard's to say, step by step.
    """

    state: TrainState

    def __init__(self, setup: Setup, weights: Weights, grader: Grader, folder: pathlib.Path):
        config = setup.config
        self.folder = folder
        self.rules, self.numerics = nonfinite.make_rules(config.guard), nonfinite.State()
        self.setup, self.config = setup, config
        self.dtype, self.mesh = compute_dtype(config.student.dtype), setup.mesh
        self.collector = Collector(setup, grader)
        self.teacher, self.scorer = weights.teacher, weights.scorer
        self.reference = weights.reference
        updates = config.steps * config.optim.updates_per_rollout
        self._tx = update.make_optimizer(config.optim, updates)
        self.schedule = update.make_schedule(config.optim, updates)
        shared: dict[str, Any] = {
            "vocabulary": setup.alignment.vocabulary,
            "token_chunk": config.optim.token_chunk,
            "remat": config.optim.remat,
        }
        terms = setup.terms
        rollout_loss = objective.make_rollout_loss(
            terms,
            setup.student,
            setup.reference,
            events=self.collector.events,
            **shared,
        )
        self.accumulate = update.make_accumulate(
            rollout_loss if terms.needs_rollouts else None,
            objective.make_golden_loss(setup.student, **shared) if terms.needs_golden else None,
            microbatch_tokens=config.optim.microbatch_tokens,
            dtype=self.dtype,
            mesh=self.mesh,
        )
        self.update = update.make_update(
            self._tx, self.accumulate, decay=config.teacher.decay, mesh=self.mesh
        )
        self.weigh = partial(
            losses.token_weights,
            aggregation=config.loss.aggregation,
            length=config.rollout.max_response_tokens,
        )
        self.weigh_golden = partial(losses.token_weights, aggregation=config.loss.gold_aggregation)
        self._begin = partial(
            update.init_state, tx=self._tx, average=config.teacher.follow == "average"
        )

    def like(self) -> TrainState:
        """The state's shapes, dtypes and places."""
        like = abstract_state(self.setup)
        return self.mesh.structs(like, self.mesh.masters(like))

    def begin(self, student: models.Params) -> None:
        """Step 0; takes the student's weights over."""
        self.state = self.mesh.masters_of(self._begin, student)

    def programs(self, weights: dict[str, float]) -> list[Program]:
        """All that the steps of this run compile."""
        setup, terms = self.setup, self.setup.terms
        mesh, state = self.mesh, self.mesh.structs(self.state)
        student = jax.eval_shape(partial(mesh.compute, dtype=self.dtype), state.params)
        student = mesh.structs(student, mesh.weights(student))
        teacher = jax.eval_shape(self.teacher_now, student)
        teacher = mesh.structs(teacher, mesh.weights(teacher))
        rollout_rows = golden_rows = None
        if terms.needs_rollouts:
            rollout_rows = precompile.blank_rollout_rows(
                setup, student, teacher, self.collector.scoring
            )
        if terms.needs_golden:
            golden_rows = precompile.blank_golden_rows(setup)
        beside = decoder.head_alone(teacher) if teacher and terms.over_vocabulary else None
        frozen = Frozen(self.reference, beside)
        frozen = mesh.structs(frozen, mesh.weights(frozen))
        own = state.params if mesh.devices is None else student
        given = (own, frozen, rollout_rows, golden_rows, weights)
        return [
            *mesh.weight_programs(state.params, self.dtype),
            *(self.collector.programs(student, teacher) if terms.needs_rollouts else []),
            *self.accumulate.programs(*given),
            self.update.program(state, limited=self._limited),
        ]

    def step(
        self, step: int, batch: data.Batch, weights: dict[str, float], *, masking: bool = False
    ) -> tuple[Summary, list[dict]]:
        """One batch of prompts: roll out, score, update. Returns the step's metrics and rollouts.

        `step` counts batches of prompts, `state.step` the updates that were applied. The schedule
        advances with the second. An update that is left out and a batch whose rollouts cannot be used
        have the same effect: the state stays as it is and the next update has the same learning rate.
        """
        setup, terms = self.setup, self.setup.terms
        before = update.applied(self.state)
        clock = Clock()
        row: Summary = {}
        lines: list[dict] = []
        rollout_rows = golden_rows = given = student = beside = None
        golden = batch.golden if weights["sft"] else []
        ids = [problem.id for problem in batch.problems]
        if terms.needs_rollouts:
            student = self.mesh.compute(self.state.params, self.dtype)
            teacher = self.teacher_now(student)
            key = key_for(self.config.seed, step, Stream.ROLLOUT)
            given = self.collector.collect(student, teacher, batch, key=key, clock=clock)
            if teacher is not None and terms.over_vocabulary:
                beside = decoder.head_alone(teacher)
                if self.scorer is None:  # it may be the state's, which the update donates
                    beside = jax.tree.map(jnp.copy, beside)
            del teacher
            if self.mesh.devices is None:
                student = None  # as these may be
            with stage("rows"):
                rollout_rows, lines = self._rollout_rows(step, given, ids=ids, masking=masking)
        if golden:
            laid_out = data.golden_rows(batch.prompts, golden, width=setup.width)
            golden_rows = rows.golden_rows(*laid_out, weigh=self.weigh_golden)
        frozen = Frozen(self.reference, beside)
        unusable = given is not None and self._unusable(step, given, row)
        with stage("update"):
            under_way: list[dict[str, jax.Array]] = []
            if not unusable:
                rows_of = (frozen, rollout_rows, golden_rows, weights)
                under_way, last = self._update(step, *rows_of, student, row)
            del student
            if given is not None:  # looked at while the device updates
                row |= self.collector.measure(given)
            if under_way and not self._counts(step, under_way[-1], last, row):
                under_way.pop()
            row |= _means(under_way)
        tokens = row.get("rollout/tokens", 0.0) + sum(map(len, golden))
        clock.lap("update", None if unusable else tokens)
        row |= clock.row()
        row["optim/updates"] = float(count := update.applied(self.state))
        if count > before:
            row["optim/learning_rate"] = float(self.schedule(count - 1))
        row["memory/peak_gib"] = peak_gib()
        # What an update was left out for is told by guard/skipped; metrics.jsonl holds numbers.
        return {name: value for name, value in row.items() if math.isfinite(value)}, lines

    def _rollout_rows(
        self, step: int, given: Experience, *, ids: Sequence[str], masking: bool
    ) -> tuple[RolloutRows, list[dict]]:
        """What the update takes of the experience, and the lines of it for rollouts.jsonl.

        `ids` are the problems'.
        """
        terms, loss, rollout = self.setup.terms, self.config.loss, given.rollout
        advantage_BT = rows.advantages(
            rollout, given.scores, given.mask_BT, terms,
            reward_B=given.correct_B, graded_B=given.graded_B,
            group=self.config.rollout.samples_per_prompt,
        )  # fmt: skip
        counted_BT = rows.counted(
            rollout, given.mask_BT, truncated=loss.truncated, tail=loss.truncated_tail
        )
        if loss.repeated == "mask" or masking:
            counted_BT = counted_BT & ~given.repeated_BT
        made = rows.rollout_rows(
            rollout, given.scores, counted_BT, advantage_BT, terms, weigh=self.weigh
        )
        shown_BT = advantage_BT
        if terms.needs_teacher and (terms.on_support or not terms.pg_weight):
            shown_BT = given.scores.teacher_logprob_BT - given.scores.student_logprob_BT
        lines = rows.as_lines(
            step, rollout, given.scores, shown_BT, ids=ids, grades=given.grades,
            count=min(self.config.log.rollouts, len(given.texts)),
            decode=self.setup.tokenizer.decode,
        )  # fmt: skip
        return made, lines

    def require_equal_copies(self, step: int) -> None:
        """Raises CopiesError where devices hold other weights or optimiser than their neighbours."""
        if self.mesh.devices is None:
            return
        held = {"state": self.state, "weights": self.mesh.compute(self.state.params, self.dtype)}
        if self.scorer is not None:
            held["teacher"] = self.scorer
        if self.reference is not None:
            held["reference"] = self.reference
        replica_check.require_equal(held, when=f"after step {step}")

    def teacher_now(self, student: models.Params | None = None) -> models.Params | None:
        """The weights that score: frozen, the student's moving average, or its own; None without any.

        `student`: the student's own, where they are there already in the dtype to compute in.
        """
        if self.scorer is not None or self.setup.teacher is None:
            return self.scorer
        if self.state.average is None and student is not None:
            return student
        follows = self.state.params if self.state.average is None else self.state.average
        return self.mesh.compute(follows, self.dtype)

    def _update(
        self,
        step: int,
        frozen: Frozen,
        rollout_rows: Any,
        golden_rows: Any,
        weights: dict[str, float],
        student: models.Params | None,
        row: Summary,
    ) -> tuple[list[dict[str, jax.Array]], tuple]:
        """`updates_per_rollout` optimizer steps, each on its share of the prompts, the last one begun.

        Returns measurements of each that counts, of the last one whether or not it does; and what the
        last one was given. Those of the gradients apart are of the first.

        `student`: its compute weights, where they are there already. On one device gradients are
        taken at the masters, which are cast a layer at a time.
        """
        parts, every = self.config.optim.updates_per_rollout, self.config.log.gradients
        measured: list[dict[str, jax.Array]] = []
        given: tuple = ()
        for i in range(parts):
            if i and not self._counts(step, measured[-1], given, row):
                measured.pop()
            if student is None and self.mesh.devices is not None:
                student = self.mesh.compute(self.state.params, self.dtype)
            given = (
                frozen,
                rollout_rows and rows.share(rollout_rows, i, parts, weigh=self.weigh),
                golden_rows and rows.share(golden_rows, i, parts, weigh=self.weigh_golden),
                weights,
            )
            apart = {}
            if every and step % every == 0 and i == 0:
                own = self.state.params if student is None else student
                apart = update.term_gradients(self.accumulate, own, *given)
            most = nonfinite.limit(self.numerics, self.rules) if self._limited else None
            self.state, some = self.update(self.state, *given, student=student, limit=most)
            student = None  # is of the weights before
            measured.append(some | apart)
        return measured, given

    @property
    def _limited(self) -> bool:
        """Whether updates with too large a gradient are left out."""
        return bool(self.rules.spike) and self.rules.spike_action == "skip"

    def _counts(
        self, step: int, measured: dict[str, jax.Array], given: tuple, row: Summary
    ) -> bool:
        """Whether an update was made of finite numbers; waits for it. `given`: what it was made of.

        Raises NonFiniteError where not, and no more of such may be left out.
        """
        names = ("loss/total", "optim/grad_norm")
        values = jax.device_get([measured[name] for name in names])
        if np.isfinite(values).all():
            self.numerics, told = nonfinite.observe(self.numerics, float(values[1]), self.rules)
            row |= told
            return True
        _, rollout_rows, golden_rows, _ = given
        params = self.state.params  # which the update has left as they were
        if self.mesh.devices is not None:
            params = self.mesh.compute(params, self.dtype)
        bad = nonfinite.bad_rows(self.accumulate, params, *given)
        found = [name for name, value in zip(names, values, strict=True) if not np.isfinite(value)]
        held = {"rollouts": rollout_rows, "golden": golden_rows}
        self._leave_out(step, found, bad, held, row)
        return False

    def _unusable(self, step: int, given: Experience, row: Summary) -> bool:
        """Whether rollouts have log-probs that are not finite; raises as `_counts` does."""
        bad = nonfinite.bad_scores(given.rollout, given.scores, given.mask_BT)
        if bad:
            self._leave_out(step, [], bad, {"rollouts": given.rollout}, row)
        return bool(bad)

    def _leave_out(
        self,
        step: int,
        names: list[str],
        bad: list[nonfinite.Bad],
        held: dict[str, Any],
        row: Summary,
    ) -> None:
        """Count an update that is left out; raise NonFiniteError where that is one too many."""
        file = None
        if bad and multihost.first():
            file = nonfinite.save_texts(self.folder, step, bad, lambda one: self._text(one, held))
        text = nonfinite.described(step, names, bad, file)
        if self.numerics.skipped >= self.rules.skip_nonfinite:
            raise NonFiniteError(
                f"{text}; the parameters were left as they were: lower --config.optim.learning_rate, or "
                f"leave such updates out: --config.guard.skip_nonfinite={self.rules.skip_nonfinite + 10}"
            )
        self.numerics = dataclasses.replace(self.numerics, skipped=self.numerics.skipped + 1)
        row["guard/skipped"] = float(self.numerics.skipped)
        if multihost.first():
            print(f"warning: {text}; left out", flush=True)

    def _text(self, one: nonfinite.Bad, held: dict[str, Any]) -> str:
        """The row as text."""
        rows_of = held[one.kind]
        ids = rows_of.tokens_BT[one.row, : rows_of.length_B[one.row]]
        return self.setup.tokenizer.decode(ids.tolist())


def _means(measured: list[dict[str, jax.Array]]) -> Summary:
    """The mean of each measurement over the parts that have it; waits for the device."""
    fetched = jax.device_get(measured)
    return {
        name: float(np.mean([part[name] for part in fetched if name in part]))
        for name in {name: None for part in fetched for name in part}
    }
