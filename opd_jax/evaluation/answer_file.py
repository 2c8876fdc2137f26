"""The file of answers: one line each, appended in a fixed order, so that a killed run goes on."""

import fcntl
import json
import os
import pathlib
from typing import Any

from opd_jax.errors import WorkdirError


class AnswerFile:
    """NAME.jsonl, open and locked; a context manager.

    Attributes:
      rows: the answers that are there, in order. dropped: broken lines that were cut off with all
      after them (`skip`).
    """

    def __init__(self, path: pathlib.Path, *, samples: int, total: int, skip: bool):
        """Open it; answer i is of problem i // samples, and there will be `total`.

        A last line that a kill has torn is cut off. Any other line that is not the answer that
        belongs there raises WorkdirError, or is cut off with all after it (`skip`): they are made
        again. Also raised where another process is at work on it, or it cannot be written.
        """
        self.path, self.dropped = path, 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise WorkdirError(
                f"{path} cannot be written ({error.strerror}); give another --workdir"
            ) from None
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WorkdirError(
                    f"{path} is being written by another process; wait for it, or give a new --workdir"
                ) from None
            except OSError:  # a file system without locks
                pass
            self.rows = self._resume(samples, total, skip)
        except BaseException:
            self._file.close()
            raise

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add answers; on disk when this returns."""
        try:
            for row in rows:
                self._file.write(
                    (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="replace")
                )
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise WorkdirError(
                f"{self.path} cannot be written ({error.strerror}); mend that and give the same command "
                "again: what is done is kept"
            ) from None
        self.rows += rows

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _resume(self, samples: int, total: int, skip: bool) -> list[dict[str, Any]]:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        torn = lines.pop()  # b"" behind a whole last line
        rows: list[dict[str, Any]] = []
        end = 0
        for number, line in enumerate(lines, start=1):
            row = _answer(line, len(rows), samples, total)
            if row is None:
                # A machine that loses power can leave zeros where a last line was being written.
                last = number == len(lines) and not torn
                if not skip and not last:
                    raise WorkdirError(
                        f"{self.path}, line {number}: not the answer that belongs there; remove it and "
                        "all after it, give a new --workdir, or let it be done: --config.data.bad_rows=skip"
                    )
                self.dropped = len(lines) - len(rows)
                break
            rows.append(row)
            end += len(line) + 1
        self._file.truncate(end)
        return rows


def _answer(line: bytes, index: int, samples: int, total: int) -> dict[str, Any] | None:
    """The answer on a line if it is the one with this index."""
    try:
        row = json.loads(line)
        place = row["problem"], row["sample"]
        whole = isinstance(row["answer"], str) and isinstance(row["grade"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return row if whole and index < total and place == divmod(index, samples) else None
