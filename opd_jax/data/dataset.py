"""Problems by name: `tiny:SPLIT`, or a file whose rows are checked when it is opened."""

import collections
import operator
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.data import arithmetic
from opd_jax.data.columns import Columns, Counts, count, describe, read_problem
from opd_jax.data.files import EXTENSIONS, RowError, open_rows, stream
from opd_jax.data.problem import Problem
from opd_jax.errors import ConfigError, DataError

BAD_ROWS = ("refuse", "skip")


class Problems(Sequence[Problem]):
    """Problems by index, read on access. Created by `open_problems`.

    `name` is the name in the config, `skipped` counts the skipped rows by reason, `columns` describes
    their columns; `generated` problems come from `tiny` and all have the same form.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[int], Problem],
        kept: np.ndarray,
        *,
        skipped: dict[str, int],
        columns: str,
    ):
        self.name = name
        self.generated = name.startswith("tiny:")
        self.skipped = skipped
        self.columns = columns
        self._read = read
        self._kept = kept  # index of a problem -> index of its row
        if not len(kept):
            raise DataError(
                f"{name} has no problem that can be used: {_counts(skipped)}; name another file, or set "
                "--config.data.bad_rows=refuse to see the error of the first row"
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._read(int(i)) for i in self._kept[index]]
        return self._read(int(self._kept[operator.index(index)]))

    def without(self, bad: Mapping[str, Collection[int]]) -> "Problems":
        """Return the problems without those at the given indices, counted by their reasons.

        Raises DataError where none is left.
        """
        dropped = np.zeros(len(self), bool)
        skipped = collections.Counter(self.skipped)
        for reason, indices in bad.items():
            dropped[list(indices)] = True
            skipped[reason] += len(indices)
        return Problems(
            self.name,
            self._read,
            self._kept[~dropped],
            skipped=dict(skipped),
            columns=self.columns,
        )

    def describe(self) -> str:
        """Return one line: number of problems, columns read and not read, earlier turns, skipped rows."""
        rows = len(self) + sum(self.skipped.values())
        text = f"{self.name}: {len(self)} problems of {rows} rows"
        if self.columns:
            text += f"; {self.columns}"
        if self.skipped:
            text += f"; left out: {_counts(self.skipped)}"
        return text


def open_problems(
    name: str,
    *,
    field: str,
    columns: Any = Columns(),  # noqa: B008 (frozen)
    size: int = 0,
    need_solution: bool = False,
    need_answer: bool = False,
    bad_rows: str = "refuse",
    shown: Sequence[str] = (),
) -> Problems:
    """Open the problems named `name`, the value of the config field `field`.

    `tiny:SPLIT` is the generated data set, with `size` problems; any other name is a file (.jsonl,
    .json, .parquet), all of whose rows are read once, here. A row that cannot be used, or that lacks
    a part that is needed, raises DataError (`bad_rows` "refuse") or is skipped and counted ("skip").
    `columns` names columns (`data.columns`), and `shown` those that prompt templates show beside the parts
    of a problem. Raises ConfigError for a name that is neither.
    """
    if not _is_file(name):
        split = split_of(name, field=field)
        if shown:
            raise ConfigError(
                f"{field}={name}: the prompt template shows {{{shown[0]}}}, but generated problems have only "
                "{problem}, {answer} and {solution}; "
                f"correct the template, or name a file with this column: --config.{field}=FILE"
            )
        return Problems(
            name,
            lambda index: arithmetic.problem(split, index),
            np.arange(size),
            skipped={},
            columns="",
        )
    if bad_rows not in BAD_ROWS:
        raise ConfigError(
            f"bad_rows={bad_rows!r}, wanted one of {', '.join(BAD_ROWS)}; "
            "set --config.data.bad_rows=refuse"
        )
    needs = {"columns": columns, "need_solution": need_solution, "need_answer": need_answer,
             "shown": shown}  # fmt: skip
    rows = open_rows(name)
    kept = np.zeros(len(rows), bool)
    skipped: collections.Counter[str] = collections.Counter()
    counts: Counts = {}
    for index, (number, row) in enumerate(stream(name)):
        try:
            if isinstance(row, RowError):
                raise row
            problem, parts_from = read_problem(row, path=name, number=number, **needs)
        except RowError as error:
            if bad_rows == "refuse":
                raise DataError(
                    f"{error}; or leave such rows out: --config.data.bad_rows=skip"
                ) from None
            skipped[error.reason] += 1
            continue
        kept[index] = True
        count(counts, row, problem, parts_from)

    def read(index: int) -> Problem:
        return read_problem(rows[index], path=name, number=rows.number(index), **needs)[0]

    return Problems(
        name,
        read,
        np.flatnonzero(kept),
        skipped=dict(skipped),
        columns=describe(counts),
    )


def split_of(name: str, *, field: str) -> str:
    """Return the split of the embedded data set that `tiny:SPLIT` names. Raises ConfigError otherwise."""
    kind, _, split = name.partition(":")
    if kind != "tiny" or split not in arithmetic.SPLITS:
        known = ", ".join(f"tiny:{s}" for s in arithmetic.SPLITS)
        raise ConfigError(
            f"{field}={name!r}, wanted one of {known}, or a file ({', '.join(EXTENSIONS)}); "
            f"set --config.{field}=tiny:train"
        )
    return split


def _is_file(name: str) -> bool:
    """Return whether a name is meant as a path; `files` checks whether it can be read."""
    path = pathlib.Path(name)
    if not name or name.startswith("tiny:"):
        return False
    return bool(path.suffix or "/" in name or path.exists())


def _counts(skipped: dict[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in sorted(skipped.items())) or "it is empty"
