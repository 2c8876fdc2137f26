"""Sample, grade and summarise the responses of a probe."""

import dataclasses
import operator
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import jax
import numpy as np

from opd_jax import data, hardware, metrics, models
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
    """Part of a probe, which selects its random key; do not change the numbers."""

    ROLLOUT = 0
    STUDENT = 1
    TEACHER = 2


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model with what it samples from: its prompts (one per problem), ids, and end tokens.

    `texts` are the rendered prompts, `prompts` their ids. `drawn_V` is the allowed-token mask, None for all
    of the first `vocabulary` ids.
    """

    model: models.ModelConfig
    tokenizer: data.Tokenizer
    texts: list[str]
    prompts: list[list[int]]
    vocabulary: int
    stop_ids: tuple[int, ...]
    drawn_V: np.ndarray | None

    def behind(self, other: "Writer") -> "Writer":
        """Return this model with prompts for continuing responses of `other`.

        A thinking block is open at the end of a prompt only where it is open in the prompt of `other`.
        """
        begun = [template_boundary.opening(text, closed=False) for text in other.texts]
        texts = [template_boundary.begun_as(*pair) for pair in zip(self.texts, begun, strict=True)]
        return dataclasses.replace(self, texts=texts, prompts=self.tokenizer.prompt_ids(texts))


@dataclasses.dataclass(frozen=True)
class Answer:
    """A complete answer, including its prefix; `grade` is None where the problem has no answer."""

    text: str
    grade: Grade | None
    truncated: bool
    repetitive: bool
    length: int

    @property
    def right(self) -> float:
        """1 for a correct answer, 0 for any other."""
        return float(self.grade is Grade.CORRECT)

    def as_json(self) -> dict[str, Any]:
        """Return the fields in the format of a report."""
        return dataclasses.asdict(self) | {"grade": self.grade and self.grade.value}


def student_writer(plan: Plan) -> Writer:
    """Return the student as in the rollouts of training."""
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
    """Return a teacher with its own prompts, ids and end tokens."""
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
    """Sample responses to the problems `which`, each after its prefix, within the rest of the budget.

    `prefixes`, in the writer's ids, all have the same length. They count as prompt in the returned rows.
    Samples depend on the seed, `probe.batch`, the prefix length, `part`, and the order of `which`.
    """
    config, section = plan.config, plan.config.rollout
    depth = len(prefixes[0]) if prefixes else 0
    rows = [
        [*writer.prompts[problem], *(prefixes[i] if prefixes else ())]
        for i, problem in enumerate(which)
    ]
    # The width covers all problems, so that decoding compiles once per depth.
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
        chunk = rows[start : start + size]
        full = [*chunk, *[rows[0]] * (size - len(chunk))]  # pad the last batch to the same shapes
        sampled = sample_responses(
            model,
            full,
            sampling,
            keys=row_keys(jax.random.fold_in(key, batch), len(full)),
            batching=Batching(
                slots=section.slots or None,
                max_prompt_tokens=width,
                tile=hardware.tile(gpu=jax.default_backend() == "gpu"),
            ),
        )
        parts.append(jax.tree.map(operator.itemgetter(slice(len(chunk))), sampled))
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
    """Return the complete answers as text, including prefixes, graded where their problems have answers."""
    answers = [
        [*(prefixes[i] if prefixes else ()), *written.response(i)] for i in range(len(which))
    ]
    texts = [
        data.response_text(writer.tokenizer, writer.prompts[problem], ids)
        for problem, ids in zip(which, answers, strict=True)
    ]
    golds = [plan.problems[problem].answer for problem in which]
    responses = read_responses(
        answers, golds, writer.tokenizer,
        grader=grader, repetition=metrics.make_repetition_rule(plan.config.metrics),
    )  # fmt: skip
    truncated = metrics.truncated(written.outcome_B).tolist()
    return [
        Answer(
            text,
            responses.grades[i],
            truncated[i],
            bool(responses.flagged_B[i]),
            len(answers[i]),
        )
        for i, text in enumerate(texts)
    ]


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Return a row for console.table; accuracies cover the graded answers."""
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
