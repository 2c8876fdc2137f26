"""The harness: before the rollouts of a step the current student writes a text into the teacher's prompt.

OPHSD (2605.08741; found in its code): for mathematics the student first writes a plan, with an instruction of
its own, and the teacher, shown problem and plan, scores the rollouts that the student makes of the plain
problem. Closed thoughts are removed from the plan, and a plan that is empty leaves its place empty.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from opd_jax import data, models
from opd_jax.metrics.timing import Clock
from opd_jax.metrics.tracing import stage
from opd_jax.rng import Stream, key_for
from opd_jax.training.setup import Setup
from opd_jax.training.step_functions import StepFunctions
from opd_jax.types import Outcome, Rollout

_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)


def without_thoughts(text: str) -> str:
    """Return the text without closed <think> blocks; one that the budget cut stays, as in OPHSD's code."""
    return _THOUGHTS.sub("", text).strip()


def filled(problem: data.Problem, field: str, text: str) -> data.Problem:
    """Return the problem with the text as one more column, which a template shows as {field}."""
    kept = tuple(pair for pair in problem.columns if pair[0] != field)
    return dataclasses.replace(problem, columns=(*kept, (field, text)))


class Harness:
    """The stage of a step. It holds no state: its random numbers derive from the step."""

    def __init__(self, setup: Setup, functions: StepFunctions):
        self.setup, self.functions, self.section = setup, functions, setup.config.harness

    def __call__(
        self, number: int, student: models.Params, batch: data.Batch, clock: Clock
    ) -> tuple[data.Batch, dict[str, float]]:
        """Let the student write, and return the batch with the teacher's prompts, and metrics `harness/*`.

        `number` is the step. A batch has one text for each problem, which all of its rollouts share. Without
        a harness the batch is returned as it is.
        """
        style = self.setup.harness_style
        if style is None:
            return batch, {}
        with stage("harness"):
            prompts = style.prompts(batch.problems, self.setup.tokenizer)
            key = key_for(self.setup.config.seed, number, Stream.HARNESS)
            written = self.functions.write(student, prompts, key)
            decode = self.setup.tokenizer.decode
            texts = [without_thoughts(decode(ids)) for ids in written.responses()]
            found = [self._prompt(*pair) for pair in zip(batch.problems, texts, strict=True)]
        tokens = written.response_length_B.sum()
        clock.lap("harness", tokens)
        batch = dataclasses.replace(
            batch,
            teacher_prompts=[prompt for prompt, _ in found],
            harness_texts=[text for _, text in found],
        )
        shorter = [text != shown for text, (_, shown) in zip(texts, found, strict=True)]
        return batch, _measured(written, texts) | {"harness/shortened": float(np.mean(shorter))}

    def lines(self, lines: Sequence[dict], batch: data.Batch) -> list[dict]:
        """Return lines of rollouts.jsonl with the text of each rollout's problem."""
        group = self.setup.config.rollout.samples_per_prompt
        texts = batch.harness_texts
        if texts is None:
            return list(lines)
        return [line | {self.section.field: texts[i // group]} for i, line in enumerate(lines)]

    def _prompt(self, problem: data.Problem, text: str) -> tuple[list[int], str]:
        """Return the teacher's prompt that shows the text, and the text, shortened until the prompt fits.

        The teacher's tokens of a text may be more than those that the student sampled. Without any text the
        prompt fits: that was checked when the data was opened.
        """
        setup, tokenizer = self.setup, self.setup.teacher_tokenizer
        room = setup.teacher_width - setup.teacher_response
        ids = None
        while True:
            shown = filled(problem, self.section.field, text)
            prompt = setup.teacher_style.prompts([shown], tokenizer)[0]
            excess = len(prompt) - room
            if excess <= 0 or not text:
                return prompt, text
            ids = tokenizer.encode(text) if ids is None else ids
            ids = ids[: max(len(ids) - excess, 0)]
            text = tokenizer.decode(ids).strip()


def _measured(written: Rollout, texts: Sequence[str]) -> dict[str, float]:
    """Return the metrics of what the student wrote."""
    return {
        "harness/length_mean": float(np.mean(written.response_length_B)),
        "harness/truncation_rate": float(np.mean(written.outcome_B == Outcome.BUDGET)),
        "harness/empty": float(np.mean([not text for text in texts])),
    }
