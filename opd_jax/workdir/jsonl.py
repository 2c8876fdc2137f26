"""JSON Lines files of a run: appended, flushed line by line, cut back on resume."""

import json
import os
import pathlib
import shutil
from typing import Any


class Lines:
    """A JSONL file of the run, one object a line, each with its `step`, flushed line by line."""

    def __init__(self, path: pathlib.Path, *, resume_step: int):
        """Open for appending, cutting off lines of steps after `resume_step` and a torn last line."""
        self._path = path
        self._open(resume_step)

    def _open(self, resume_step: int) -> None:
        if self._path.exists():
            _cut(self._path, _end(self._path, resume_step))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one object."""
        self._file.write(_line(row))
        self._file.flush()

    def amend(self, row: dict[str, Any]) -> None:
        """Add keys to the last line where it has the same step, else append a line."""
        last = b"".join(self._path.read_bytes().splitlines(keepends=True)[-1:])
        there = json.loads(last) if last else {"step": None}
        if there["step"] == row["step"]:
            _cut(self._path, self._path.stat().st_size - len(last))
            row = there | row
        self.write(row)

    def sync(self) -> None:
        """Until all lines are on the disk itself."""
        os.fsync(self._file.fileno())

    def go_back(self, step: int) -> None:
        """Move the lines of steps after `step` to `NAME.rolled_back.jsonl` beside it; go on after `step`."""
        self._file.close()
        end = _end(self._path, step)
        aside = self._path.with_suffix(".rolled_back.jsonl")
        with self._path.open("rb") as file, aside.open("ab") as out:
            file.seek(end)
            shutil.copyfileobj(file, out)
        self._open(step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NoLines:
    """In the place of `Lines` in a process that writes nothing."""

    def write(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def amend(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def go_back(self, step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _end(path: pathlib.Path, step: int) -> int:
    """How many bytes of a file are whole lines of steps up to `step`; later ones come behind these."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or not _is_of(line, step):
                break
            end += len(line)
    return end


def _is_of(line: bytes, step: int) -> bool:
    """Whether a line is an object of a step up to `step`; one torn by a kill is none."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _cut(path: pathlib.Path, end: int) -> None:
    with path.open("rb+") as file:
        file.truncate(end)
