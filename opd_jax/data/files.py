"""Rows (dicts) of JSONL, JSON and Parquet files: as a stream in bounded memory, and by index.

An error in one row (`RowError`) can be skipped, an error in the file (`DataError`) cannot. Both texts
name the file, and a row by its line (JSONL) or its number, from 1.
"""

import array
import collections
import decimal
import gzip
import json
import math
import os
import pathlib
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opd_jax.errors import DataError

EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
Row = dict[str, Any]
_BATCH = 256  # Parquet rows that are Python objects at one time
_CACHE_BYTES = 2**30  # of decoded Parquet row groups, as Arrow arrays
# pyarrow's errors about broken files: its own, and Python's for names that are not UTF-8.
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)


class RowError(DataError):
    """One row cannot be used; `reason` is the short form under which skipped rows are counted."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def stream(path: str) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (line or row number, row) of every row in order; a broken row comes as its RowError.

    Memory holds one line of JSONL or some hundred rows of Parquet; a JSON list is parsed at once.
    Blank lines are ignored. Raises DataError where the file itself cannot be read.
    """
    kind = extension(path)
    count = 0
    for count, item in enumerate(_STREAMS[kind](path), start=1):  # noqa: B007
        yield item
    if not count:
        raise DataError(f"{path} holds no rows; name a file with at least one")


def open_rows(path: str) -> "Rows":
    """Return the rows of a file by index, in the order of `stream`. Raises DataError as `stream` does."""
    kind = extension(path)
    if kind == ".jsonl.gz":
        raise DataError(
            f"{path} is compressed and cannot be read in any order; unpack it: gunzip {path}"
        )
    kinds: dict[str, Callable[[str], Rows]] = {
        ".jsonl": _JsonlRows, ".json": _JsonRows, ".parquet": _ParquetRows,
    }  # fmt: skip
    rows = kinds[kind](path)
    if not len(rows):
        raise DataError(f"{path} holds no rows; name a file with at least one")
    return rows


def extension(path: str) -> str:
    """Return which of EXTENSIONS a readable file's name ends in. Raises DataError otherwise."""
    known = [e for e in EXTENSIONS if path.lower().endswith(e)]
    if not known:
        raise DataError(
            f"{path}: the name ends in {pathlib.Path(path).suffix or 'no extension'!r}, wanted one "
            f"of {', '.join(EXTENSIONS)}; convert the file or rename it"
        )
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist; correct the path")
    if not os.path.isfile(path):
        raise DataError(f"{path} is not a file; name a file in it")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read; allow it: chmod +r {path}")
    return known[0]


def place(path: str, number: int) -> str:
    """Return the name of a row in errors: `FILE, line 17`, or `FILE, row 17` where rows are not lines."""
    return f"{path}, {'line' if '.jsonl' in path.lower() else 'row'} {number}"


class Rows(Sequence[Row]):
    """Rows by index; `rows[i]` raises RowError where row i is broken. Threads may share it."""

    def __init__(self, path: str):
        self.path = path
        self._stamp = _stamp(path)

    def number(self, index: int) -> int:
        """Return the line (JSONL) or row number of an index, from 1."""
        return index + 1

    def _check(self) -> None:
        if _stamp(self.path) != self._stamp:  # the index of lines is no longer valid
            raise DataError(f"{self.path} has changed since it was opened; start again")


class _JsonlRows(Rows):
    """An index of where lines start and end; a row is read and parsed on access."""

    def __init__(self, path: str):
        super().__init__(path)
        starts, sizes, lines = (array.array("q") for _ in range(3))
        offset = 0
        with open(path, "rb") as file:
            for line, data in enumerate(file, start=1):
                if data.strip():
                    starts.append(offset)
                    sizes.append(len(data))
                    lines.append(line)
                offset += len(data)
        self._starts, self._sizes, self._lines = (
            np.frombuffer(x, np.int64) for x in (starts, sizes, lines)
        )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        start, size = int(self._starts[index]), int(self._sizes[index])
        self._check()
        with open(
            self.path, "rb"
        ) as file:  # a new handle, because threads must not share a position
            file.seek(start)
            data = file.read(size)
        return _raised(_parsed(self.path, self.number(index), data))

    def number(self, index: int) -> int:
        return int(self._lines[index])


class _JsonRows(Rows):
    """A JSON list, parsed at once."""

    def __init__(self, path: str):
        super().__init__(path)
        self._items = _json_list(path)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return _raised(_object(self.path, self.number(index), self._items[index]))


class _ParquetRows(Rows):
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
        return _raised(
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


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0)
    return status.st_size, status.st_mtime_ns


