"""Append-only JSON Lines files that survive a kill: metrics and rollouts of a run, answers, samples.

A file that is opened again is continued after its last complete line; a partial line is removed.
"""

import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, Self

from opd_jax.errors import WorkdirError


class JsonlFile:
    """A JSONL file, open for appending; a context manager."""

    def __init__(self, path: pathlib.Path, *, elsewhere: str = ""):
        """Open or create the file. Raises OSError where it cannot be written.

        `elsewhere`: the command-line option that sets another path. With it the file is also locked;
        raises WorkdirError where another process has the lock.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b")
        if elsewhere:
            self._lock(elsewhere)

    def lines(self) -> Iterator[tuple[int, Any]]:
        """Yield (end, value) for every complete line: its end offset in bytes, None where it is not JSON."""
        self._file.seek(0)
        end = 0
        for line in self._file:  # bytes: only a line feed ends a line
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                yield end, json.loads(line)
            except (ValueError, RecursionError):
                yield end, None

    def cut(self, end: int) -> None:
        """Truncate the file to `end` bytes."""
        self._file.truncate(end)

    def write(self, row: dict[str, Any]) -> None:
        """Append one object and flush it, so that a kill of the process does not lose it."""
        self._file.write(encoded(row))
        self._file.flush()

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append objects and wait until they are on the disk."""
        self._file.writelines(map(encoded, rows))
        self.sync()

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self, elsewhere: str) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise WorkdirError(
                f"{self.path} is being written by another process; wait for it, or give a new {elsewhere}"
            ) from None
        except OSError:  # the file system has no locks
            pass


class Lines(JsonlFile):
    """A JSONL file of a training run. Each line has its `step`; lines of later steps can be removed."""

    def __init__(self, path: pathlib.Path, *, resume_step: int):
        """Open for appending; remove the first line of a step after `resume_step` and all lines after it."""
        super().__init__(path)
        self.cut(self._end(resume_step))

    def amend(self, row: dict[str, Any]) -> None:
        """Merge keys into the last line if it has the same step, else append a line."""
        begin = end = 0
        last: dict[str, Any] = {"step": None}
        for line_end, value in self.lines():
            begin, end, last = end, line_end, value
        if last["step"] == row["step"]:
            self.cut(begin)
            row = last | row
        self.write(row)

    def go_back(self, step: int) -> None:
        """Move the lines of steps after `step` to `NAME.rolled_back.jsonl` in the same folder."""
        end = self._end(step)
        self._file.seek(end)
        with self.path.with_suffix(".rolled_back.jsonl").open("ab") as undone:
            shutil.copyfileobj(self._file, undone)
        self.cut(end)

    def _end(self, step: int) -> int:
        """Return the offset in bytes at which the lines of steps up to `step` end."""
        end = 0
        for line_end, value in self.lines():
            if not _is_up_to(value, step):
                break
            end = line_end
        return end


class NoLines:
    """Replacement of `Lines` in a process that writes nothing."""

    def _nothing(self, *_: Any) -> None:
        """Do nothing."""

    write = amend = go_back = sync = close = _nothing


def encoded(value: Any) -> bytes:
    """Encode one line of a JSONL file. A lone surrogate, which UTF-8 lacks, becomes a question mark."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode(errors="replace")


def _is_up_to(value: Any, step: int) -> bool:
    """Return whether a line is an object with a `step` of at most `step`."""
    try:
        return value["step"] <= step
    except (KeyError, TypeError):
        return False
