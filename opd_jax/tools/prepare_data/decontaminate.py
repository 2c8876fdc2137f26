"""Decontamination: find benchmark problems in training problems by text, n-grams or embeddings.

- exact: the training problem contains the first 160 letters and digits of a benchmark problem, in lower
  case. Benchmark problems with 30 or fewer are not checked, because short texts match by chance.
- ngram: the training problem contains a fraction of the benchmark problem's word n-grams (13 words as for
  GPT-3, 2005.14165 app. C). This also finds the problem in another LaTeX notation.
- embedding: the cosine similarity of two sentence embeddings is high. This needs a model. It finds
  paraphrases, and also problems that are merely similar.

The benchmarks are kept in memory; training problems are processed in blocks.
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

CHARACTERS = 160  # number of characters of a normalised text that are compared
SHORTEST = 31  # minimum number of characters of a normalised text
METHODS = ("exact", "ngram", "embedding")
Encoder = Callable[[Sequence[str]], np.ndarray]  # texts -> embeddings [texts, size]


@dataclasses.dataclass(frozen=True)
class Match:
    """A benchmark problem in a training problem; `score` is 1.0 for an exact match."""

    problem: int  # index into Benchmarks.problems
    method: str
    score: float


@dataclasses.dataclass(frozen=True)
class BenchmarkProblem:
    """A problem of a benchmark, with the number of its row in the file.

    `also`: other texts of the problem, without its context and choices or with earlier turns.
    """

    benchmark: str
    id: str
    number: int
    prompt: str
    also: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of the problem, the prompt first; a match of any one is a match of the problem."""
        return (self.prompt, *self.also)


class Benchmarks:
    """An index of all benchmarks' problems, in which training problems are looked up.

    `ngram` is the number of words of an n-gram (0 = the method is off), `ngram_share` the minimum fraction
    of matching n-grams. `encoder` embeds texts (None = the method is off); `embedding_cosine` is the
    minimum cosine similarity.
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
        # First SHORTEST characters -> the texts that start with them.
        self._starts: dict[str, list[tuple[int, str]]] = collections.defaultdict(list)
        self._owners: dict[int, list[int]] = collections.defaultdict(list)
        texts = [(place, t) for place, p in enumerate(self.problems) for t in p.texts]
        self._places = [place for place, _ in texts]  # problem of each text
        self._ngrams = np.zeros(len(texts), int)  # number of distinct n-grams of each text
        for i, (place, original) in enumerate(texts):
            text = normalised(original)[:CHARACTERS]
            if len(text) >= SHORTEST:
                self._starts[text[:SHORTEST]].append((place, text))
            ngrams = _ngrams(original, ngram)
            self._ngrams[i] = len(ngrams)
            for item in ngrams:
                self._owners[item].append(i)
        self._embedded = _unit(encoder([t for _, t in texts])) if encoder else None

    @property
    def methods(self) -> tuple[str, ...]:
        """The METHODS that are enabled."""
        enabled = (True, self._ngram > 0, self._encoder is not None)
        return tuple(method for method, is_on in zip(METHODS, enabled, strict=True) if is_on)

    def unchecked(self, benchmark: str) -> dict[str, int]:
        """Return for each method how many problems of a benchmark are too short for it."""
        problems = [p for p in self.problems if p.benchmark == benchmark]
        longest = [max(len(normalised(text)) for text in p.texts) for p in problems]
        counts = {"exact": sum(length < SHORTEST for length in longest)}
        if self._ngram:
            counts["ngram"] = sum(
                not any(_ngrams(t, self._ngram) for t in p.texts) for p in problems
            )
        return counts

    def find(self, prompts: Sequence[str]) -> list[list[Match]]:
        """Return for each training prompt the benchmark problems in it, by every method."""
        matches = [[*self._exact(prompt), *self._by_ngram(prompt)] for prompt in prompts]
        if self._embedded is not None and self._encoder is not None and prompts:
            cosines = _unit(self._encoder(prompts)) @ self._embedded.T
            for row, cosine in enumerate(cosines):
                matches[row] += self._best("embedding", dict(enumerate(cosine)), self._cosine)
        return matches

    def _exact(self, prompt: str) -> list[Match]:
        text = normalised(prompt)
        places = range(len(text) - SHORTEST + 1)
        if self._starts.keys().isdisjoint([text[i : i + SHORTEST] for i in places]):
            return []
        hits = {
            place
            for i in places
            for place, start in self._starts.get(text[i : i + SHORTEST], ())
            if text.startswith(start, i)
        }
        return [Match(place, "exact", 1.0) for place in sorted(hits)]

    def _by_ngram(self, prompt: str) -> list[Match]:
        counts: collections.Counter[int] = collections.Counter()
        for item in _ngrams(prompt, self._ngram):
            counts.update(self._owners.get(item, ()))
        shares = {i: count / self._ngrams[i] for i, count in counts.items()}
        return self._best("ngram", shares, self._share)

    def _best(self, method: str, scores: Mapping[int, float], least: float) -> list[Match]:
        """Return the problems with a text that scores at least `least`; `scores` are by index of the text."""
        best: dict[int, float] = {}
        for i, score in scores.items():
            if score >= least:
                place = self._places[i]
                best[place] = max(score, best.get(place, score))
        return [Match(place, method, round(float(best[place]), 4)) for place in sorted(best)]


def read_benchmarks(files: Mapping[str, str], columns: Any = Columns()) -> list[BenchmarkProblem]:  # noqa: B008
    """Return the problems of the benchmark files (name -> path). Raises DataError where a file has none.

    A row without a problem raises too, so that no problem counts as clean because it was not read. Rows
    with images or other media are read, because only texts are compared.
    """
    problems = []
    for name, path in files.items():
        for number, row in stream(path):
            if isinstance(row, RowError):
                raise row
            if not columns.problem:
                row = {column: value for column, value in row.items() if column not in UNSEEN}
            problem, sources = read_problem(
                row, path=path, number=number, columns=columns, field="decontaminate.columns"
            )
            # Training data may contain the question without its context and choices.
            column = next((c for c in PROBLEM if c in sources.problem.split(" + ")), "")
            alone = Columns(problem=columns.problem or column)
            bare, _ = read_problem(row, path=path, number=number, columns=alone)
            also = dict.fromkeys((bare.prompt, problem.question))
            also.pop(problem.prompt, None)
            problems.append(BenchmarkProblem(name, problem.id, number, problem.prompt, tuple(also)))
    return problems


def load_encoder(path: str) -> Encoder:
    """Return a function that embeds sentences with a local model folder and sentence-transformers.

    Raises ConfigError where the package is not installed, DataError where the folder is not a model.
    """
    if not pathlib.Path(path).is_dir():
        raise DataError(
            f"decontaminate.embedding_model={path!r} is not a folder; set "
            "--config.decontaminate.embedding_model to one that sentence-transformers saved"
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
    """Return the letters and digits of a text in lower case."""
    return re.sub(r"[\W_]+", "", text.lower())


def _ngrams(text: str, n: int) -> set[int]:
    """Return the hashes of all n-grams of words; a word is letters and digits, in lower case."""
    words = re.findall(r"[^\W_]+", text.lower()) if n else []
    # Python's hash of strings differs between processes; it is used only inside this one.
    return {hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)} if n else set()


def _unit(embeddings: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.maximum(length, 1e-12)
