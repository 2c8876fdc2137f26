"""Benchmarks as one model is asked them: problems, prompts, and the key of every answer."""

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

_WIDTH = 64  # prompts' rows are a multiple of this wide: benchmarks share compiled programs


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark, ready: its problems, and each one's prompt as text and as ids."""

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
        """Answers."""
        return len(self.problems) * self.samples

    @property
    def width(self) -> int:
        """Of its prompts' rows."""
        return -(-max(map(len, self.prompts)) // _WIDTH) * _WIDTH

    def slots(self, config: ConfigDict, subject: Subject) -> int:
        """Sequences decoded at one time."""
        return config.eval.slots or subject.slots(self.width + budget(config))

    @property
    def sha256(self) -> str:
        """Of ids, prompt texts and gold answers: with it a result says what was asked."""
        shown = [[p.id, text, p.answer] for p, text in zip(self.problems, self.texts, strict=True)]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def budget(config: ConfigDict) -> int:
    """Tokens an answer may have."""
    return config.eval.max_response_tokens or config.rollout.max_response_tokens


def make_tasks(config: ConfigDict, subject: Subject) -> list[Task]:
    """The benchmarks that the config names, their prompts rendered and measured."""
    style = data.PromptStyle(config.data.prompt_template, config.data.system_prompt)
    tasks = []
    for benchmark, file in parse(config.eval.benchmarks):
        loaded = load(
            benchmark, file, columns=config.data.columns, bad_rows=config.data.bad_rows,
            any_size=config.eval.any_size,
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
            f"eval.max_response_tokens={budget(config)} are more than the model's {room} positions; set "
            f"--config.eval.max_response_tokens={max(room - task.width, 1)} or less, or stretch the model: "
            f"--config.student.max_position={need}"
        )


def answer_keys(seed: int, texts: Sequence[str], which: Sequence[tuple[int, int]]) -> jax.Array:
    """The key of each (problem, sample): of the seed, the problem's prompt and the sample, no more.

    So a problem's answers do not depend on its place in the file. Where a prompt is there several
    times (a file that repeats its problems), each time counts as another.
    """
    times: collections.Counter[str] = collections.Counter()
    prompt_P = []
    for text in texts:
        prompt_P.append((zlib.crc32(text.encode(errors="replace")), times[text]))
        times[text] += 1
    folds_NF = np.array([(*prompt_P[problem], sample) for problem, sample in which], np.uint32)

    def key(fold_F: jax.Array) -> jax.Array:
        made = key_for(seed, 0, Stream.BENCHMARK)
        for fold in fold_F:
            made = jax.random.fold_in(made, fold)
        return made

    return jax.vmap(key)(jnp.asarray(folds_NF))
