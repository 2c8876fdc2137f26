"""Rows of Parquet files; files.py has the other formats, and imports this module where a file needs it."""

import collections
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opd_jax.data.files import Row, RowError, Rows, place, raised, reason
from opd_jax.errors import DataError

_BATCH = 256  # rows that are Python objects at one time
_CACHE_BYTES = 2**30  # of decoded row groups, as Arrow arrays
# pyarrow's errors about broken files: its own, and Python's for names that are not UTF-8.
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)


class ParquetRows(Rows):
    """Row groups, decoded on access; the latest are cached, up to _CACHE_BYTES."""

    def __init__(self, path: str):
        super().__init__(path)
        with _parquet(path) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._ends = np.cumsum([0, *groups])
        self._cache: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        group = int(np.searchsorted(self._ends, index, side="right")) - 1
        if not 0 <= group < len(self._ends) - 1:
            raise IndexError(index)
        table = self._group(group)
        return raised(
            _arrow_rows(self.path, table.slice(index - int(self._ends[group]), 1), index)[0][1]
        )

    def _group(self, group: int) -> pa.Table:
        with self._lock:
            if group not in self._cache:
                self._check()
                try:
                    with _parquet(self.path) as file:
                        self._cache[group] = file.read_row_group(group)
                except _ARROW_ERRORS as error:
                    raise _broken_parquet(self.path, error) from None
                while len(self._cache) > 1 and (
                    sum(table.nbytes for table in self._cache.values()) > _CACHE_BYTES
                ):
                    self._cache.popitem(last=False)
            self._cache.move_to_end(group)
            return self._cache[group]


def stream(path: str) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (number, row) of every row in order, some hundred rows in memory; see `files.stream`."""
    with _parquet(path) as file:
        first = 0
        try:
            for batch in file.iter_batches(_BATCH, use_threads=False):
                yield from _arrow_rows(path, batch, first)
                first += batch.num_rows
        except _ARROW_ERRORS as error:
            raise _broken_parquet(path, error) from None


def _parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except _ARROW_ERRORS as error:
        raise _broken_parquet(path, error) from None


def _broken_parquet(path: str, error: Exception) -> DataError:
    return DataError(f"{path} is broken or not Parquet ({reason(error)}); copy it again")


def _arrow_rows(path: str, table: Any, first: int) -> list[tuple[int, Row | RowError]]:
    """Convert an Arrow table or batch to rows; `first` is the index of its first row."""
    try:
        return list(enumerate(table.to_pylist(), start=first + 1))
    except (UnicodeDecodeError, ValueError, OverflowError) as error:  # text, or a date beyond 9999
        if table.num_rows > 1:
            parts = (_arrow_rows(path, table.slice(i, 1), first + i) for i in range(table.num_rows))
            return [row for part in parts for row in part]
        utf8 = isinstance(error, UnicodeDecodeError)
        fault = "not UTF-8" if utf8 else "not readable"
        return [
            (
                first + 1,
                RowError(f"{place(path, first + 1)}: {fault} ({reason(error)})", fault),
            )
        ]
