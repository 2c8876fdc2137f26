"""The training run: config -> data -> rollout -> score -> loss -> update -> metrics -> checkpoint.

Only this file knows the whole pipeline. Everything that can be refused is refused (setup.py,
workdir.check) before a file is written, weights are loaded, or anything is compiled.
"""

import dataclasses
import json
import math
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from opd_jax import (
    ahead,
    checkpoint,
    data,
    display,
    guard,
    losses,
    models,
    objectives,
    processes,
    rows,
    update,
    workdir,
)
from opd_jax import config as configuration
from opd_jax.best import Best
from opd_jax.clock import Clock, peak_gib, used_bytes
from opd_jax.collect import Collector, Experience
from opd_jax.errors import ConfigError, NonFiniteError
from opd_jax.eval.evaluate import evaluate
from opd_jax.eval.grade import Grader
from opd_jax.keys import Stream, key_for
from opd_jax.living import Log, require
from opd_jax.loading import Weights, load_weights
from opd_jax.models import decoder
from opd_jax.plan import run as planning
from opd_jax.profiling import Tracer, stage
from opd_jax.programs import Program
from opd_jax.rules import BEST
from opd_jax.setup import Setup, compute_dtype, make_setup
from opd_jax.types import Frozen, RolloutRows, TrainState

