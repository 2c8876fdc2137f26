"""The table of the papers' benchmarks, and loading of their problems from the user's files.

`amc` is AI-MO/aimo-validation-amc, 83 problems of AMC12 2022 and 2023 (LUFFY, 2604.08527), not the 40
of Qwen2.5-Math. The metrics follow 2604.08527, 5.1: "For AIME 2024, AIME 2025, and AMC, whose test
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
      name: name on the command line. title: name in the papers' tables.
      size: number of problems; 0 = any number.
      samples: samples per problem. The metric is pass@1 for one sample, avg@samples for several.
      protocol: preset that is usually applied to it (protocols.PROTOCOLS).
      rule: comparison of answers (extract.RULES).
      source: origin of the file.
      columns: columns of that file.
      label: its value in the column data_source of a file with several benchmarks (LUFFY's).
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
        """Name of the metric: `avg@32` or `pass@1`."""
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
    """Problems of a benchmark, their file and columns, and the number of rows skipped for each reason."""

    benchmark: Benchmark
    file: str
    problems: list[data.Problem]
    skipped: dict[str, int]
    columns: str = ""


def parse(text: str) -> list[tuple[Benchmark, str]]:
    """Parse `NAME=FILE,NAME=FILE,tiny` to (benchmark, file) pairs; a FILE alone is its own name.

    A NAME that is not in the table may be used for any file of problems and answers.
    Raises ConfigError if there is no benchmark, if one has no file or an invalid name, or if two have
    the same name.
    """
    pairs: list[tuple[Benchmark, str]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, file = part.partition("=")
        if not equals and name not in BENCHMARKS:
            name, file = re.sub(r"[^\w.-]", "_", pathlib.PurePath(part).name.split(".")[0]), part
        if name == "tiny":
            file = file or "tiny:test"
        known = BENCHMARKS.get(name) or Benchmark(name, name)
        if not file:
            raise ConfigError(
                f"eval.benchmarks names {name!r} without a file ({known.source}); set "
                f"--config.eval.benchmarks={name}=FILE"
            )
        if not re.fullmatch(r"[\w.-]+", name) or name in (".", ".."):
            raise ConfigError(
                f"eval.benchmarks names {name!r}, but a name may have only letters, digits, '_', '-' and "
                "'.', because files are named after it; correct it"
            )
        if name in (benchmark.name for benchmark, _ in pairs):
            raise ConfigError(
                f"eval.benchmarks names {name!r} twice; give one of them another name"
            )
        pairs.append((known, file))
    if not pairs:
        raise ConfigError(
            "eval.benchmarks='' names no benchmark; set --config.eval.benchmarks=NAME=FILE,NAME=FILE,... "
            f"or --config.eval.benchmarks=tiny (known names: {', '.join(BENCHMARKS)})"
        )
    return pairs


def load(
    benchmark: Benchmark,
    file: str,
    *,
    columns: Any = Columns(),  # noqa: B008 (frozen)
    bad_rows: str = "refuse",
    any_size: bool = False,
) -> Loaded:
    """Load the problems of a benchmark, each with a gold answer.

    A file may hold several benchmarks (LUFFY's valid.all.parquet: its column data_source has more than
    one value). A benchmark with a `label` then takes the problems of that label, each once. `columns`
    that are not empty override the table's. Raises DataError as data.open_problems does, and if the
    number of problems differs from the table's, unless `any_size`.
    """
    labels = _labels(file) if benchmark.label else []
    mixed = len(set(labels) - {""}) > 1
    fields = ("problem", "solution", "answer", "id")
    generated = file.startswith("tiny:")
    known = Columns() if mixed or generated else _present(benchmark.columns, file)
    chosen = Columns(*(getattr(columns, f) or getattr(known, f) for f in fields))
    opened = data.open_problems(
        file, field="eval.benchmarks", columns=chosen, size=benchmark.size or data.TEST_SIZE,
        need_answer=True, bad_rows=bad_rows,
    )  # fmt: skip
    skipped = dict(opened.skipped)
    if mixed:
        if benchmark.label not in labels:
            raise DataError(
                f"{file} has the benchmarks {', '.join(sorted(set(labels)))}, but not "
                f"{benchmark.label!r}; set a file that contains {benchmark.name}"
            )
        if skipped:
            raise DataError(
                f"{file}: rows cannot be skipped in a file of several benchmarks; correct its "
                f"{sum(skipped.values())} bad rows"
            )
        first = {
            opened[i].question: i
            for i in reversed(range(len(opened)))
            if labels[i] == benchmark.label
        }
        problems = [opened[i] for i in sorted(first.values())]
    else:
        problems = opened[:]
    size = len(problems) + sum(skipped.values())
    if benchmark.size and size != benchmark.size and not any_size:
        raise DataError(
            f"{file} has {size} problems, but {benchmark.title} has {benchmark.size} "
            f"({benchmark.source}); set the right file, or --config.eval.any_size=true to use this one"
        )
    return Loaded(benchmark, file, problems, skipped, opened.columns)


def _labels(file: str) -> list[str]:
    """Return the data_source of each row of a file, "" for rows without one."""
    labels = []
    for _, row in stream(file):
        source = None if isinstance(row, RowError) else row.get("data_source")
        labels.append(source if isinstance(source, str) else "")
    return labels


def _present(columns: Columns, file: str) -> Columns:
    """Keep the columns that the first row of the file has; the others become "" (their usual names)."""
    row = next((row for _, row in stream(file) if not isinstance(row, RowError)), {})
    absent = (None, reach({}, "absent"))
    return Columns(**{
        part: column if column and reach(row, column) not in absent else ""
        for part, column in dataclasses.asdict(columns).items()
    })  # fmt: skip
