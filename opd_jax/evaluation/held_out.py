"""Held-out evaluation during and after training: summaries, the best checkpoint, the closing table."""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from opd_jax import data, models
from opd_jax.checkpoint.best import Best, forget_after
from opd_jax.checkpoint.checkpoint import Checkpoints
from opd_jax.config.fields import BEST
from opd_jax.evaluation.in_training import Exam, evaluate
from opd_jax.grading.grader import Grader
from opd_jax.metrics import make_repetition_rule
from opd_jax.metrics.tracing import stage
from opd_jax.rng import Stream, key_for
from opd_jax.rollout import Batching, SamplingParams
from opd_jax.sharding import multihost
from opd_jax.training.setup import Setup
from opd_jax.training.step import Summary
from opd_jax.training.step_functions import StepFunctions
from opd_jax.training.weights import Weights
from opd_jax.types import TrainState

# Fields of the section `eval`, and a prefix of fields of `metrics`, that change answers or figures.
_TOUCHES = ("samples", "temperature", "top_p", "top_k", "match", "fallbacks")
_REPETITION = "repetition_"


def discard_after(folder: pathlib.Path, step: int) -> None:
    """Delete the best checkpoint if it is later than `step`, and set aside the answers of later steps.

    Call this when those steps are undone, by a rollback or by resuming with another config.
    """
    forget_after(folder, step)
    if not multihost.first():
        return
    aside = folder / "eval.rolled_back"
    for answers in folder.glob("eval/[0-9]*"):
        if int(answers.name) > step:
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / answers.name, ignore_errors=True)
            answers.rename(aside / answers.name)


class HeldOut:
    """Evaluate the student and the teacher of a run on its held-out problems."""

    def __init__(
        self,
        setup: Setup,
        functions: StepFunctions,
        weights: Weights,
        folder: pathlib.Path,
        grader: Grader,
    ):
        self.setup, self.config, self.folder = setup, setup.config, folder
        self.functions, self.weights, self.grader = functions, weights, grader
        self.name = pathlib.PurePath(self.config.eval.data.partition(":")[0]).stem

    def __bool__(self) -> bool:
        """Whether the run has held-out problems."""
        return bool(self.setup.held_out)

    def evaluate(self, step: int | str, state: TrainState) -> Summary:
        """Evaluate the student's current weights, or the teacher if `step` is "teacher"; return the summary.

        Writes the answers to eval/STEP/. The teacher uses its own prompts, ids and end tokens; of several it
        is that of teacher.path.
        """
        setup, config = self.setup, self.config
        params: models.Params | None
        if step == "teacher" and setup.teacher is not None:
            params = self.weights.placed(self.weights.teacher, setup.mesh)
            if params is None:  # the teacher's weights follow the student's
                params = self.functions.teacher_weights(self.weights.scorer, state)
            model, tokenizer, prompts = (
                setup.teacher,
                setup.teacher_tokenizer,
                setup.teacher_prompts,
            )
            width = setup.teacher_width - setup.teacher_response
            ids = data.alone(min(tokenizer.size, model.vocab_size), model.eos_token_ids)
        else:
            params = self.functions.compute_weights(state.params)
            model, tokenizer, prompts = setup.student, setup.tokenizer, setup.prompts
            width, ids = config.rollout.max_prompt_tokens, setup.alignment
        assert params is not None
        with stage("evaluate"):
            return evaluate(
                models.Model(model, params),
                self._exam(tokenizer, prompts),
                self._sampling(ids),
                key=key_for(config.seed, 0, Stream.EVAL),
                batching=Batching(
                    slots=config.eval.slots or config.rollout.slots or 256,
                    max_prompt_tokens=width,
                    mesh=setup.mesh,
                    tile=setup.spec.tile,
                ),
                grader=self.grader,
                protocol=self.protocol(prompts, ids),
                out=self.folder / "eval" / str(step) / f"{self.name}.jsonl",
            )

    def _exam(self, tokenizer: data.Tokenizer, prompts: list[list[int]]) -> Exam:
        """Return the held-out problems with the prompts of one model."""
        section = self.config.eval
        return Exam(
            tokenizer,
            self.setup.held_out,
            prompts,
            samples=section.samples,
            repetition=make_repetition_rule(self.config.metrics),
            fallbacks=tuple(section.fallbacks),
            match=section.match,
        )

    def _sampling(self, ids: data.Alignment) -> SamplingParams:
        """Return the sampling settings of a model; `ids` are the ids that its answers may have."""
        section = self.config.eval
        return SamplingParams(
            section.max_response_tokens or self.config.rollout.max_response_tokens,
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            stop_ids=ids.stop_ids,
            vocabulary=ids.vocabulary,
            drawn_V=None if ids.drawn.all() else ids.drawn,
        )

    def keep_best(self, step: int, summary: Summary, save: Callable[[Checkpoints], None]) -> None:
        """Keep the checkpoint of `step` in best/ if its `eval.best` is the best so far; `save` writes it."""
        metric = self.config.eval.best
        if metric:
            Best(self.folder, metric=metric, more=BEST[metric]).offer(
                step, summary, save, comparable=lambda kept: self.summary(kept) is not None
            )

    def table(self, last: int, state: TrainState) -> dict[str, Summary]:
        """Return the rows of the closing table.

        An evaluation that is missing is run now, except that of the student before training, whose
        weights are gone: its row is omitted.
        """
        table = {}
        if before := self.summary(0):
            table["student before"] = before
        table["student after"] = self.summary(last) or self.evaluate(last, state)
        if self.setup.teacher is not None and self.config.eval.teacher:
            table["teacher"] = self.evaluate("teacher", state)
        return table

    def summary(self, step: int) -> Summary | None:
        """Return the summary of a past evaluation, also from before a resume.

        Returns None if there is none or if its protocol differs, because the two are not comparable.
        """
        file = self.folder / "eval" / str(step) / f"{self.name}.json"

        def read() -> Summary | None:
            summary = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            protocol = self.protocol(self.setup.prompts, self.setup.alignment)
            return summary if summary.pop("protocol", None) == protocol else None

        return multihost.from_first(read)

    def protocol(self, prompts: list[list[int]], ids: data.Alignment) -> dict[str, Any]:
        """Return everything that a model's figures depend on except its weights, as JSON values.

        `prompts` are those of the held-out problems for this model, `ids` the ids its answers may have.
        """
        config = self.config
        inputs = [
            [problem.id, list(map(int, prompt)), problem.answer]
            for problem, prompt in zip(self.setup.held_out, prompts, strict=True)
        ]
        fields = {name: config.eval[name] for name in _TOUCHES}
        fields |= {"grader": config.grading.grader, "seconds": config.grading.seconds}
        fields |= {"stop_ids": ids.stop_ids, "never": np.flatnonzero(~ids.drawn).tolist()}
        fields["max_response_tokens"] = (
            config.eval.max_response_tokens or config.rollout.max_response_tokens
        )
        repetition = {
            name: config.metrics[name] for name in config.metrics if name.startswith(_REPETITION)
        }
        problems = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        return json.loads(
            json.dumps({"seed": config.seed, "problems": problems} | fields | repetition)
        )

    def keys(self, summary: Summary) -> Summary:
        """Return a summary under its keys of metrics.jsonl, `eval/NAME/*`."""
        return {f"eval/{self.name}/{name}": value for name, value in summary.items()}
