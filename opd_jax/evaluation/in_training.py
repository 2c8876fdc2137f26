"""Answers to held-out problems: sampled, graded, written down one by one, and summarised."""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from opd_jax import data, metrics
from opd_jax.evaluation import statistics
from opd_jax.grading.grader import Grade, Grader
from opd_jax.models import ModelConfig, Params
from opd_jax.rollout import generate
from opd_jax.sharding import multihost
from opd_jax.sharding.mesh import ONE, Mesh
from opd_jax.types import Outcome, Rollout
from opd_jax.workdir import atomic


def evaluate(
    params: Params,
    model_config: ModelConfig,
    tokenizer: data.Tokenizer,
    problems: Sequence[data.Problem],
    prompts: Sequence[Sequence[int]],
    *,
    max_prompt_tokens: int,
    key: jax.Array,
    section: Any,
    rollout: Any,
    repetition: Any,
    stop_ids: Sequence[int],
    vocabulary: int,
    drawn_V: np.ndarray | None = None,
    grader: Grader,
    out: pathlib.Path,
    protocol: dict[str, Any] | None = None,
    mesh: Mesh = ONE,
) -> dict[str, float]:
    """avg@k of a model on problems, with everything needed to look behind it.

    `section`, `rollout`, `repetition` are the config sections eval, rollout and metrics. Writes one
    line an answer to `out` (JSONL: id, prompt, answer, gold, grade, outcome, length) and the summary
    beside it (`out` with .json), together with `protocol`: how the answers were made. Answers are
    drawn from `key`, so evaluation leaves training alone.

    Returns truncation_rate, repetition_rate, length_mean; over the problems with a gold answer, where
    there are any, accuracy (mean over problems of the mean over samples), stderr (over problems),
    unparsed and timeouts (shares of answers); and with `section.match` the share of answers it is found in,
    `matched`.
    """
    k = section.samples
    sampled = generate(
        params,
        model_config,
        [prompt for prompt in prompts for _ in range(k)],
        key=key,
        max_response_tokens=section.max_response_tokens or rollout.max_response_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        stop_ids=stop_ids,
        slots=section.slots or rollout.slots or 256,
        max_prompt_tokens=max_prompt_tokens,
        vocabulary=vocabulary,
        drawn_V=drawn_V,
        mesh=mesh,
    )
    return multihost.from_first(
        lambda: _report(
            sampled,
            tokenizer,
            problems,
            section=section,
            repetition=repetition,
            grader=grader,
            out=out,
            protocol=protocol or {},
        )
    )


def _report(
    sampled: Rollout,
    tokenizer: data.Tokenizer,
    problems: Sequence[data.Problem],
    *,
    section: Any,
    repetition: Any,
    grader: Grader,
    out: pathlib.Path,
    protocol: dict[str, Any],
) -> dict[str, float]:
    """Grade, write down, summarise."""
    k = section.samples
    answers = [problem for problem in problems for _ in range(k)]
    texts = [tokenizer.decode(sampled.response(i)) for i in range(len(answers))]
    grades = grader.grade_answered(
        ((text, p.answer) for text, p in zip(texts, answers, strict=True)),
        fallbacks=tuple(section.fallbacks),
    )
    graded = [grade for grade in grades if grade is not None]  # k of each problem with an answer
    flagged = metrics.flagged(
        texts,
        tail=repetition.repetition_tail,
        threshold=repetition.repetition_threshold,
        level=repetition.repetition_level,
    ).tolist()
    summary = {
        "truncation_rate": float(metrics.truncated(sampled.outcome_B).mean()),
        "repetition_rate": float(np.mean(flagged)),
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
    if section.match:
        summary["matched"] = float(np.mean([bool(re.search(section.match, t)) for t in texts]))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for i, (problem, grade) in enumerate(zip(answers, grades, strict=True)):
            row = {
                "id": problem.id,
                "prompt": problem.question,
                "answer": data.response_text(tokenizer, sampled.prompt(i), sampled.response(i)),
                "gold": problem.answer,
                "grade": grade.value if grade else None,
                "outcome": Outcome(int(sampled.outcome_B[i])).name.lower(),
                "length": int(sampled.response_length_B[i]),
                "repetitive": flagged[i],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    told = summary | {"protocol": protocol}
    atomic.write_json(out.with_suffix(".json"), told, indent=2)  # last: it says that all is there
    return summary