def _raised(row: Row | RowError) -> Row:
    if isinstance(row, RowError):
        raise row
    return row


def _stream_jsonl(path: str) -> Iterator[tuple[int, Row | RowError]]:
    opened: IO[bytes] = gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb")  # type: ignore[assignment] # noqa: SIM115
    with opened as file:
        try:
            for line, data in enumerate(file, start=1):
                if data.strip():
                    yield line, _parsed(path, line, data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} is broken ({_reason(error)}); copy it again") from None


def _stream_json(path: str) -> Iterator[tuple[int, Row | RowError]]:
    for number, item in enumerate(_json_list(path), start=1):
        yield number, _object(path, number, item)


def _stream_parquet(path: str) -> Iterator[tuple[int, Row | RowError]]:
    with _parquet(path) as file:
        first = 0
        try:
            for batch in file.iter_batches(_BATCH, use_threads=False):
                yield from _arrow_rows(path, batch, first)
                first += batch.num_rows
        except _ARROW_ERRORS as error:
            raise _broken_parquet(path, error) from None


_STREAMS = {
    ".jsonl": _stream_jsonl,
    ".jsonl.gz": _stream_jsonl,
    ".json": _stream_json,
    ".parquet": _stream_parquet,
}


def _number(text: str) -> decimal.Decimal | float:
    """Parse a JSON number with every digit; 0 or infinity where its exponent is out of a float's range."""
    value = float(text)
    return decimal.Decimal(text) if value and math.isfinite(value) else value


def _parsed(path: str, line: int, data: bytes) -> Row | RowError:
    """Parse the object of one line of JSONL."""
    where = place(path, line)
    try:
        # A file may begin with a byte order mark, which json refuses.
        text = data.decode("utf-8-sig" if line == 1 else "utf-8")
        item = json.loads(text, parse_float=_number)
    except UnicodeDecodeError as error:
        return RowError(
            f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8", "not UTF-8"
        )
    except json.JSONDecodeError as error:
        hint = "correct the line"
        if line == 1 and data.lstrip()[:1] == b"[":
            hint = "a JSON list belongs in a file named .json"
        return RowError(
            f"{where}, column {error.colno}: not JSON ({error.msg}); {hint}", "not JSON"
        )
    except RecursionError:
        return RowError(f"{where}: nested too deeply, wanted a plain object", "not JSON")
    except ValueError as error:  # a number with more digits than Python parses
        return RowError(f"{where}: not JSON ({_reason(error)}); correct the line", "not JSON")
    return _object(path, line, item)


def _object(path: str, number: int, item: Any) -> Row | RowError:
    if isinstance(item, dict):
        return item
    return RowError(
        f"{place(path, number)}: got {type(item).__name__}, wanted an object such as "
        '{"problem": ..., "solution": ..., "answer": ...}; correct it',
        "not an object",
    )


def _json_list(path: str) -> list[Any]:
    try:
        text = pathlib.Path(path).read_bytes().decode("utf-8-sig")
        items = json.loads(text, parse_float=_number)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        hint = "correct it"
        if error.msg == "Extra data":
            hint = "a file of one object a line is named .jsonl"
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}); {hint}"
        ) from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply, wanted a list of plain objects") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({_reason(error)}); correct it") from None
    if not isinstance(items, list):
        raise DataError(
            f"{path}: got {type(items).__name__}, wanted a list of objects; a file of one object "
            "a line is named .jsonl"
        )
    return items


def _parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except _ARROW_ERRORS as error:
        raise _broken_parquet(path, error) from None


def _broken_parquet(path: str, error: Exception) -> DataError:
    return DataError(f"{path} is broken or not Parquet ({_reason(error)}); copy it again")


def _arrow_rows(path: str, table: Any, first: int) -> list[tuple[int, Row | RowError]]:
    """Convert an Arrow table or batch to rows; `first` is the index of its first row."""
    try:
        return list(enumerate(table.to_pylist(), start=first + 1))
    except (UnicodeDecodeError, ValueError, OverflowError) as error:  # text, or a date beyond 9999
        if table.num_rows > 1:
            parts = (_arrow_rows(path, table.slice(i, 1), first + i) for i in range(table.num_rows))
            return [row for part in parts for row in part]
        utf8 = isinstance(error, UnicodeDecodeError)
        reason = "not UTF-8" if utf8 else "not readable"
        return [
            (
                first + 1,
                RowError(f"{place(path, first + 1)}: {reason} ({_reason(error)})", reason),
            )
        ]


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
