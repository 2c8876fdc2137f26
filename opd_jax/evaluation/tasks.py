"""Prepare benchmarks for one model: problems, prompts, and the random key of every answer."""

import collections
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from opd_jax import data
from opd_jax.data.length_filter import unknown_id
from opd_jax.errors import ConfigError, DataError
from opd_jax.evaluation.benchmarks import Benchmark, load, parse
from opd_jax.evaluation.subject import Subject
from opd_jax.rng import Stream, key_for

_WIDTH = 64  # prompts are padded to a multiple of this, so that benchmarks share compiled programs


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark with its problems, and the prompt of each problem as text and as token ids."""

    benchmark: Benchmark
    file: str
    samples: int
    problems: list[data.Problem]
    skipped: dict[str, int]
    texts: list[str]
    prompts: list[list[int]]
    columns: str = ""

    @property
    def total(self) -> int:
        """Number of answers: problems times samples."""
        return len(self.problems) * self.samples

    @property
    def width(self) -> int:
        """Width of its padded prompts, in tokens."""
        return -(-max(map(len, self.prompts)) // _WIDTH) * _WIDTH

    def slots(self, config: ConfigDict, subject: Subject) -> int:
        """Return the number of sequences decoded concurrently."""
        return config.eval.slots or subject.slots(self.width + budget(config))

    @property
    def sha256(self) -> str:
        """Hash of ids, prompt texts and gold answers, so that a result identifies its problems."""
        inputs = [[p.id, text, p.answer] for p, text in zip(self.problems, self.texts, strict=True)]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def budget(config: ConfigDict) -> int:
    """Return the token budget of an answer."""
    return config.eval.max_response_tokens or config.rollout.max_response_tokens


def make_tasks(config: ConfigDict, subject: Subject) -> list[Task]:
    """Load the benchmarks of the config, render their prompts, and check that they fit the model."""
    style = data.PromptStyle(config.data.prompt_template, config.data.system_prompt)
    tasks = []
    for benchmark, file in parse(config.eval.benchmarks):
        loaded = load(
            benchmark, file, columns=config.data.columns, bad_rows=config.data.bad_rows,
            any_size=config.eval.any_size, shown=style.columns,
        )  # fmt: skip
        problems = loaded.problems[: config.eval.problems or None]
        samples = config.eval.samples or benchmark.samples
        if config.eval.temperature == 0 and samples > 1:
            raise ConfigError(
                f"{benchmark.title} is measured by {benchmark.metric}, but eval.temperature=0 gives the "
                "same answer every time; set --config.eval.samples=1 or a temperature above 0"
            )
        texts = style.texts(problems, subject.tokenizer)
        prompts = subject.tokenizer.prompt_ids(texts)
        task = Task(
            benchmark, file, samples, problems, loaded.skipped, texts, prompts, loaded.columns
        )
        _check_lengths(task, config, subject)
        tasks.append(task)
    return tasks


def _check_lengths(task: Task, config: ConfigDict, subject: Subject) -> None:
    for problem, ids in zip(task.problems, task.prompts, strict=True):
        if not ids:
            raise DataError(
                f"{task.file}: problem {problem.id}: its prompt is empty; correct "
                "--config.data.prompt_template"
            )
        rows = {"student": subject.config.vocab_size}
        if misfit := unknown_id(ids, subject.tokenizer, what="prompt", rows=rows):
            raise DataError(f"{task.file}: problem {problem.id}: {misfit[1]}")
    need, room = task.width + budget(config), subject.config.max_position
    if need > room:
        raise ConfigError(
            f"{task.benchmark.title}: prompts of {task.width} tokens and "
            f"eval.max_response_tokens={budget(config)} exceed the model's {room} positions; set "
            f"--config.eval.max_response_tokens={max(room - task.width, 1)} or less, or extend the model's "
            f"context with --config.student.max_position={need}"
        )


def answer_keys(seed: int, texts: Sequence[str], which: Sequence[tuple[int, int]]) -> jax.Array:
    """Return the random key of each (problem, sample) pair.

    The key is derived from the seed, the text of the problem's prompt and the sample alone, so answers do
    not depend on the position of the problem in its file. Repeated prompts in a file get different keys.
    """
    repeats: collections.Counter[str] = collections.Counter()
    prompt_P = []
    for text in texts:
        prompt_P.append((zlib.crc32(text.encode(errors="replace")), repeats[text]))
        repeats[text] += 1
    folds_NF = np.array([(*prompt_P[problem], sample) for problem, sample in which], np.uint32)

    def key(fold_F: jax.Array) -> jax.Array:
        answer_key = key_for(seed, 0, Stream.BENCHMARK)
        for fold in fold_F:
            answer_key = jax.random.fold_in(answer_key, fold)
        return answer_key

    return jax.vmap(key)(jnp.asarray(folds_NF))
