"""JSON Lines files that grow and resume: metrics and rollouts of a run, answers, samples.

A file that is opened again goes on behind its last good line; a line that a kill has torn is cut off.
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
        """Open it, or make it. Raises OSError where it cannot be written.

        With `elsewhere`, the option that names another place, it is locked as well: raises WorkdirError
        where another process is at work on it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b")
        if elsewhere:
            self._lock(elsewhere)

    def lines(self) -> Iterator[tuple[int, Any]]:
        """(end, value) of every complete line: where it ends in the file; None where it is no JSON."""
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
        """Drop what stands behind the first `end` bytes."""
        self._file.truncate(end)

    def write(self, row: dict[str, Any]) -> None:
        """Append one object and flush it: a kill of the process does not lose it."""
        self._file.write(encoded(row))
        self._file.flush()

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append objects; they are on the disk when this returns."""
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
        except OSError:  # a file system without locks
            pass


class Lines(JsonlFile):
    """A JSONL file of a training run: each line holds its `step`, and lines of later steps can be undone."""

    def __init__(self, path: pathlib.Path, *, resume_step: int):
        """Open for appending; lines of steps after `resume_step`, and what follows them, are cut off."""
        super().__init__(path)
        self.cut(self._end(resume_step))

    def amend(self, row: dict[str, Any]) -> None:
        """Add keys to the last line where it has the same step, else append a line."""
        begin = end = 0
        last: dict[str, Any] = {"step": None}
        for line_end, value in self.lines():
            begin, end, last = end, line_end, value
        if last["step"] == row["step"]:
            self.cut(begin)
            row = last | row
        self.write(row)

    def go_back(self, step: int) -> None:
        """Move the lines of steps after `step` to `NAME.rolled_back.jsonl` beside it; go on after `step`."""
        end = self._end(step)
        self._file.seek(end)
        with self.path.with_suffix(".rolled_back.jsonl").open("ab") as aside:
            shutil.copyfileobj(self._file, aside)
        self.cut(end)

    def _end(self, step: int) -> int:
        """How many bytes are lines of steps up to `step`; later ones come behind these."""
        end = 0
        for line_end, value in self.lines():
            if not _is_of(value, step):
                break
            end = line_end
        return end


class NoLines:
    """In place of `Lines` in a process that writes nothing."""

    def _nothing(self, *_: Any) -> None:
        """Do nothing."""

    write = amend = go_back = sync = close = _nothing


def encoded(value: Any) -> bytes:
    """One line of a JSONL file. Half a character, which no file can hold, becomes a question mark."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode(errors="replace")


def _is_of(value: Any, step: int) -> bool:
    """Whether a line is an object of a step up to `step`."""
    try:
        return value["step"] <= step
    except (KeyError, TypeError):
        return False
