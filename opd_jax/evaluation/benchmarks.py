"""The benchmarks of the papers in one table, and their problems from the files that a user has.

`amc` is AI-MO/aimo-validation-amc, 83 problems of AMC12 2022 and 2023 (LUFFY, 2604.08527), not the 40
of Qwen2.5-Math. Avg@32 or pass@1 after 2604.08527, 5.1: "For AIME 2024, AIME 2025, and AMC, whose test
sets are small, we report avg@32. For Minerva, OlympiadBench, and MATH500, we report pass@1."
"""

import dataclasses
import pathlib
import re
from typing import Any

from opd_jax import data
from opd_jax.data.columns import Columns, reach
from opd_jax.data.files import RowError, stream
from opd_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
      name: as the command line has it. title: as the papers' tables have it.
      size: problems; 0 = any number.
      samples: answers a problem. With several the metric is avg@samples, with one pass@1.
      protocol: the prompt preset it is usually met with (protocol.PROTOCOLS).
      rule: how answers are compared (answer.RULES).
      source: where the file comes from.
      columns: of that file.
      label: what a file of several benchmarks calls it in its column data_source (LUFFY's).
    """

    name: str
    title: str
    size: int = 0
    samples: int = 1
    protocol: str = "boxed"
    rule: str = "plain"
    source: str = "a file of the user's"
    columns: Columns = Columns()  # noqa: RUF009 (frozen)
    label: str = ""

    @property
    def metric(self) -> str:
        """`avg@32` or `pass@1`."""
        return f"avg@{self.samples}" if self.samples > 1 else "pass@1"


_QWEN = "QwenLM/Qwen2.5-Math, evaluation/data"
BENCHMARKS = {
    entry.name: entry
    for entry in (
        Benchmark("math500", "MATH-500", 500, label="math",
                  source="HuggingFaceH4/MATH-500; hkust-nlp/simpleRL-reason, math500/test.jsonl",
                  columns=Columns("problem", "solution", "answer", "unique_id")),
        Benchmark("minerva", "Minerva", 272, rule="units", label="minerva",
                  source=f"{_QWEN}/minerva_math/test.jsonl",
                  columns=Columns("problem", "solution", "", "idx")),
        Benchmark("olympiad", "Olympiad", 675, rule="several", label="olympiad_bench",
                  source=f"{_QWEN}/olympiadbench/test.jsonl (OE_TO_maths_en_COMP)",
                  columns=Columns("question", "solution", "final_answer", "id")),
        Benchmark("amc", "AMC", 83, samples=32, label="amc",
                  source="AI-MO/aimo-validation-amc; PRIME-RL/PRIME, eval/data/AI-MO",
                  columns=Columns("question", "", "answer", "id")),
        Benchmark("aime24", "AIME24", 30, samples=32, label="aime", source="thunlp/OPD, AIME24/test.json",
                  columns=Columns("prompt", "", "answer", "id")),
        Benchmark("aime25", "AIME25", 30, samples=32, label="aime25", source="thunlp/OPD, AIME25/test.json",
                  columns=Columns("prompt", "", "answer", "")),
        Benchmark("gsm8k", "GSM8K", 1319, source="openai/grade-school-math, test.jsonl",
                  columns=Columns("question", "", "answer", "")),
        Benchmark("tiny", "tiny", 200, source="made by rule: opd_jax/data/arithmetic.py", protocol="plain"),
    )
}  # fmt: skip
# Columns of 2604.08527, Table 1.
PAPER = ("math500", "minerva", "olympiad", "amc", "aime24", "aime25")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Problems of a benchmark, what they were taken from, and how many rows were left out for what."""

    benchmark: Benchmark
    file: str
    problems: list[data.Problem]
    skipped: dict[str, int]
    columns: str = ""


def parse(text: str) -> list[tuple[Benchmark, str]]:
    """(benchmark, file) of each part of `NAME=FILE,NAME=FILE,tiny`; a FILE alone is named after itself.

    A NAME that is not in the table stands for any file of problems and answers.
    Raises ConfigError: nothing named, a benchmark without a file, two of one name.
    """
    found: list[tuple[Benchmark, str]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, file = part.partition("=")
        if not equals and name not in BENCHMARKS:
            name, file = re.sub(r"[^\w.-]", "_", pathlib.PurePath(part).name.split(".")[0]), part
        if name == "tiny":
            file = file or "tiny:test"
        known = BENCHMARKS.get(name) or Benchmark(name, name)
        if not file:
            raise ConfigError(
                f"eval.benchmarks names {name!r} without a file, wanted {name}=FILE ({known.source}); "
                f"set --config.eval.benchmarks={name}=FILE"
            )
        if not re.fullmatch(r"[\w.-]+", name) or name in (".", ".."):
            raise ConfigError(
                f"eval.benchmarks names {name!r}, wanted a name of letters, digits, '_', '-' and '.', "
                "for files are called after it; correct it"
            )
        if name in (one.name for one, _ in found):
            raise ConfigError(
                f"eval.benchmarks names {name!r} twice; give one of them another name"
            )
        found.append((known, file))
    if not found:
        raise ConfigError(
            "eval.benchmarks='' names nothing, wanted NAME=FILE,NAME=FILE,...; known names: "
            f"{', '.join(BENCHMARKS)}; set --config.eval.benchmarks=tiny"
        )
    return found


def load(
    benchmark: Benchmark,
    file: str,
    *,
    columns: Any = Columns(),  # noqa: B008 (frozen)
    bad_rows: str = "refuse",
    any_size: bool = False,
) -> Loaded:
    """The problems of a benchmark, each with an answer.

    Where the benchmark has a `label`, a file of several (LUFFY's valid.all.parquet: a column
    data_source with more than one value) gives the problems of that label, each once. `columns` that
    are named come before the table's. Raises DataError: see data.open_problems, and for a file of
    another size than the table's, unless `any_size`.
    """
    labels = _labels(file) if benchmark.label else []
    mixed = len(set(labels) - {""}) > 1
    fields = ("problem", "solution", "answer", "id")
    made = file.startswith("tiny:")
    known = Columns() if mixed or made else _present(benchmark.columns, file)
    chosen = Columns(*(getattr(columns, f) or getattr(known, f) for f in fields))
    opened = data.open_problems(
        file, field="eval.benchmarks", columns=chosen, size=benchmark.size or data.TEST_SIZE,
        need_answer=True, bad_rows=bad_rows,
    )  # fmt: skip
    skipped = dict(opened.skipped)
    if mixed:
        if benchmark.label not in labels:
            raise DataError(
                f"{file} holds several benchmarks ({', '.join(sorted(set(labels)))}), none of them "
                f"called {benchmark.label!r}; name a file of {benchmark.name} alone"
            )
        if skipped:
            raise DataError(f"{file}: rows of several benchmarks cannot be left out; correct them")
        once = {
            opened[i].question: i
            for i in reversed(range(len(opened)))
            if labels[i] == benchmark.label
        }
        problems = [opened[i] for i in sorted(once.values())]
    else:
        problems = opened[:]
    got = len(problems) + sum(skipped.values())
    if benchmark.size and got != benchmark.size and not any_size:
        raise DataError(
            f"{file}: got {got} problems, wanted the {benchmark.size} of {benchmark.title} "
            f"({benchmark.source}); name the right file, or take it as it is: "
            "--config.eval.any_size=true"
        )
    return Loaded(benchmark, file, problems, skipped, opened.columns)


def _labels(file: str) -> list[str]:
    """The data_source of each row of a file, "" where it has none."""
    labels = []
    for _, row in stream(file):
        source = None if isinstance(row, RowError) else row.get("data_source")
        labels.append(source if isinstance(source, str) else "")
    return labels


def _present(columns: Columns, file: str) -> Columns:
    """The table's columns that the file's first row has; the others are found by their usual names."""
    row = next((row for _, row in stream(file) if not isinstance(row, RowError)), {})
    absent = (None, reach({}, "absent"))
    return Columns(**{
        part: column if column and reach(row, column) not in absent else ""
        for part, column in dataclasses.asdict(columns).items()
    })  # fmt: skip
