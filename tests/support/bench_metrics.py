"""What measuring a step and grading its answers cost: `python -m tests.support.bench_metrics`.

With a model's folder: what the statistics of the two distributions cost in scoring.

Records made at random go through `Collector.understand` and `measure`: decoding, RepRate, repetitive
tokens, means by position, hedging, right against wrong. Not collected by pytest.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs import recipes
from opd_jax import data, scoring
from opd_jax import models as hf
from opd_jax.grading import Grade, Grader
from opd_jax.metrics import make_repetition_rule
from opd_jax.rollout import read_responses
from opd_jax.training.experience import Collector
from opd_jax.types import Outcome, Rollout, Scores
from tests.support import calls

PIECES = 5_000
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word_pieces() -> data.Tokenizer:
    """A byte-level tokenizer of random pieces of two or three letters, half of which begin a word."""
    draw = np.random.default_rng(0)
    names = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    names |= dict.fromkeys(["\u0120but", "\u0120wait"])
    while len(names) < PIECES:
        letters = "".join(draw.choice(list(LETTERS), draw.integers(2, 4)))
        names[("\u0120" if draw.random() < 0.5 else "") + letters] = None
    inner = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
        return data.Tokenizer(folder)


def records(
    rows: int, tokens: int, size: int, looping: float
) -> tuple[Rollout, Scores, list[Grade]]:
    """Rollouts of which a share of `looping` says 30 tokens over and over from a fifth on."""
    draw = np.random.default_rng(1)
    prompt = tokens // 8
    ids = draw.integers(0, size, (rows, prompt + tokens)).astype(np.int32)
    begin = prompt + tokens // 5
    for row in range(round(rows * looping)):
        ids[row, begin:] = np.resize(ids[row, begin - 30 : begin], prompt + tokens - begin)
    prompts = draw.integers(1, prompt + 1, rows).astype(np.int32)
    rollout = Rollout(
        tokens_BT=ids,
        length_B=prompts + tokens,
        prompt_length_B=prompts,
        sampler_logprob_BT=-draw.exponential(size=ids.shape).astype(np.float32),
        outcome_B=np.full(rows, Outcome.BUDGET),
    )
    numbers = {
        name: -draw.exponential(size=ids.shape).astype(np.float32)
        for name in ("student_logprob", "student_entropy", "teacher_logprob", "teacher_entropy",
                     "reverse_kl", "overlap_ratio", "overlap_advantage", "student_overlap_mass",
                     "teacher_overlap_mass")
    }  # fmt: skip
    scores = Scores(**{f"{name}_BT": x for name, x in numbers.items()})
    grades = [Grade.CORRECT if right else Grade.WRONG for right in draw.random(rows) < 0.5]
    return rollout, scores, grades


def prepare(recipe: str, tokenizer: data.Tokenizer, *, rows: int, tokens: int) -> tuple[Any, ...]:
    """A collector that can do nothing but measure, and what it is given."""
    config = recipes.recipe(recipe)
    config.rollout.max_response_tokens = tokens
    setup = SimpleNamespace(
        config=config,
        tokenizer=tokenizer,
        first_pieces=(),
        alignment=data.alone(tokenizer.size, ()),
    )
    return Collector(setup, None, None), *records(rows, tokens, tokenizer.size, looping=0.5)  # type: ignore[arg-type]


def measure(
    collector: Collector, rollout: Rollout, scores: Scores, grades: list[Grade] | None
) -> dict[str, float]:
    """What a step does after scoring: decode, understand, measure."""
    read = read_responses(
        rollout.responses(), [""] * len(rollout.length_B), collector.setup.tokenizer,
        grader=None, repetition=make_repetition_rule(collector.config.metrics),
    )  # fmt: skip
    read = dataclasses.replace(read, grades=grades or read.grades)
    return collector.measure(collector.understand(rollout, scores, read))


def milliseconds(work: Callable[[], Any], clock: Callable[[], float], repeats: int = 7) -> float:
    """Median; the first time is left out."""
    taken = []
    for _ in range(repeats + 1):
        began = clock()
        work()
        taken.append((clock() - began) * 1e3)
    return statistics.median(taken[1:])


def grading(grader: Grader, form: str) -> str:
    """Milliseconds and rate for 64 answers whose box holds a number as `form` writes it."""
    pairs = [(f"{i}+{i}={2 * i}.\n\\boxed{{{form.format(2 * i)}}}", str(2 * i)) for i in range(64)]
    took = milliseconds(lambda: grader.grade(pairs), time.perf_counter)
    return f"{took:.2f} ms, {64e3 / took:,.0f} answers/s"


def scoring_statistics(folder: str, chunk: int, rows: int = 4, tokens: int = 384) -> str:
    """Scoring with everything that is measured against the two log-probs that OPD itself needs."""
    config, params = hf.load(folder, dtype=jnp.float32)
    draw = np.random.default_rng(0)
    ids = draw.integers(0, config.vocab_size, (rows, tokens)).astype(np.int32)
    length = np.full(rows, tokens, np.int32)

    def everything() -> None:
        calls.score(
            params, config, params, config, ids, length,
            vocabulary=config.vocab_size, top_k=16, token_chunk=chunk, microbatch_tokens=rows * tokens,
        )  # fmt: skip

    def least() -> None:
        for _ in range(2):
            jax.block_until_ready(
                scoring.token_logprob(params, config, ids, length, token_chunk=chunk)
            )

    most, least_ms = (milliseconds(work, time.process_time, 3) for work in (everything, least))
    return (
        f"scoring {rows} x {tokens}, logits of {chunk} tokens at a time: {most:,.0f} ms of CPU time, "
        f"of sampled tokens alone {least_ms:,.0f} ms"
    )


def main() -> None:
    if len(sys.argv) > 1:
        for chunk in (128, 512, 2048):
            print(scoring_statistics(sys.argv[1], chunk))
        return
    tiny = recipes.recipe("tiny").student.path
    cases = {
        "64 x 200, recipe tiny": prepare("tiny", data.Tokenizer(tiny), rows=64, tokens=200),
        "256 x 8192, the paper's recipe": prepare(
            "qwen2.5-math-7b,data=x.jsonl", word_pieces(), rows=256, tokens=8192
        ),
    }
    for name, (collector, *given) in cases.items():
        for rule in ("tail", "ngram"):
            collector.config.metrics.repeated_tokens = rule
            took = milliseconds(partial(measure, collector, *given), time.process_time)
            row = measure(collector, *given)
            print(
                f"{name}, {rule}: {took:.1f} ms of one core; RepRate "
                f"{row['rollout/repetition_rate']:.2f}, repetitive tokens "
                f"{row['score/repeated_token_fraction']:.2f}, {len(row)} keys"
            )
    with Grader() as grader:
        print(f"64 answers, whole numbers: {grading(grader, '{}')}")
        print(f"64 answers, by math-verify: {grading(grader, '{}.0')}")


if __name__ == "__main__":
    main()
