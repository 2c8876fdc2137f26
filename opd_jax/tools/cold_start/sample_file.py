"""The file that sampling leaves, and what it grows from batch by batch.

FILE.jsonl.partial grows by one line a batch; its first line says what it belongs to. A line torn by
a kill is cut off, and its batch is sampled again. When all is done, the rows become FILE.jsonl and
the report FILE.report.json, each whole or not at all, and the partial file goes.
"""

import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from opd_jax import config as configuration
from opd_jax import workdir
from opd_jax.config.fields import FIELDS
from opd_jax.errors import WorkdirError
from opd_jax.workdir import atomic
from opd_jax.workdir.jsonl import JsonlFile, encoded

# Fields that samples depend on, and those among them that change none.
_TOUCHES = ("seed", "teacher.", "data.", "rollout.max_prompt_tokens", "sample.", "grading.grader",
            "metrics.repetition_")  # fmt: skip
_SAFE = ("sample.slots",)


_AGAIN = "mend that and give the same command again: what is done is kept"


class Partial(JsonlFile):
    """FILE.jsonl.partial, open and locked; a context manager.

    Attributes:
      done: what `add` was given for each batch so far.
    """

    def __init__(self, file: pathlib.Path, header: dict[str, Any]):
        """Open it, or make it with `header` (config, sha256) as its first line.

        Raises WorkdirError where it belongs to another config, or another process is at work on it.
        """
        self.file = file
        with atomic.reported(file, _AGAIN):
            super().__init__(partial_path(file), elsewhere="--out")
            try:
                self.done = self._resume(header)
            except BaseException:
                self.close()
                raise

    def add(self, batch: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Add a batch: what is said of it, and its rows. On disk when this returns."""
        with atomic.reported(self.file, _AGAIN):
            self.append([{"batch": batch, "rows": rows}])

    def finish(self, report: dict[str, Any], *, write: bool) -> None:
        """Write the report and, if `write`, the rows of all batches as the file; then go."""
        with atomic.reported(self.file, _AGAIN):
            text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            atomic.write_text(report_path(self.file), text)
            if write:
                with atomic.replacing(self.file) as target:
                    for _, line in self._batches():
                        target.writelines(map(encoded, line["rows"]))
            self.path.unlink(missing_ok=True)

    def _resume(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        """Check whose file it is, cut off torn lines, and return what is said of each batch."""
        ours = encoded(header)
        first = self._first_line()
        if not first.endswith(b"\n") and ours.startswith(first):  # new, or torn in the first line
            self.cut(0)
            self.write(header)
            return []
        try:
            there = _identity(json.loads(first))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WorkdirError(
                f"{self.path} is in the way and was not written by launch/sample.py; "
                "give a new --out, or remove it"
            ) from None
        _require_same(self.path, there, header)
        end, done = len(first), []
        for line_end, line in self._batches():
            end = line_end
            done.append(line["batch"])
        self.cut(end)
        return done

    def _first_line(self) -> bytes:
        self._file.seek(0)
        return self._file.readline()

    def _batches(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """`lines` after the first, up to one that is broken."""
        for line_end, line in itertools.islice(self.lines(), 1, None):
            if line is None:
                return
            yield line_end, line


def check_place(file: pathlib.Path) -> None:
    """Refuse an output that cannot be written, or that data.open_problems would not read."""
    if file.suffix != ".jsonl":
        raise WorkdirError(
            f"out={str(file)!r}, wanted a name that ends in .jsonl; give --out={file}.jsonl"
        )
    if file.is_dir():
        raise WorkdirError(f"out={str(file)!r} is a folder, wanted a file; give another --out")
    if above := workdir.obstacle(file.parent):
        raise WorkdirError(
            f"out={str(file)!r} cannot be written ({above} is read-only or not a folder); "
            "give another one with --out"
        )


def finished(file: pathlib.Path, header: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a file that is there already; None where there is no file.

    Raises WorkdirError where it was made from another config, or nothing says from which.
    """
    if not file.exists():
        return None
    path = report_path(file)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        there = _identity(report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise WorkdirError(
            f"{file} exists, and {path}, which would say what it was made from, cannot be read; "
            "give a new --out, or remove the file"
        ) from None
    _require_same(file, there, header)
    return report


def date_of(file: pathlib.Path) -> str:
    """The day that prompts of a file print (`data.date`), finished or not; "" where none is fixed."""
    for path, first in ((partial_path(file), True), (report_path(file), False)):
        try:
            with path.open(encoding="utf-8") as opened:
                header = json.loads(opened.readline() if first else opened.read())
            if isinstance(date := header["config"]["data"]["date"], str):
                return date
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue  # not there, or not ours, which is refused where it is opened
    return ""


def report_path(file: pathlib.Path) -> pathlib.Path:
    """FILE.report.json of FILE.jsonl."""
    return file.with_suffix(".report.json")


def partial_path(file: pathlib.Path) -> pathlib.Path:
    """FILE.jsonl.partial of FILE.jsonl: where it exists, there is something left to do."""
    return file.with_name(file.name + ".partial")


def _identity(header: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What samples depend on: fields of the config, and what the problems say."""
    # A field that came later had no other value than its default then; grades may be others.
    defaults = configuration.flatten(
        json.loads(configuration.to_json(configuration.SAMPLING.default()))
    )
    defaults["grading.grader"] = "that of an older version"
    flat = defaults | configuration.flatten(header["config"])
    # Older files have all fields of an experiment; a name that is none of them stays in the comparison.
    unread = FIELDS.keys() - configuration.SAMPLING.fields.keys()
    touching = {n: x for n, x in flat.items() if n.startswith(_TOUCHES) and n not in unread}
    fields = {name: x for name, x in touching.items() if not name.startswith(_SAFE)}
    return fields, {"the problems' sha256": header["sha256"][:12]}


def _require_same(path: pathlib.Path, there: Any, header: dict[str, Any]) -> None:
    fields, problems = (
        workdir.differences(old, new) for old, new in zip(there, _identity(header), strict=True)
    )
    if changed := fields or problems:  # other fields often mean other problems
        raise WorkdirError(
            f"{path} belongs to another config ({'; '.join(changed)}); "
            "give a new --out, or the old values to go on with it"
        )
