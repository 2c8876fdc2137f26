"""The config tree of prepare_data: every field with its default and meaning, and its rules."""

import math
from typing import Any

from ml_collections import ConfigDict

from opd_jax.config.schema import flatten, near
from opd_jax.data.dataset import BAD_ROWS
from opd_jax.errors import ConfigError

BENCHMARKS = ("aime24", "aime25", "amc", "math500", "minerva", "olympiad", "gsm8k")


def default() -> ConfigDict:
    """Every field. The text after each is its documentation."""
    config = ConfigDict()
    config.seed = 0  # of the split into SFT and OPD

    data = config.data = ConfigDict()
    data.train = ""  # files, comma-separated or with * in their names
    data.columns = _columns()
    data.bad_rows = (
        "skip"  # a row that cannot be read: skip = counted and dropped; refuse = an error
    )

    keep = config.filter = ConfigDict()
    keep.solution = True  # drop rows without a solution
    keep.answer = True  # drop rows without an answer
    keep.grade = False  # math-verify solutions that no column correctness_math_verify vouches for
    keep.tokenizer = ""  # model folder; empty = length is not checked
    keep.max_tokens = 8192  # longest solution
    keep.duplicates = False  # True: problems that occur twice stay

    clean = config.decontaminate = ConfigDict()
    clean.benchmarks = ConfigDict({name: "" for name in BENCHMARKS})  # files; empty = left out
    clean.columns = _columns()  # of the benchmark files
    clean.ngram = 13  # words; 0 = off (GPT-3 used 13, 2005.14165 app. C)
    clean.ngram_share = (
        0.5  # of a benchmark problem's n-grams (Tulu 3 drops from 50 % on, 2411.15124)
    )
    clean.embedding_model = ""  # folder for sentence-transformers; empty = off
    clean.embedding_cosine = 0.6

    split = config.split = ConfigDict()
    split.sft = 0  # rows for supervised fine-tuning; 0 = all that OPD does not take
    split.opd = 0  # rows for OPD; 0 = all that SFT does not take
    split.opd_share = 13 / 46  # for OPD where both are 0 (2604.08527: 13k of 46k)

    config.block = 5000  # rows that are worked on, and saved, at one time
    return config.lock()


def validate(config: ConfigDict) -> None:
    """Refuse unknown fields and impossible values, before a file is opened.

    Raises ConfigError with one line: the field, what it is, what is wanted, the option that fixes it.
    """
    got, known = flatten(config.to_dict()), flatten(default().to_dict())
    for field, value in got.items():
        benchmark = field.startswith("decontaminate.benchmarks.")  # names there are the user's
        if field not in known and not benchmark:
            raise ConfigError(f"config.{field} is not a field; {near(field, list(known))}")
        example = "" if benchmark else known[field]
        if not _is_kind(value, example):
            raise _wrong(field, repr(value), f"a value of type {type(example).__name__}")
    for field in known:
        if field not in got and not field.startswith("decontaminate.benchmarks."):
            raise ConfigError(
                f"config.{field} is missing; start from opd_jax.data.prepare_config.default()"
            )
    if not config.data.train:
        raise _wrong("data.train", "''", "the file to prepare", "--config.data.train=FILE.jsonl")
    if config.data.bad_rows not in BAD_ROWS:
        raise _wrong("data.bad_rows", repr(config.data.bad_rows), f"one of {', '.join(BAD_ROWS)}")
    for field, low, high in (
        ("seed", 0, 2**63), ("filter.max_tokens", 1, math.inf), ("block", 1, math.inf),
        ("decontaminate.ngram", 0, math.inf), ("split.sft", 0, math.inf), ("split.opd", 0, math.inf),
        ("decontaminate.embedding_cosine", -1, 1), ("split.opd_share", 0, 1),
    ):  # fmt: skip
        if not low <= got[field] <= high:
            wanted = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise _wrong(field, got[field], f"a number, {wanted}")
    if not 0 < got["decontaminate.ngram_share"] <= 1:
        raise _wrong(
            "decontaminate.ngram_share", got["decontaminate.ngram_share"], "above 0, at most 1"
        )
    if config.filter.grade and not (config.filter.answer and config.filter.solution):
        raise ConfigError(
            "filter.grade=True needs solutions and answers to compare; "
            "set --config.filter.answer=True --config.filter.solution=True"
        )


def _columns() -> ConfigDict:
    # Dotted paths into a row; empty = found by the names people use (docs/data.md).
    return ConfigDict({"problem": "", "solution": "", "answer": "", "id": ""})


def _is_kind(value: Any, example: Any) -> bool:
    if isinstance(example, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(example)


def _wrong(field: str, got: Any, wanted: str, fix: str = "") -> ConfigError:
    return ConfigError(f"{field}={got}, wanted {wanted}; set {fix or f'--config.{field}=...'}")
