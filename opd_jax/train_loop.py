"""The loop of a run: steps, with evaluations, logs, checkpoints, jumps, and the responses to an alarm."""

import dataclasses
import pathlib
from typing import Any

import jax

from opd_jax import checkpoint, data, workdir
from opd_jax.checkpoint import resume
from opd_jax.errors import Interrupted, RewardError
from opd_jax.evaluation.held_out import HeldOut, discard_after
from opd_jax.grading.grader import Grader
from opd_jax.grading.rewards import RewardPool
from opd_jax.metrics.timing import used_bytes
from opd_jax.metrics.tracing import Tracer, stage
from opd_jax.sharding import multihost
from opd_jax.training import (
    collapse_detector,
    collapse_guard,
    horizon,
    jump,
    low_kl,
    nonfinite,
    precompile,
    selftest,
)
from opd_jax.training.setup import Setup
from opd_jax.training.step import Step, StepState, Summary
from opd_jax.training.step_functions import StepFunctions
from opd_jax.training.weights import Weights, require_equal_replicas
from opd_jax.types import TrainState
from opd_jax.workdir import console
from opd_jax.workdir.stop import Stop
from opd_jax.workdir.trackers import Log
from opd_jax.workdir.watchdog import Watchdog

_NEWS = ("eval/", "guard/", "jump/")  # keys that are logged at every step that has them


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a run: its last state, and the rows of the closing table by model."""

    state: TrainState
    table: dict[str, Summary]


class TrainLoop:
    """The components of one run: built by __init__, driven by `run`.

    The arguments are what train.py has opened and what must be closed or ended by it, whatever happens in the
    loop; nine, because a record of them would be filled there and taken apart here, and nowhere else.
    """

    def __init__(
        self,
        setup: Setup,
        functions: StepFunctions,
        weights: Weights,
        folder: pathlib.Path,
        grader: Grader,
        saved: checkpoint.Checkpoints,
        stop: Stop,
        watchdog: Watchdog,
        pool: RewardPool | None = None,
    ):
        config = setup.config
        self.setup, self.config, self.folder = setup, config, folder
        self.saved, self.stop, self.watchdog = saved, stop, watchdog
        self.weights, self.functions = weights, functions
        self.step = Step(setup, self.functions, weights, grader, folder, pool)
        self.held_out = HeldOut(setup, self.functions, weights, folder, grader)
        self.batches = data.make_batches(
            setup.train,
            batch=config.rollout.prompts_per_step,
            seed=config.seed,
            shuffle=config.data.shuffle,
            read=setup.read,
            order=None if setup.replay is None else setup.replay.order,
        )
        self.rules = collapse_guard.make_rules(config)
        self.guard = collapse_guard.State()
        self.stairs = horizon.make_rules(config)
        self.horizon = horizon.start(self.stairs)
        self.jumps = jump.Jumps(setup, self.functions, grader)
        self.like = self.functions.abstract_state()
        self.first = newest = saved.latest or 0
        self.pending: resume.Pending | None = None
        logged = -1  # without a checkpoint even step 0 is logged again
        if newest:
            point = resume.point(folder, saved)
            self.first, self.guard, self.pending = point.step, point.guard, point.pending
            if self.first < newest:  # a rollback was interrupted
                discard_after(folder, self.first)
            saved.delete_after(self.first)
            train = saved.restore(self.first, self.like, self.batches)
            self.state = StepState(train, point.numerics)
            self._restore_schedules(self.first)
            logged = newest - (self.pending is not None)
        else:
            student, weights.student = weights.student, None  # initial_state donates its buffers
            assert student is not None  # loaded because there is no checkpoint
            self.state = StepState(self.functions.initial_state(student))
            self.jumps.start(self.state.train.params)
        self.cut_short = self.first < newest  # a rollback
        self.log: workdir.Lines | workdir.NoLines = workdir.NoLines()
        self.samples: workdir.Lines | workdir.NoLines = workdir.NoLines()
        if multihost.first():
            self.log = Log(folder / "metrics.jsonl", resume_step=logged, config=config)
            self.samples = workdir.Lines(folder / "rollouts.jsonl", resume_step=logged)
        if self.cut_short:
            self.log.go_back(self.first)
            self.samples.go_back(self.first)

    def run(self) -> Result:
        """Run the steps from the current one to `steps`, with evaluations, logs and checkpoints."""
        config, step = self.config, self.first
        self.progress = progress = console.Progress(
            config.steps, step, silent=not multihost.first()
        )
        tracer = Tracer(self.folder, config.profile, memory=used_bytes)
        if precompile.worthwhile():
            programs = self.functions.programs(
                self.weights.scorer,
                self.weights.reference,
                self._weights(step + 1),
                self.weights.others,
            )
            progress.say(
                f"{len(programs)} programs compiled in {precompile.compile_all(programs):.1f} s"
            )
        if selftest.wanted(config.guard.self_test, jax.default_backend()):
            self._test_itself()
        if step:
            progress.say(f"resumed at step {step}")
        if self.cut_short and (summary := self.held_out.summary(step)):
            self._keep_best(step, summary)  # a discarded step may have replaced it
        if self.pending is not None:
            self._finish(step, *self.pending, due=True)
        elif not step:
            before = self._evaluate(0) if self.held_out else {}
            self.log.write({"step": 0} | before)
        end_if_requested(self.stop, f"before step {step + 1}")
        if step < config.steps:
            progress.show("the first step also compiles its programs ...", always=True)
        last, pace = False, resume.Pace()
        while step < config.steps and not last:
            step += 1
            self.watchdog.begin("step", step)
            with tracer.step(step):
                self.state, row, sampled = self._train(step)
            row |= horizon.keys(self.horizon, self.stairs)
            if config.guard.copies and step % config.guard.copies == 0:
                require_equal_replicas(step, self.state.train, self.functions, self.weights)
            progress.step(step, row)
            response = self._watch(step, row)
            for line in response.lines:
                progress.say(line)
            if response.restore is not None:
                self._log(step, row, sampled)
                step = self._go_back(response.restore)
                last = response.stop
                if last:  # the line of the alarm's step is set aside, and there is no later one
                    self.log.amend({"step": step} | response.event)
                continue
            self._raise_horizon(step, row)
            if self.jumps and jump.is_jump(step):
                row |= self._jump(step)
            last = response.stop or step == config.steps
            due = bool(last or (config.eval.every and step % config.eval.every == 0))
            self.stop.mind_deadline(pace.lap())
            reason = multihost.agree_on_stop(self.stop.reason)
            if reason is not None and not last:
                self._end_early(step, row, sampled, reason, due=due)
            self._finish(step, row, sampled, due=due, last=last)
            if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
                self._save(step)
        self.watchdog.begin("end", step)
        tracer.stop()
        table = self.held_out.table(step, self.state.train) if self.held_out else {}
        if table and "student before" not in table:
            progress.say(
                "note: the student before training is left out of the table: it was not evaluated, or with "
                "other held-out problems or settings of eval"
            )
        if table:
            progress.say(f"\n{console.table(table)}\n")
        self.saved.wait()  # a failed write raises here, before the line that reports success
        progress.say(f"written to {self.folder}")
        return Result(self.state.train, table)

    def _train(self, step: int) -> tuple[StepState, Summary, list[dict]]:
        """Train on the next batch. Where its rewards fail, save the state before it and raise RewardError."""
        before = self.batches.get_state() if self.config.reward.function else None
        try:
            return self.step(
                step,
                self.state,
                next(self.batches),
                self._weights(step),
                masking=collapse_guard.masking(self.guard, self.rules),
                budget=self.horizon.length,
            )
        except RewardError as error:  # before the update: the state has not changed
            self.batches.set_state(before)
            if step == 1:
                raise RewardError(f"step 1: {error}") from None
            self._save(step - 1)
            self.saved.wait()
            raise RewardError(
                f"step {step}: {error}; step {step - 1} is saved, and the same command goes on from there"
            ) from None

    def _test_itself(self) -> None:
        """Compare sampler and scorer before the first step. Raises SelfTestError where they differ."""
        self.watchdog.begin("self-test", self.first)
        params, functions = self.state.train.params, self.functions
        student = functions.compute_weights(params)
        scorer = self.weights.placed(self.weights.scorer, functions.spec.mesh)
        teacher = functions.teacher_weights(scorer, self.state.train, student)
        with stage("self-test"):
            found = selftest.run(self.setup, functions, student, teacher, self.weights.reference)
        if found is not None:
            self.progress.say(selftest.line(found))
            selftest.require(found)

    def _finish(
        self, step: int, row: Summary, sampled: list[dict], *, due: bool, last: bool = False
    ) -> None:
        """Complete a step: evaluate where it is due, and log."""
        if due and self.held_out:
            row |= self._evaluate(step)
        news = any(key.startswith(_NEWS) for key in row)
        if last or step % self.config.log.every == 0 or news:
            self._log(step, row, sampled)

    def _evaluate(self, step: int) -> Summary:
        """Evaluate the current student, print the result, keep it if best; return the `eval/*` keys."""
        self.watchdog.begin("evaluation", step)
        summary = self.held_out.evaluate(step, self.state.train)
        self.progress.say(f"step {step}: {console.headline(summary)}")
        self._keep_best(step, summary)
        return self.held_out.keys(summary)

    def _keep_best(self, step: int, summary: Summary) -> None:
        """Keep the current state, of `step`, if it is the best by `summary`."""
        self.held_out.keep_best(
            step,
            summary,
            lambda saved: saved.save(
                step, self.state.train, self.batches, collapse_guard.to_json(self.guard)
            ),
        )

    def _save(self, step: int, pending: resume.Pending | None = None) -> None:
        """Start writing a checkpoint; the log lines before it are flushed to the disk first."""
        self.watchdog.begin("checkpoint", step)
        self.log.sync()
        self.samples.sync()
        guard, every = collapse_guard.to_json(self.guard), self.config.checkpoint.every
        extras: dict[str, Any] = {
            "numerics": nonfinite.to_json(self.state.numerics),
            "horizon": horizon.to_json(self.horizon),
            "low_kl": low_kl.to_json(self.state.past_kl),
        }
        if pending is not None:
            extras["pending"] = pending
        with stage("checkpoint"):
            self.saved.save(
                step, self.state.train, self.batches, guard, extras=extras,
                snapshot=self.jumps.previous, scheduled=not every or step % every == 0,
            )  # fmt: skip

    def _end_early(
        self, step: int, row: Summary, sampled: list[dict], reason: str, *, due: bool
    ) -> None:
        """Save and end. An evaluation that is due is left to the run that resumes from here."""
        postponed = due and bool(self.held_out)
        if not postponed:
            self._finish(step, row, sampled, due=False)
        self._save(step, (row, sampled) if postponed else None)
        self.saved.wait()
        raise Interrupted(
            f"{reason}: step {step} is saved in {self.folder}; run the same command again to go on"
        )

    def _log(self, step: int, row: Summary, sampled: list[dict]) -> None:
        self.log.write({"step": step} | row)
        for sample in sampled:
            self.samples.write(sample)

    def _watch(self, step: int, row: Summary) -> collapse_guard.Response:
        """Pass a step's metrics to the guard and return its response, whose keys are added to the row."""
        if self.rules.action == "off":
            return collapse_guard.Response()
        self.guard, alarm = collapse_detector.observe(self.guard, step, row, self.rules)
        self.guard, response = collapse_guard.respond(
            self.guard, step, alarm, self.rules, self.saved.steps
        )
        row |= response.event
        return response

    def _raise_horizon(self, step: int, row: Summary) -> None:
        """Set the response budget of the next step from this step's metrics."""
        before, self.horizon = self.horizon, horizon.observe(self.horizon, step, row, self.stairs)
        if self.horizon.length != before.length:
            self.progress.say(
                f"step {step}: responses of at most {self.horizon.length} tokens from here on"
            )

    def _jump(self, step: int) -> Summary:
        """Try a jump; return its metrics."""
        self.watchdog.begin("jump", step)
        train, news = self.jumps(step, self.state.train, alarmed=self.guard.alarmed)
        self.state = dataclasses.replace(self.state, train=train)
        if news:
            self.progress.say(jump.describe(news, step))
        return news

    def _restore_schedules(self, step: int) -> None:
        """Restore the horizon, the low-KL cut and the last jump's snapshot from the checkpoint of `step`."""
        extras = self.saved.extras(step)
        self.horizon = horizon.from_json(extras.get("horizon"), self.stairs)
        past = low_kl.from_json(extras.get("low_kl"))
        self.state = dataclasses.replace(self.state, past_kl=past)
        if self.jumps:
            self.jumps.start(self.saved.snapshot(step, self.like.params) or self.state.train.params)

    def _go_back(self, step: int) -> int:
        """Restore the checkpoint of `step` and keep the guards' states; later log lines are set aside."""
        resume.note_rollback(self.folder, step, self.guard)
        discard_after(self.folder, step)
        self.saved.delete_after(step)
        numerics = self.state.numerics
        del self.state  # frees memory for the restored state
        self.state = StepState(self.saved.restore(step, self.like, self.batches), numerics)
        self._restore_schedules(step)
        self.log.go_back(step)
        self.samples.go_back(step)
        if summary := self.held_out.summary(step):
            self._keep_best(step, summary)  # a discarded step may have replaced it
        return step

    def _weights(self, step: int) -> dict[str, float]:
        """Return the weight of each term at a step, as configured or as strengthened by the guard."""
        beta_kl, lambda_gold = collapse_guard.terms(self.guard, self.rules)
        return self.setup.terms.weights_at(step) | {"reference_kl": beta_kl, "sft": lambda_gold}


def end_if_requested(stop: Stop, where: str) -> None:
    """End the run on request, where nothing has changed since the last checkpoint."""
    reason = multihost.agree_on_stop(stop.reason)
    if reason is not None:
        raise Interrupted(f"{reason}: ended {where}; run the same command again to go on")
