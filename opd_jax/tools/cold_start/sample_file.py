"""The output of sampling, written batch by batch to a partial file first.

FILE.jsonl.partial gets one line per batch; its first line identifies the config and the problems. A line that
a kill left incomplete is removed, and its batch is sampled again. At the end, the rows are written to
FILE.jsonl and the report to FILE.report.json, each atomically, and the partial file is deleted.
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

# Prefixes of fields that samples depend on (those of the student where they are chosen for it), and
# exceptions among them that do not affect samples.
_RELEVANT = ("seed", "teacher.", "data.", "rollout.max_prompt_tokens", "sample.", "grading.grader",
            "metrics.repetition_")  # fmt: skip
_SAFE = ("sample.slots",)
_AGAIN = "correct that and run the same command again; completed batches are kept"


class Partial(JsonlFile):
    """FILE.jsonl.partial, open and locked; a context manager.

    Attributes:
      done: the `batch` argument of `add` for each batch so far.
    """

    def __init__(self, file: pathlib.Path, header: dict[str, Any]):
        """Open the file, or create it with `header` (config, sha256) as its first line.

        Raises WorkdirError where it belongs to another config, or another process has it open.
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
        """Append the results of a batch and its rows, and wait until they are on the disk."""
        with atomic.reported(self.file, _AGAIN):
            self.append([{"batch": batch, "rows": rows}])

    def finish(self, report: dict[str, Any], *, write: bool) -> None:
        """Write the report and, if `write`, the rows of all batches; then delete the partial file."""
        with atomic.reported(self.file, _AGAIN):
            text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            atomic.write_text(report_path(self.file), text)
            if write:
                with atomic.replacing(self.file) as target:
                    for _, line in self._batches():
                        target.writelines(map(encoded, line["rows"]))
            self.path.unlink(missing_ok=True)

    def _resume(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        """Check the first line against `header`, remove incomplete lines, and return the batches' results."""
        expected = encoded(header)
        first = self._first_line()
        if not first.endswith(b"\n") and expected.startswith(first):  # new, or incomplete
            self.cut(0)
            self.write(header)
            return []
        try:
            recorded = _identity(json.loads(first))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WorkdirError(
                f"{self.path} exists and was not written by launch/sample.py; "
                "give a new --out, or remove the file"
            ) from None
        _require_same(self.path, recorded, header)
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
        """Yield `lines` after the first, up to one that is not valid JSON."""
        for line_end, line in itertools.islice(self.lines(), 1, None):
            if line is None:
                return
            yield line_end, line


def check_place(file: pathlib.Path) -> None:
    """Raise WorkdirError for an output that cannot be written, or that data.open_problems cannot read."""
    if file.suffix != ".jsonl":
        raise WorkdirError(
            f"out={str(file)!r} is not a name that ends in .jsonl; give --out={file}.jsonl"
        )
    if file.is_dir():
        raise WorkdirError(f"out={str(file)!r} is a folder; give --out=FILE.jsonl")
    if above := workdir.obstacle(file.parent):
        raise WorkdirError(
            f"out={str(file)!r} cannot be written ({above} is read-only or not a folder); "
            "give another file with --out"
        )


def finished(file: pathlib.Path, header: dict[str, Any]) -> dict[str, Any] | None:
    """Return the report of a complete file, None where the file does not exist.

    Raises WorkdirError where it belongs to another config, or its report cannot be read.
    """
    if not file.exists():
        return None
    path = report_path(file)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        recorded = _identity(report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise WorkdirError(
            f"{file} exists, but its report {path} cannot be read; "
            "give a new --out, or remove the file"
        ) from None
    _require_same(file, recorded, header)
    return report


def date_of(file: pathlib.Path) -> str:
    """Return the date in the prompts of a file (`data.date`), complete or not; "" where none is fixed."""
    for path, first in ((partial_path(file), True), (report_path(file), False)):
        try:
            with path.open(encoding="utf-8") as opened:
                header = json.loads(opened.readline() if first else opened.read())
            if isinstance(date := header["config"]["data"]["date"], str):
                return date
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue  # missing, or another kind of file, which is reported when it is opened
    return ""


def report_path(file: pathlib.Path) -> pathlib.Path:
    """Return the path FILE.report.json for FILE.jsonl."""
    return file.with_suffix(".report.json")


def partial_path(file: pathlib.Path) -> pathlib.Path:
    """Return the path FILE.jsonl.partial for FILE.jsonl. While it exists, sampling is not complete."""
    return file.with_name(file.name + ".partial")


def _identity(header: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what samples depend on: fields of the config, and the digest of the problems."""
    # Older versions behaved like the default of any field that was added later, except the grader.
    defaults = configuration.flatten(
        json.loads(configuration.to_json(configuration.SAMPLING.default()))
    )
    defaults["grading.grader"] = "that of an older version"
    flat = defaults | configuration.flatten(header["config"])
    # Older files have all fields of an experiment. Unknown names remain in the comparison.
    unread = FIELDS.keys() - configuration.SAMPLING.fields.keys()
    starts = _RELEVANT + ("student.",) * (flat["sample.choose"] != "all")
    relevant = {n: x for n, x in flat.items() if n.startswith(starts) and n not in unread}
    fields = {name: x for name, x in relevant.items() if not name.startswith(_SAFE)}
    return fields, {"the problems' sha256": header["sha256"][:12]}


def _require_same(path: pathlib.Path, recorded: Any, header: dict[str, Any]) -> None:
    fields, problems = (
        workdir.differences(old, new) for old, new in zip(recorded, _identity(header), strict=True)
    )
    if changed := fields or problems:  # other fields often change the problems too
        raise WorkdirError(
            f"{path} belongs to another config ({'; '.join(changed)}); "
            "give a new --out, or set the old values to resume it"
        )
