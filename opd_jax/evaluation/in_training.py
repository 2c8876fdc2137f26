"""Answer held-out problems, grade the answers, write one line for each, and summarise them."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from opd_jax import data, metrics
from opd_jax.evaluation import statistics
from opd_jax.grading.grader import Grade, Grader
from opd_jax.models import Model
from opd_jax.rollout import Batching, SamplingParams, read_responses, row_keys, sample_responses
from opd_jax.sharding import multihost
from opd_jax.types import Outcome, Rollout
from opd_jax.workdir import atomic
from opd_jax.workdir.jsonl import encoded


@dataclasses.dataclass(frozen=True)
class Exam:
    """Held-out problems, as one model is asked them, and how its answers are read.

    Attributes:
      tokenizer: the model's. problems: with `prompts`, one each, in the model's ids.
      samples: answers to each problem.
      repetition: when an answer counts as repetitive.
      fallbacks: where an answer is looked for without a box (extract.FALLBACKS).
      match: a regular expression; `matched` is the share of answers that it is found in. "" is off.
    """

    tokenizer: data.Tokenizer
    problems: Sequence[data.Problem]
    prompts: Sequence[Sequence[int]]
    samples: int
    repetition: metrics.RepetitionRule
    fallbacks: tuple[str, ...] = ()
    match: str = ""


def evaluate(
    model: Model,
    exam: Exam,
    sampling: SamplingParams,
    *,
    key: jax.Array,
    batching: Batching,
    grader: Grader,
    out: pathlib.Path,
    protocol: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, float]:
    """avg@k of a model on problems, with every answer kept.

    Writes one line an answer to `out` (JSONL: id, prompt, answer, gold, grade, outcome, length) and the
    summary beside it (`out` with .json), together with `protocol`: how the answers were made. Answers
    are drawn from `key`, so evaluation leaves training alone.

    Returns truncation_rate, repetition_rate, length_mean; over the problems with a gold answer, where
    there are any, accuracy (mean over problems of the mean over samples), stderr (over problems),
    unparsed and timeouts (shares of answers); and with `exam.match` the share `matched`.
    """
    prompts = [prompt for prompt in exam.prompts for _ in range(exam.samples)]
    sampled = sample_responses(
        model, prompts, sampling, keys=row_keys(key, len(prompts)), batching=batching
    )
    return multihost.from_first(
        lambda: _report(sampled, exam, grader=grader, out=out, protocol=protocol)
    )


def _report(
    sampled: Rollout, exam: Exam, *, grader: Grader, out: pathlib.Path, protocol: Mapping[str, Any]
) -> dict[str, float]:
    """Grade the answers, write them, and summarise them."""
    k, tokenizer = exam.samples, exam.tokenizer
    answers = [problem for problem in exam.problems for _ in range(k)]
    read = read_responses(
        sampled.responses(),
        [problem.answer for problem in answers],
        tokenizer,
        grader=grader,
        repetition=exam.repetition,
        fallbacks=exam.fallbacks,
    )
    graded = [grade for grade in read.grades if grade is not None]  # k of each with an answer
    summary = {
        "truncation_rate": float(metrics.truncated(sampled.outcome_B).mean()),
        "repetition_rate": float(np.mean(read.flagged_B)),
        "length_mean": float(sampled.response_length_B.mean()),
    }
    if graded:
        correct_PK = np.array([g is Grade.CORRECT for g in graded]).reshape(-1, k)
        summary |= {
            "accuracy": statistics.avg_at_k(correct_PK),
            "stderr": statistics.stderr(correct_PK),
            "unparsed": float(np.mean([g is Grade.UNPARSED for g in graded])),
            "timeouts": float(np.mean([g is Grade.TIMEOUT for g in graded])),
        }
    if exam.match:
        summary["matched"] = float(np.mean([bool(re.search(exam.match, t)) for t in read.texts]))
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(out) as file:
        for i, (problem, grade) in enumerate(zip(answers, read.grades, strict=True)):
            row = {
                "id": problem.id,
                "prompt": problem.question,
                "answer": data.response_text(tokenizer, sampled.prompt(i), sampled.response(i)),
                "gold": problem.answer,
                "grade": grade.value if grade else None,
                "outcome": Outcome(int(sampled.outcome_B[i])).name.lower(),
                "length": int(sampled.response_length_B[i]),
                "repetitive": bool(read.flagged_B[i]),
            }
            file.write(encoded(row))
    told = summary | {"protocol": dict(protocol)}
    atomic.write_json(out.with_suffix(".json"), told, indent=2)  # last: it says that all is there
    return summary
