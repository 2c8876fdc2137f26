"""Held-out answers on the way and at the end: measured, kept by the best, told in the closing table."""

import json
import pathlib
from collections.abc import Callable

from opd_jax import data, models, processes
from opd_jax.best import Best
from opd_jax.checkpoint import Checkpoints
from opd_jax.eval.evaluate import evaluate
from opd_jax.eval.grade import Grader
from opd_jax.keys import Stream, key_for
from opd_jax.profiling import stage
from opd_jax.rules import BEST
from opd_jax.setup import Setup
from opd_jax.stepping import Stepper, Summary


class HeldOut:
    """The held-out problems of a run, and what its student and teacher make of them."""

    def __init__(self, setup: Setup, stepper: Stepper, folder: pathlib.Path, grader: Grader):
        self.setup, self.config, self.folder = setup, setup.config, folder
        self.stepper, self.grader = stepper, grader
        self.name = pathlib.PurePath(self.config.eval.data.partition(":")[0]).stem

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.setup.held_out)

    def evaluate(self, step: int | str) -> Summary:
        """Held-out answers of the student as it is, or of the "teacher", written to eval/STEP/.

        The teacher answers as itself: its own prompts, ids and end tokens.
        """
        setup, config, stepper = self.setup, self.config, self.stepper
        params: models.Params | None
        if step == "teacher" and setup.teacher is not None:
            params = stepper.teacher_now() if stepper.teacher is None else stepper.teacher
            model, tokenizer, prompts = (
                setup.teacher,
                setup.teacher_tokenizer,
                setup.teacher_prompts,
            )
            width = setup.teacher_width - config.rollout.max_response_tokens
            ids = data.alone(min(tokenizer.size, model.vocab_size), model.eos_token_ids)
        else:
            params = setup.mesh.compute(stepper.state.params, stepper.dtype)
            model, tokenizer, prompts = setup.student, setup.tokenizer, setup.prompts
            width, ids = config.rollout.max_prompt_tokens, setup.alignment
        assert params is not None
        with stage("evaluate"):
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
                out=self.folder / "eval" / str(step) / f"{self.name}.jsonl",
                mesh=setup.mesh,
            )

    def keep_best(self, step: int, summary: Summary, save: Callable[[Checkpoints], None]) -> None:
        """The checkpoint with the best `eval.best` so far lies in best/; `save` writes one."""
        metric = self.config.eval.best
        if metric:
            Best(self.folder, metric=metric, more=BEST[metric]).offer(step, summary, save)

    def table(self, last: int) -> dict[str, Summary]:
        """The rows of the closing table. What an earlier part of the run did not measure is measured
        now, or left out where its weights are gone."""
        table = {}
        if before := self.summary(0):
            table["student before"] = before
        table["student after"] = self.summary(last) or self.evaluate(last)
        if self.setup.teacher is not None and self.config.eval.teacher:
            table["teacher"] = self.evaluate("teacher")
        return table

    def summary(self, step: int) -> Summary | None:
        """The summary of an evaluation already made, maybe before a resume; None without one."""
        file = self.folder / "eval" / str(step) / f"{self.name}.json"
        return processes.from_first(
            lambda: json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        )

    def keys(self, summary: Summary) -> Summary:
        """The `eval/*` keys of a summary."""
        return {f"eval/{self.name}/{name}": value for name, value in summary.items()}
