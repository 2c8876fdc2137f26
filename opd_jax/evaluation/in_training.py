"""Sample answers to held-out problems, grade them, write one line per answer, and summarise them."""

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
    """Held-out problems with the prompts of one model, and the rules for reading its answers.

    Attributes:
      tokenizer: the model's tokenizer.
      problems, prompts: the problems, and one prompt per problem in the model's ids.
      samples: answers per problem.
      repetition: rule by which an answer counts as repetitive.
      fallbacks: how to extract an answer without a box (extract.FALLBACKS).
      match: regular expression; `matched` is the share of answers in which it matches. "" is off.
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
    """Evaluate a model on the problems (avg@k), and keep every answer.

    Writes one line per answer to `out` (JSONL: id, prompt, answer, gold, grade, outcome, length,
    repetitive), and the summary together with `protocol`, the settings of the evaluation, to `out` with
    the suffix .json. Answers are sampled with `key`, so evaluation does not affect training.

    Returns truncation_rate, repetition_rate and length_mean; if some problems have a gold answer, for
    these also accuracy (mean over problems of the mean over samples), stderr (over problems), unparsed
    and timeouts (shares of answers); and if `exam.match` is set, the share `matched`.
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
    problems = [problem for problem in exam.problems for _ in range(k)]  # one entry per answer
    responses = read_responses(
        sampled.responses(),
        [problem.answer for problem in problems],
        tokenizer,
        grader=grader,
        repetition=exam.repetition,
        fallbacks=exam.fallbacks,
    )
    grades = [
        grade for grade in responses.grades if grade is not None
    ]  # k per problem with a gold answer
    summary = {
        "truncation_rate": float(metrics.truncated(sampled.outcome_B).mean()),
        "repetition_rate": float(np.mean(responses.flagged_B)),
        "length_mean": float(sampled.response_length_B.mean()),
    }
    if grades:
        correct_PK = np.array([g is Grade.CORRECT for g in grades]).reshape(-1, k)
        summary |= {
            "accuracy": statistics.avg_at_k(correct_PK),
            "stderr": statistics.stderr(correct_PK),
            "unparsed": float(np.mean([g is Grade.UNPARSED for g in grades])),
            "timeouts": float(np.mean([g is Grade.TIMEOUT for g in grades])),
        }
    if exam.match:
        matches = [bool(re.search(exam.match, text)) for text in responses.texts]
        summary["matched"] = float(np.mean(matches))
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(out) as file:
        for i, (problem, grade) in enumerate(zip(problems, responses.grades, strict=True)):
            row = {
                "id": problem.id,
                "prompt": problem.question,
                "answer": data.response_text(tokenizer, sampled.prompt(i), sampled.response(i)),
                "gold": problem.answer,
                "grade": grade.value if grade else None,
                "outcome": Outcome(int(sampled.outcome_B[i])).name.lower(),
                "length": int(sampled.response_length_B[i]),
                "repetitive": bool(responses.flagged_B[i]),
            }
            file.write(encoded(row))
    record = summary | {"protocol": dict(protocol)}
    atomic.write_json(
        out.with_suffix(".json"), record, indent=2
    )  # last: it marks the end of the evaluation
    return summary
