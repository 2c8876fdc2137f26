"""Benchmark problems inside training problems: found by their text, their n-grams, their meaning.

- exact: the first 160 letters and digits of a benchmark problem, lower case, stand in the training
  problem. Only where there are more than 30 of them: shorter texts meet by chance.
- ngram: a share of the benchmark problem's word n-grams (13 words as for GPT-3, 2005.14165 app. C)
  stands in the training problem. It finds the same problem in another LaTeX spelling.
- embedding: the cosine of two sentence embeddings. Needs a model; finds rewordings, and also
  problems that merely resemble each other.

The benchmarks are held in memory, training problems pass through in blocks.
"""

import collections
import dataclasses
import importlib
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.data.columns import PROBLEM, Columns, read_problem
from opd_jax.data.files import RowError, stream
from opd_jax.data.question import UNSEEN
from opd_jax.errors import ConfigError, DataError

CHARACTERS, SHORTEST = (
    160,
    31,
)  # of a normalised text: how many are compared, how many there must be
METHODS = ("exact", "ngram", "embedding")
Encoder = Callable[[Sequence[str]], np.ndarray]  # texts -> embeddings [texts, size]


@dataclasses.dataclass(frozen=True)
class Match:
    """A benchmark problem that was found in a training problem; `score` is 1.0 where exact."""

    problem: int  # its place in Benchmarks.problems
    method: str
    score: float


