"""Rows (dicts) of JSONL, JSON and Parquet files: as a stream in bounded memory, and by index.

An error in one row (`RowError`) can be skipped, an error in the file (`DataError`) cannot. Both texts
name the file, and a row by its line (JSONL) or its number, from 1.
"""

import array
import decimal
import gzip
import json
import math
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from opd_jax.errors import DataError

EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
Row = dict[str, Any]


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
        ".jsonl": _JsonlRows, ".json": _JsonRows, ".parquet": _parquet_rows,
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
        return raised(_parsed(self.path, self.number(index), data))

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
        return raised(_object(self.path, self.number(index), self._items[index]))


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0)
    return status.st_size, status.st_mtime_ns


def raised(row: Row | RowError) -> Row:
    """Return the row; raise it where it is an error."""
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
            raise DataError(f"{path} is broken ({reason(error)}); copy it again") from None


def _stream_json(path: str) -> Iterator[tuple[int, Row | RowError]]:
    for number, item in enumerate(_json_list(path), start=1):
        yield number, _object(path, number, item)


def _parquet_rows(path: str) -> Rows:
    from opd_jax.data import parquet  # pyarrow is loaded where a file needs it

    return parquet.ParquetRows(path)


def _stream_parquet(path: str) -> Iterator[tuple[int, Row | RowError]]:
    from opd_jax.data import parquet

    return parquet.stream(path)


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
        return RowError(f"{where}: not JSON ({reason(error)}); correct the line", "not JSON")
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
        raise DataError(f"{path}: not JSON ({reason(error)}); correct it") from None
    if not isinstance(items, list):
        raise DataError(
            f"{path}: got {type(items).__name__}, wanted a list of objects; a file of one object "
            "a line is named .jsonl"
        )
    return items


def reason(error: Exception) -> str:
    """Return the first line of an error, in short."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
