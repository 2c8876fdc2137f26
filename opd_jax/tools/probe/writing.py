"""Who writes in a probe, and what becomes of it: responses sampled, graded, and summed up."""

import dataclasses
import operator
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import jax
import numpy as np

from opd_jax import data, metrics, models
from opd_jax.data import template_boundary
from opd_jax.grading.grader import Grade, Grader
from opd_jax.rng import Stream, key_for
from opd_jax.rollout import Batching, SamplingParams, read_responses, row_keys, sample_responses
from opd_jax.tools.probe.means import mean
from opd_jax.tools.probe.workload import Plan
from opd_jax.training.setup import Setup
from opd_jax.types import Rollout
from opd_jax.workdir.console import Progress


class Part(IntEnum):
    """Which of a probe's draws a key is for; numbers stay."""

    ROLLOUT = 0
    STUDENT = 1
    TEACHER = 2


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model as it writes by itself: its prompts (one a problem), ids, and end tokens.

    `texts` are the prompts as rendered. `drawn_V` are the ids that it may write, None for all of the
    first `vocabulary`.
    """

    model: models.ModelConfig
    tokenizer: data.Tokenizer
    texts: list[str]
    prompts: list[list[int]]
    vocabulary: int
    stop_ids: tuple[int, ...]
    drawn_V: np.ndarray | None

    def behind(self, other: "Writer") -> "Writer":
        """The same model where it goes on with what another one has written behind its own prompts.

        Thoughts that the other's prompts opened are opened, those that only its own would open not.
        """
        begun = [template_boundary.opening(text, closed=False) for text in other.texts]
        texts = [template_boundary.begun_as(*pair) for pair in zip(self.texts, begun, strict=True)]
        return dataclasses.replace(self, texts=texts, prompts=self.tokenizer.prompt_ids(texts))


@dataclasses.dataclass(frozen=True)
class Answer:
    """One whole answer, a given prefix included; `grade` is None where the problem has no answer."""

    text: str
    grade: Grade | None
    truncated: bool
    repetitive: bool
    length: int

    @property
    def right(self) -> float:
        """1 for a right answer, 0 for any other."""
        return float(self.grade is Grade.CORRECT)

    def as_json(self) -> dict[str, Any]:
        """The fields, as a report holds them."""
        return dataclasses.asdict(self) | {"grade": self.grade and self.grade.value}


def student_writer(plan: Plan) -> Writer:
    """The student as it rolls out in training."""
    setup, drawn_V = plan.setups[0], plan.drawn
    texts = setup.student_style.texts(plan.problems, setup.tokenizer)
    return Writer(
        setup.student,
        setup.tokenizer,
        texts,
        setup.tokenizer.prompt_ids(texts),
        setup.alignment.vocabulary,
        plan.stop_ids,
        None if drawn_V.all() else drawn_V,
    )


def teacher_writer(setup: Setup, problems: Sequence[data.Problem]) -> Writer:
    """A teacher as itself: its own prompts, ids and end tokens."""
    assert setup.teacher is not None  # a plan has a teacher
    tokenizer = setup.teacher_tokenizer
    ids = data.alone(min(tokenizer.size, setup.teacher.vocab_size), setup.teacher.eos_token_ids)
    texts = setup.teacher_style.texts(problems, tokenizer)
    prompts = tokenizer.prompt_ids(texts)
    return Writer(setup.teacher, tokenizer, texts, prompts, ids.vocabulary, ids.stop_ids, None)


def write(
    plan: Plan,
    params: models.Params,
    writer: Writer,
    which: Sequence[int],
    *,
    part: Part,
    prefixes: Sequence[Sequence[int]] = (),
    what: str,
    progress: Progress,
) -> Rollout:
    """Let a model answer the problems `which`, each behind its prefix, within what is left of the budget.

    `prefixes`, in the writer's ids, are all of one length. They count as prompt in the rows returned.
    Draws depend on the seed, `probe.batch`, the prefix's length, `part`, and the order of `which`.
    """
    config, section = plan.config, plan.config.rollout
    depth = len(prefixes[0]) if prefixes else 0
    rows = [
        [*writer.prompts[problem], *(prefixes[i] if prefixes else ())]
        for i, problem in enumerate(which)
    ]
    # The width is that of all problems, so that decoding is compiled once for every depth.
    width = max(map(len, writer.prompts)) + depth
    size = min(config.probe.batch, len(rows))
    key = jax.random.fold_in(key_for(config.seed, depth, Stream.PROBE), int(part))
    sampling = SamplingParams(
        section.max_response_tokens - depth,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        stop_ids=writer.stop_ids,
        vocabulary=writer.vocabulary,
        drawn_V=writer.drawn_V,
    )
    model = models.Model(writer.model, params)
    began, tokens, parts = time.perf_counter(), 0, []
    for batch, start in enumerate(range(0, len(rows), size)):
        taken = rows[start : start + size]
        full = [*taken, *[rows[0]] * (size - len(taken))]  # the same shapes in the last batch
        sampled = sample_responses(
            model,
            full,
            sampling,
            keys=row_keys(jax.random.fold_in(key, batch), len(full)),
            batching=Batching(slots=section.slots or None, max_prompt_tokens=width),
        )
        parts.append(jax.tree.map(operator.itemgetter(slice(len(taken))), sampled))
        done, seconds = min(start + size, len(rows)), time.perf_counter() - began
        tokens += int(parts[-1].response_length_B.sum())
        progress.show(
            f"{what}: {done}/{len(rows)} in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s",
            always=done == len(rows),
        )
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def read(
    plan: Plan,
    written: Rollout,
    writer: Writer,
    which: Sequence[int],
    grader: Grader,
    *,
    prefixes: Sequence[Sequence[int]] = (),
) -> list[Answer]:
    """The whole answers as text, prefixes included, graded where their problems have answers."""
    whole = [[*(prefixes[i] if prefixes else ()), *written.response(i)] for i in range(len(which))]
    complete = [
        data.response_text(writer.tokenizer, writer.prompts[problem], ids)
        for problem, ids in zip(which, whole, strict=True)
    ]
    golds = [plan.problems[problem].answer for problem in which]
    found = read_responses(
        whole, golds, writer.tokenizer,
        grader=grader, repetition=metrics.make_repetition_rule(plan.config.metrics),
    )  # fmt: skip
    cut = metrics.truncated(written.outcome_B).tolist()
    return [
        Answer(text, found.grades[i], cut[i], bool(found.flagged_B[i]), len(whole[i]))
        for i, text in enumerate(complete)
    ]


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """The row of a table (console.table); accuracies are of the answers that were graded."""
    row = {
        "truncation_rate": mean([answer.truncated for answer in answers]).value,
        "repetition_rate": mean([answer.repetitive for answer in answers]).value,
        "length_mean": mean([answer.length for answer in answers]).value,
    }
    graded = [answer for answer in answers if answer.grade is not None]
    if graded:
        accuracy = mean([answer.right for answer in graded])
        row |= {
            "accuracy": accuracy.value,
            "stderr": accuracy.stderr,
            "graded": len(graded),
            "unparsed": mean([answer.grade is Grade.UNPARSED for answer in graded]).value,
            "timeouts": mean([answer.grade is Grade.TIMEOUT for answer in graded]).value,
        }
    return row