Summary = dict[str, float]
_ROLLBACK = "rollback.json"  # what a rollback is about, until a later checkpoint knows of it
_NEWS = ("eval/", "guard/")  # keys that are logged whenever they occur


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves: its last state, and the rows of the closing table by who they are of."""

    state: TrainState
    table: dict[str, Summary]


def run(config: ConfigDict, path: str, *, command: list[str]) -> Result:
    """Train to `config.steps`, resuming where the workdir holds a checkpoint.

    Raises an OpdError for whatever the user can mend.
    """
    folder = pathlib.Path(path)
    setup = make_setup(config)
    config = setup.config
    if processes.several():
        processes.agree(_facts(config, path))
    workdir.check(folder, config)
    processes.agree({})  # all have looked before the first writes
    if processes.first():
        print(f"workdir {folder}", *setup.notes, sep="\n", flush=True)
    latest = checkpoint.latest_step(folder)  # asked in all: Orbax may wait for all
    first = processes.from_first(lambda: latest)
    if first is not None and first > config.steps:
        raise ConfigError(
            f"steps={config.steps}, but the workdir {str(folder)!r} is at step {first}; "
            f"set --config.steps={first} or more, or give a new --workdir"
        )
    require(config.log)
    plan = planning.of_run(setup)
    if processes.first():
        print(*planning.say(plan), sep="\n", flush=True)
    planning.require_fit(plan)
    # A broken file is refused before anything is written.
    weights = load_weights(setup, student=first is None)
    if processes.first():
        workdir.create(folder, config, command)
        planning.write(plan, folder)
    with Grader() as grader, checkpoint.Checkpoints(folder, keep=config.checkpoint.keep) as saved:
        return _Run(setup, weights, folder, grader, saved).loop()


class _Run:
    """The moving parts of one run: built by __init__, walked through by `loop`."""

    def __init__(
        self,
        setup: Setup,
        weights: Weights,
        folder: pathlib.Path,
        grader: Grader,
        saved: checkpoint.Checkpoints,
    ):
        config = setup.config
        self.setup, self.config, self.folder = setup, config, folder
        self.grader, self.saved = grader, saved
        self.dtype, self.mesh = compute_dtype(config.student.dtype), setup.mesh
        self.collector = Collector(setup, grader)
        self.teacher, self.scorer = weights.teacher, weights.scorer
        self.reference = weights.reference
        updates = config.steps * config.optim.updates_per_rollout
        tx = update.make_optimizer(config.optim, updates)
        self.schedule = update.make_schedule(config.optim, updates)
        shared: dict[str, Any] = {
            "vocabulary": setup.alignment.vocabulary,
            "token_chunk": config.optim.token_chunk,
            "remat": config.optim.remat,
        }
        terms = setup.terms
        rollout_loss = objectives.make_rollout_loss(
            terms,
            setup.student,
            setup.reference,
            scored_V=self.collector.scored_V,
            **shared,
        )
        self.accumulate = update.make_accumulate(
            rollout_loss if terms.needs_rollouts else None,
            objectives.make_golden_loss(setup.student, **shared) if terms.needs_golden else None,
            microbatch_tokens=config.optim.microbatch_tokens,
            dtype=self.dtype,
            mesh=self.mesh,
        )
        self.update = update.make_update(
            tx, self.accumulate, decay=config.teacher.decay, mesh=self.mesh
        )
        self.weigh = partial(
            losses.token_weights,
            aggregation=config.loss.aggregation,
            length=config.rollout.max_response_tokens,
        )
        self.weigh_golden = partial(losses.token_weights, aggregation=config.loss.gold_aggregation)
        self.batches = data.make_batches(
            setup.train,
            batch=config.rollout.prompts_per_step,
            seed=config.seed,
            shuffle=config.data.shuffle,
            read=setup.read,
        )
        self.rules = guard.make_rules(config)
        self.guard = guard.State()
        begin = partial(update.init_state, tx=tx, average=config.teacher.follow == "average")
        like = jax.eval_shape(begin, decoder.abstract_params(setup.student))
        self.like = self.mesh.structs(like, self.mesh.masters(like))
        self.first = newest = saved.latest or 0
        if newest:
            self._resume()
        else:
            student, weights.student = weights.student, None  # the state takes it over
            assert student is not None  # read where there is no checkpoint
            self.state = self.mesh.masters_of(begin, student)
        kept = newest or -1  # without a checkpoint even step 0 is written anew
        self.log: workdir.Lines | workdir.NoLines = workdir.NoLines()
        self.samples: workdir.Lines | workdir.NoLines = workdir.NoLines()
        if processes.first():
            self.log = Log(folder / "metrics.jsonl", resume_step=kept, config=config)
            self.samples = workdir.Lines(folder / "rollouts.jsonl", resume_step=kept)
        if self.first < newest:  # a rollback was cut short
            self.log.go_back(self.first)
            self.samples.go_back(self.first)

    def _resume(self) -> None:
        """The newest checkpoint; or the one that a rollback which was cut short was going back to."""
        state = guard.from_json(self.saved.guard(self.first))
        record = self.folder / _ROLLBACK
        last = None
        noted = processes.from_first(
            lambda: json.loads(record.read_text(encoding="utf-8")) if record.exists() else None
        )
        if noted is not None:
            last = noted["step"], guard.from_json(noted["guard"])
        self.first, self.guard = guard.resumed((self.first, state), last)
        self.saved.delete_after(self.first)
        self.state = self.saved.restore(self.first, self.like, self.batches)

    def loop(self) -> Result:
        """Steps from where the run stands to `steps`, with evaluations, logs and checkpoints."""
        config, step = self.config, self.first
        progress = display.Progress(config.steps, step, silent=not processes.first())
        tracer = Tracer(self.folder, config.profile, memory=used_bytes)
        if ahead.worthwhile():
            programs = self._programs()
            progress.say(
                f"{len(programs)} programs compiled in {ahead.compile_all(programs):.1f} s"
            )
        if step:
            progress.say(f"resumed at step {step}")
        else:
            before = self._evaluate(0) if self.setup.held_out else {}
            self.log.write({"step": 0} | self._eval_keys(before))
            if before:
                progress.say(f"step 0: {display.headline(before)}")
                self._keep_best(0, before)
        if step < config.steps:
            progress.show("the first step also compiles its programs ...", always=True)
        last = False
        while step < config.steps and not last:
            step += 1
            with tracer.step(step):
                row, sampled = self._step(step, next(self.batches))
            _require_finite(step, row)
            progress.step(step, row)
            response = self._watch(step, row)
            for line in response.lines:
                progress.say(line)
            if response.restore is not None:
                self._log(step, row, sampled)
                step = self._go_back(response.restore)
                last = response.stop
                continue
            last = response.stop or step == config.steps
            due = last or (config.eval.every and step % config.eval.every == 0)
            if due and self.setup.held_out:
                summary = self._evaluate(step)
                row |= self._eval_keys(summary)
                progress.say(f"step {step}: {display.headline(summary)}")
                self._keep_best(step, summary)
            if last or step % config.log.every == 0 or any(k.startswith(_NEWS) for k in row):
                self._log(step, row, sampled)
            if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
                self.saved.save(step, self.state, self.batches, guard.to_json(self.guard))
        tracer.stop()
        self.log.close()
        self.samples.close()
        table = self._table(step) if self.setup.held_out else {}
        if table:
            progress.say(f"\n{display.table(table)}\n")
        progress.say(f"written to {self.folder}")
        return Result(self.state, table)

    def _log(self, step: int, row: Summary, sampled: list[dict]) -> None:
        self.log.write({"step": step} | row)
        for sample in sampled:
            self.samples.write(sample)

    def _watch(self, step: int, row: Summary) -> guard.Response:
        """What the guard makes of a step; its keys go into the step's row."""
        if self.rules.action == "off":
            return guard.Response()
        self.guard, alarm = guard.observe(self.guard, step, row, self.rules)
        self.guard, response = guard.respond(self.guard, step, alarm, self.rules, self.saved.steps)
        row |= response.event
        return response

    def _go_back(self, step: int) -> int:
        """To the checkpoint of `step`, with the guard as it is now; later lines are set aside."""
        noted = {"step": step, "guard": guard.to_json(self.guard)}
        record = self.folder / _ROLLBACK
        if processes.first():
            # The record appears whole, before anything is touched.
            whole = record.with_suffix(".tmp")
            whole.write_text(json.dumps(noted) + "\n", encoding="utf-8")
            whole.replace(record)
        self.saved.delete_after(step)
        del self.state  # makes room for the one that is read
        self.state = self.saved.restore(step, self.like, self.batches)
        self.log.go_back(step)
        self.samples.go_back(step)
        return step

    def _programs(self) -> list[Program]:
        """All that the steps of this run compile."""
        setup, terms = self.setup, self.setup.terms
        mesh, state = self.mesh, self.mesh.structs(self.state)
        student = jax.eval_shape(partial(mesh.compute, dtype=self.dtype), state.params)
        student = mesh.structs(student, mesh.weights(student))
        teacher = jax.eval_shape(self._teacher_now, student)
        teacher = mesh.structs(teacher, mesh.weights(teacher))
        rollout_rows = golden_rows = None
        if terms.needs_rollouts:
            rollout_rows = ahead.blank_rollout_rows(setup, student, teacher, self.collector.scoring)
        if terms.needs_golden:
            golden_rows = ahead.blank_golden_rows(setup)
        beside = decoder.head_alone(teacher) if teacher and terms.over_vocabulary else None
        frozen = Frozen(self.reference, beside)
        frozen = mesh.structs(frozen, mesh.weights(frozen))
        own = state.params if mesh.devices is None else student
        given = (own, frozen, rollout_rows, golden_rows, self._weights())
        return [
            *mesh.weight_programs(state.params, self.dtype),
            *(self.collector.programs(student, teacher) if terms.needs_rollouts else []),
            *self.accumulate.programs(*given),
            self.update.program(state),
        ]

    def _weights(self) -> dict[str, float]:
        """The weight of each term, as configured or as the guard has raised it."""
        beta_kl, lambda_gold = guard.terms(self.guard, self.rules)
        return self.setup.terms.weights | {"reference_kl": beta_kl, "sft": lambda_gold}

    def _step(self, step: int, batch: data.Batch) -> tuple[Summary, list[dict]]:
        """One batch of prompts: roll out, score, update. Returns the step's metrics and rollouts."""
        setup, terms = self.setup, self.setup.terms
        clock = Clock()
        row: Summary = {}
        lines: list[dict] = []
        rollout_rows = golden_rows = given = student = beside = None
        golden = batch.golden if self._weights()["sft"] else []
        if terms.needs_rollouts:
            student = self.mesh.compute(self.state.params, self.dtype)
            teacher = self._teacher_now(student)
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
                rollout_rows, lines = self._rollout_rows(step, given)
        if golden:
            laid_out = data.golden_rows(batch.prompts, golden, width=setup.width)
            golden_rows = rows.golden_rows(*laid_out, weigh=self.weigh_golden)
        frozen = Frozen(self.reference, beside)
        with stage("update"):
            under_way = self._update(step, frozen, rollout_rows, golden_rows, student)
            del student
            if given is not None:  # looked at while the device updates
                row |= self.collector.measure(given)
            row |= _means(under_way)
        clock.lap("update", row.get("rollout/tokens", 0.0) + sum(map(len, golden)))
        row |= clock.row()
        row["optim/learning_rate"] = float(
            self.schedule(step * self.config.optim.updates_per_rollout - 1)
        )
        row["memory/peak_gib"] = peak_gib()
        return row, lines

    def _rollout_rows(self, step: int, given: Experience) -> tuple[RolloutRows, list[dict]]:
        """What the update takes of the experience, and the lines of it for rollouts.jsonl."""
        terms, loss, rollout = self.setup.terms, self.config.loss, given.rollout
        advantage_BT = rows.advantages(
            rollout, given.scores, given.mask_BT, terms,
            reward_B=given.correct_B, group=self.config.rollout.samples_per_prompt,
        )  # fmt: skip
        counted_BT = rows.counted(
            rollout, given.mask_BT, truncated=loss.truncated, tail=loss.truncated_tail
        )
        if loss.repeated == "mask" or guard.masking(self.guard, self.rules):
            counted_BT = counted_BT & ~given.repeated_BT
        made = rows.rollout_rows(
            rollout, given.scores, counted_BT, advantage_BT, terms, weigh=self.weigh
        )
        shown_BT = advantage_BT
        if terms.needs_teacher and (terms.on_support or not terms.pg_weight):
            shown_BT = given.scores.teacher_logprob_BT - given.scores.student_logprob_BT
        lines = rows.as_lines(
            step, rollout, given.scores, shown_BT, correct=given.correct_B,
            count=min(self.config.log.rollouts, len(given.texts)),
            decode=self.setup.tokenizer.decode,
        )  # fmt: skip
        return made, lines

    def _teacher_now(self, student: models.Params | None = None) -> models.Params | None:
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
        student: models.Params | None,
    ) -> list[dict[str, jax.Array]]:
        """`updates_per_rollout` optimizer steps, each on its share of the prompts, begun; measurements
        of each. Those of the gradients apart are of the first.

        `student`: its compute weights, where they are there already. On one device gradients are
        taken at the masters, which are cast a layer at a time.
        """
        parts, every = self.config.optim.updates_per_rollout, self.config.log.gradients
        weights = self._weights()
        measured = []
        for i in range(parts):
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
            self.state, some = self.update(self.state, *given, student=student)
            student = None  # is of the weights before
            measured.append(some | apart)
        return measured

    def _evaluate(self, step: int | str) -> Summary:
        """Held-out answers of the student as it is, or of the "teacher", written to eval/STEP/.

        The teacher answers as itself: its own prompts, ids and end tokens.
        """
        setup, config = self.setup, self.config
        params: models.Params | None
        if step == "teacher" and setup.teacher is not None:
            params = self._teacher_now() if self.teacher is None else self.teacher
            model, tokenizer, prompts = (
                setup.teacher,
                setup.teacher_tokenizer,
                setup.teacher_prompts,
            )
            width = setup.teacher_width - config.rollout.max_response_tokens
            ids = data.alone(min(tokenizer.size, model.vocab_size), model.eos_token_ids)
        else:
            params = self.mesh.compute(self.state.params, self.dtype)
            model, tokenizer, prompts = setup.student, setup.tokenizer, setup.prompts
            width, ids = config.rollout.max_prompt_tokens, setup.alignment
        assert params is not None
        return evaluate(
            params,
            model,
            tokenizer,
            setup.held_out,
            prompts,
            max_prompt_tokens=width,
            key=key_for(config.seed, 0, Stream.EVAL),
            section=config.eval,
            rollout=config.rollout,
            repetition=config.metrics,
            stop_ids=ids.stop_ids,
            vocabulary=ids.vocabulary,
            drawn_V=None if ids.drawn.all() else ids.drawn,
            grader=self.grader,
            out=self.folder / "eval" / str(step) / f"{self._benchmark}.jsonl",
            mesh=self.mesh,
        )

    def _keep_best(self, step: int, summary: Summary) -> None:
        """The checkpoint with the best `eval.best` so far lies in best/."""
        metric = self.config.eval.best
        if metric:
            state = guard.to_json(self.guard)
            Best(self.folder, metric=metric, more=BEST[metric]).offer(
                step, summary, lambda saved: saved.save(step, self.state, self.batches, state)
            )

    def _table(self, last: int) -> dict[str, Summary]:
        """The rows of the closing table. What an earlier part of the run did not measure is measured
        now, or left out where its weights are gone."""
        table = {}
        if before := self._summary(0):
            table["student before"] = before
        table["student after"] = self._summary(last) or self._evaluate(last)
        if self.setup.teacher is not None and self.config.eval.teacher:
            table["teacher"] = self._evaluate("teacher")
        return table

    def _summary(self, step: int) -> Summary | None:
        """The summary of an evaluation already made, maybe before a resume; None without one."""
        file = self.folder / "eval" / str(step) / f"{self._benchmark}.json"
        return processes.from_first(
            lambda: json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        )

    @property
    def _benchmark(self) -> str:
        """The name of the held-out data: that of its file, or `tiny`."""
        return pathlib.PurePath(self.config.eval.data.partition(":")[0]).stem

    def _eval_keys(self, summary: Summary) -> Summary:
        return {f"eval/{self._benchmark}/{name}": value for name, value in summary.items()}


def _facts(config: ConfigDict, path: str) -> dict[str, Any]:
    """What must be the same in every process of a run."""
    here = workdir.provenance([])
    versions = {name: here[name] for name in ("commit", "python", "packages")}
    return {"workdir": path} | versions | configuration.flatten(config.to_dict())


def _means(measured: list[dict[str, jax.Array]]) -> Summary:
    """The mean of each measurement over the parts that have it; waits for the device."""
    fetched = jax.device_get(measured)
    return {
        name: float(np.mean([part[name] for part in fetched if name in part]))
        for name in fetched[0]
    }


def _require_finite(step: int, row: dict[str, float]) -> None:
    for name in ("loss/total", "optim/grad_norm"):
        if not math.isfinite(row[name]):
            raise NonFiniteError(
                f"step {step}: {name} is {row[name]}, wanted a finite number; the parameters were "
                "left as they were; lower --config.optim.learning_rate and look at rollouts.jsonl"
            )