@dataclasses.dataclass(frozen=True)
class BenchmarkProblem:
    """A problem of a benchmark, and the row of its file.

    `also`: other texts that stand for it, without its context and choices or with earlier turns.
    """

    benchmark: str
    id: str
    number: int
    prompt: str
    also: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of which one has to be found, the prompt first."""
        return (self.prompt, *self.also)


class Benchmarks:
    """The problems of all benchmarks, indexed so that training problems can be looked up.

    `ngram` words make an n-gram (0 = the method is off) and `ngram_share` of them must be found.
    `encoder` (None = the method is off) embeds texts; a cosine of `embedding_cosine` is a match.
    """

    def __init__(
        self,
        problems: Sequence[BenchmarkProblem],
        *,
        ngram: int = 13,
        ngram_share: float = 0.5,
        encoder: Encoder | None = None,
        embedding_cosine: float = 0.6,
    ):
        self.problems = list(problems)
        self._ngram, self._share = ngram, ngram_share
        self._encoder, self._cosine = encoder, embedding_cosine
        # The first SHORTEST characters lead to the few texts that start with them.
        self._starts: dict[str, list[tuple[int, str]]] = collections.defaultdict(list)
        self._owners: dict[int, list[int]] = collections.defaultdict(list)
        texts = [(place, t) for place, p in enumerate(self.problems) for t in p.texts]
        self._places = [place for place, _ in texts]  # the problem that a text stands for
        self._ngrams = np.zeros(len(texts), int)  # how many different ones a text has
        for i, (place, whole) in enumerate(texts):
            text = normalised(whole)[:CHARACTERS]
            if len(text) >= SHORTEST:
                self._starts[text[:SHORTEST]].append((place, text))
            ngrams = _ngrams(whole, ngram)
            self._ngrams[i] = len(ngrams)
            for item in ngrams:
                self._owners[item].append(i)
        self._embedded = _unit(encoder([t for _, t in texts])) if encoder else None

    @property
    def methods(self) -> tuple[str, ...]:
        """Those of METHODS that are on."""
        on = (True, self._ngram > 0, self._encoder is not None)
        return tuple(method for method, is_on in zip(METHODS, on, strict=True) if is_on)

    def unchecked(self, benchmark: str) -> dict[str, int]:
        """How many problems of a benchmark are too short for a method."""
        mine = [p for p in self.problems if p.benchmark == benchmark]
        longest = [max(len(normalised(text)) for text in p.texts) for p in mine]
        counts = {"exact": sum(length < SHORTEST for length in longest)}
        if self._ngram:
            counts["ngram"] = sum(not any(_ngrams(t, self._ngram) for t in p.texts) for p in mine)
        return counts

    def find(self, prompts: Sequence[str]) -> list[list[Match]]:
        """For each training prompt the benchmark problems that it holds, by every method."""
        found = [[*self._exact(prompt), *self._by_ngram(prompt)] for prompt in prompts]
        if self._embedded is not None and self._encoder is not None and prompts:
            cosines = _unit(self._encoder(prompts)) @ self._embedded.T
            for row, of_row in enumerate(cosines):
                found[row] += self._best("embedding", dict(enumerate(of_row)), self._cosine)
        return found

    def _exact(self, prompt: str) -> list[Match]:
        text = normalised(prompt)
        places = range(len(text) - SHORTEST + 1)
        if self._starts.keys().isdisjoint([text[i : i + SHORTEST] for i in places]):
            return []
        hits = {
            place
            for i in places
            for place, whole in self._starts.get(text[i : i + SHORTEST], ())
            if text.startswith(whole, i)
        }
        return [Match(place, "exact", 1.0) for place in sorted(hits)]

    def _by_ngram(self, prompt: str) -> list[Match]:
        counts: collections.Counter[int] = collections.Counter()
        for item in _ngrams(prompt, self._ngram):
            counts.update(self._owners.get(item, ()))
        shares = {i: count / self._ngrams[i] for i, count in counts.items()}
        return self._best("ngram", shares, self._share)

    def _best(self, method: str, scores: Mapping[int, float], least: float) -> list[Match]:
        """The problems of which some text scores at least so much; `scores` by text."""
        best: dict[int, float] = {}
        for i, score in scores.items():
            if score >= least:
                place = self._places[i]
                best[place] = max(score, best.get(place, score))
        return [Match(place, method, round(float(best[place]), 4)) for place in sorted(best)]


def read_benchmarks(files: Mapping[str, str], columns: Any = Columns()) -> list[BenchmarkProblem]:  # noqa: B008
    """Problems of the benchmark files, by benchmark name; raises DataError where one has none.

    A row without a problem raises too: nothing may be held to be clean because it was not read.
    Pictures and the like do not: only texts are compared.
    """
    problems = []
    for name, path in files.items():
        for number, row in stream(path):
            if isinstance(row, RowError):
                raise row
            if not columns.problem:
                row = {column: value for column, value in row.items() if column not in UNSEEN}
            problem, taken = read_problem(
                row, path=path, number=number, columns=columns, field="decontaminate.columns"
            )
            # Training data may hold the question without what stands beside it.
            own = next((c for c in PROBLEM if c in taken.problem.split(" + ")), "")
            alone = Columns(problem=columns.problem or own)
            bare, _ = read_problem(row, path=path, number=number, columns=alone)
            also = dict.fromkeys((bare.prompt, problem.question))
            also.pop(problem.prompt, None)
            problems.append(BenchmarkProblem(name, problem.id, number, problem.prompt, tuple(also)))
    return problems


def load_encoder(path: str) -> Encoder:
    """Sentence embeddings by a local model folder, through the optional sentence-transformers.

    Raises ConfigError where the package is not installed, DataError where the folder is no model.
    """
    if not pathlib.Path(path).is_dir():
        raise DataError(
            f"decontaminate.embedding_model={path!r} is not a folder, wanted one that "
            "sentence-transformers saved; correct --config.decontaminate.embedding_model"
        )
    try:  # not a dependency: it brings torch
        package = importlib.import_module("sentence_transformers")
    except ImportError:
        raise ConfigError(
            f"decontaminate.embedding_model={path!r} needs the package sentence-transformers, which "
            "is not installed; pip install sentence-transformers"
        ) from None
    try:
        model = package.SentenceTransformer(path)
    except Exception as error:  # whatever torch and transformers raise about the folder
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"decontaminate.embedding_model={path!r} cannot be loaded ({reason}); copy it again"
        ) from None
    return lambda texts: np.asarray(model.encode(list(texts), show_progress_bar=False))


def normalised(text: str) -> str:
    """Letters and digits of a text, lower case."""
    return re.sub(r"[\W_]+", "", text.lower())


def _ngrams(text: str, n: int) -> set[int]:
    """Hashes of the different runs of n words; a word is letters and digits, lower case."""
    words = re.findall(r"[^\W_]+", text.lower()) if n else []
    # Python's hash of strings differs between processes; it never leaves this one.
    return {hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)} if n else set()


def _unit(embeddings: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.maximum(length, 1e-12)
