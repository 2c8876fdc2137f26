"""Filter, decontaminate and split raw problems with solutions into sft.jsonl and opd.jsonl.

A row is dropped for the first reason that applies, in the order of `filters.judge`; dropped.jsonl has a line
for every dropped row. Rows are processed in blocks, each saved with a marker when it is complete. A run that
was killed resumes after the last complete block and ends with the same result. Memory use is one block, the
benchmarks, and about 100 bytes per kept row.
"""

import collections
import glob
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from opd_jax.config.schema import flatten
from opd_jax.data.columns import Counts, describe
from opd_jax.data.files import Row, RowError, stream
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.errors import DataError, WorkdirError
from opd_jax.grading.grader import Grader
from opd_jax.tools.prepare_data.config import validate
from opd_jax.tools.prepare_data.decontaminate import (
    Benchmarks,
    Encoder,
    load_encoder,
    read_benchmarks,
)
from opd_jax.tools.prepare_data.filters import judge, row_key
from opd_jax.workdir import atomic

Print = Callable[[str], None]


def prepare(
    config: ConfigDict, out: str, *, encoder: Encoder | None = None, say: Print = print
) -> dict[str, Any]:
    """Prepare the data as `config` specifies, write the files to `out`, return the report.

    `encoder` embeds sentences; None = the model of decontaminate.embedding_model, if set. `say` prints
    progress.

    Raises ConfigError, DataError, ModelError, or WorkdirError where `out` belongs to another config.
    """
    validate(config)
    folder = pathlib.Path(out)
    paths = _paths(config.data.train)
    section = config.decontaminate
    files = {name: path for name, path in section.benchmarks.items() if path}
    if section.embedding_model and encoder is None:
        encoder = load_encoder(section.embedding_model)
    benchmarks = Benchmarks(
        read_benchmarks(files, section.columns),
        ngram=section.ngram,
        ngram_share=section.ngram_share,
        encoder=encoder,
        embedding_cosine=section.embedding_cosine,
    )
    tokenizer = Tokenizer(config.filter.tokenizer) if config.filter.tokenizer else None
    _claim(folder, config, [*paths, *files.values()])
    report_file = folder / "report.json"
    if not report_file.exists():
        done = _work(config, paths, folder / "blocks", benchmarks, tokenizer, say)
        report = _assemble(config, folder, done, benchmarks)
        _write(report_file, [json.dumps(report, indent=2) + "\n"])
    shutil.rmtree(folder / "blocks", ignore_errors=True)
    return json.loads(report_file.read_text(encoding="utf-8"))


def table(report: dict[str, Any]) -> str:
    """Format the report as text."""
    lines = [("read", report["read"])]
    lines += [(f"- {reason}", count) for reason, count in report["dropped"].items()]
    lines += [(name, report[name]) for name in ("kept", "sft", "opd", "left over")]
    text = [f"{name:<28}{count:>12,}" for name, count in lines]
    for name, counts in report["contamination"].items():
        parts = [
            f"{method} {hits['problems']} problems in {hits['rows']} rows"
            for method, hits in counts["found"].items()
        ]
        text.append(f"{name} ({counts['problems']} problems): {', '.join(parts)}")
    if report.get("columns"):  # missing in a folder of an older version
        text.append(f"columns: {report['columns']}")
    return "\n".join([*text, *(f"note: {note}" for note in report["notes"])])


def _paths(names: str) -> list[str]:
    """Expand a comma-separated list of files and patterns, in its order; matches of a pattern are sorted."""
    paths: list[str] = []
    for name in names.split(","):
        matches = sorted(glob.glob(name)) if any(c in name for c in "*?[") else [name]
        if not matches:
            raise DataError(f"data.train: no file matches {name!r}; correct --config.data.train")
        paths += matches
    return paths


def _claim(folder: pathlib.Path, config: ConfigDict, paths: list[str]) -> None:
    """Create the folder with its config.json, or check that it belongs to this config and these files.

    Raises WorkdirError where it does not or cannot be written, DataError where a file does not exist.
    """
    files = {}
    for path in paths:
        if not os.path.exists(path):
            raise DataError(f"{path} does not exist; correct the path")
        status = os.stat(path)
        files[path] = [status.st_size, status.st_mtime_ns]
    identity = flatten(config.to_dict()) | {f"file {path}": stamp for path, stamp in files.items()}
    file = folder / "config.json"
    try:
        if not file.exists():
            if folder.exists() and {item.name for item in folder.iterdir()} - {"config.json.tmp"}:
                raise WorkdirError(
                    f"{str(folder)!r} is not empty and was not created by prepare_data; "
                    "give a new folder with --out"
                )
            folder.mkdir(parents=True, exist_ok=True)
            _write(file, [json.dumps(identity, indent=2) + "\n"])
        recorded = dict(json.loads(file.read_text(encoding="utf-8")))
        (folder / "blocks").mkdir(exist_ok=True)
    except OSError as error:
        if isinstance(error, WorkdirError):
            raise
        raise WorkdirError(
            f"{str(folder)!r} cannot be written ({error.strerror}); give another --out"
        ) from None
    except (ValueError, TypeError) as error:
        raise WorkdirError(f"{file} cannot be read ({error}); give a new --out") from None
    different = [
        name for name in sorted(identity | recorded) if identity.get(name) != recorded.get(name)
    ]
    if different:
        raise WorkdirError(
            f"{str(folder)!r} belongs to another config or other files (different: "
            f"{', '.join(different[:5])}); give a new --out, or set the old values to resume it"
        )


# Blocks


def _work(
    config: ConfigDict,
    paths: list[str],
    blocks: pathlib.Path,
    benchmarks: Benchmarks,
    tokenizer: Tokenizer | None,
    say: Print,
) -> list[pathlib.Path]:
    """Filter all rows, block by block; return the markers of the blocks."""
    source = _rows(paths)
    seen: set[int] = set()  # keys of the kept problems
    markers: list[pathlib.Path] = []
    grader = Grader(workers=os.cpu_count() or 1) if config.filter.grade else None
    try:
        while block := list(itertools.islice(source, config.block)):
            name = blocks / f"{len(markers):06}"
            marker = name.with_suffix(".json")
            markers.append(marker)
            if not marker.exists():
                result = judge(
                    block, config=config, benchmarks=benchmarks, tokenizer=tokenizer, grader=grader,
                    seen=seen,
                )  # fmt: skip
                for kind, lines in result["rows"].items():
                    _write(name.with_suffix(f".{kind}.jsonl"), map(_line, lines))
                _write(marker, [json.dumps({k: v for k, v in result.items() if k != "rows"})])
                say(f"{len(markers) * config.block - config.block + len(block):,} rows")
            elif not config.filter.duplicates:
                kept = _lines(name.with_suffix(".kept.jsonl"))
                seen.update(map(row_key, kept))
    finally:
        if grader:
            grader.close()
    return markers


def _rows(paths: list[str]) -> Iterator[tuple[str, int, Row | RowError]]:
    for path in paths:
        for number, row in stream(path):
            yield path, number, row


# The result


def _assemble(
    config: ConfigDict, folder: pathlib.Path, markers: list[pathlib.Path], benchmarks: Benchmarks
) -> dict[str, Any]:
    """Write sft.jsonl, opd.jsonl and dropped.jsonl, with rows in source order; return the report."""
    counts = [json.loads(marker.read_text(encoding="utf-8")) for marker in markers]
    reasons: collections.Counter[str] = collections.Counter()
    rows_hit: collections.Counter[str] = collections.Counter()
    hits: dict[str, set[int]] = {method: set() for method in benchmarks.methods}
    columns: Counts = collections.defaultdict(collections.Counter)
    for count in counts:
        for kind, names in count.get("columns", {}).items():
            columns[kind].update(names)
        reasons.update(count["reasons"])
        rows_hit.update(count["rows_hit"])
        for method, places in count["hits"].items():
            hits[method].update(places)
    _write(
        folder / "dropped.jsonl",
        (line for m in markers for line in _text_lines(m.with_suffix(".dropped.jsonl"))),
    )
    keys = np.fromiter(
        (row_key(row, config.seed) for m in markers for row in _lines(_kept_file(m))),
        np.uint64,
    )
    if not len(keys):
        reasons_text = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        raise DataError(
            f"data.train={config.data.train!r}: no row is kept ({reasons_text}); {folder / 'dropped.jsonl'} "
            "has the reason of each; correct --config.data.columns, or relax --config.filter"
        )
    sft, opd = _split(keys, config.split)
    for name, chosen in (("sft", sft), ("opd", opd)):
        _write(folder / f"{name}.jsonl", _chosen(markers, chosen))
    names = dict.fromkeys(problem.benchmark for problem in benchmarks.problems)
    contamination = {
        name: {
            "problems": sum(p.benchmark == name for p in benchmarks.problems),
            "too short": benchmarks.unchecked(name),
            "found": {
                method: {
                    "problems": sum(benchmarks.problems[i].benchmark == name for i in places),
                    "rows": rows_hit[f"{name} {method}"],
                }
                for method, places in (hits | {"any": set().union(*hits.values())}).items()
            },
        }
        for name in names
    }
    return {
        "read": sum(count["read"] for count in counts),
        "dropped": dict(sorted(reasons.items())),
        "kept": len(keys),
        "sft": int(sft.sum()),
        "opd": int(opd.sum()),
        "left over": int((~sft & ~opd).sum()),
        "columns": describe(columns),
        "contaminated rows": {m: rows_hit[f"any {m}"] for m in benchmarks.methods},
        "contamination": contamination,
        "notes": _notes(config, sft, opd, benchmarks),
    }


def _split(keys: np.ndarray, split: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return masks of the rows for SFT and for OPD, from each row's key alone or from its rank."""
    if not split.sft and not split.opd:
        below = keys < np.float64(split.opd_share) * 2.0**64
        return ~below, below
    rank = np.empty(len(keys), np.int64)
    rank[np.argsort(keys, kind="stable")] = np.arange(len(keys))
    # OPD takes the lowest ranks, SFT the highest; the number for SFT has priority.
    sft: int = min(split.sft, len(keys)) if split.sft else max(len(keys) - split.opd, 0)
    opd = min(split.opd or len(keys), len(keys) - sft)  # 0 = all other rows
    return rank >= len(keys) - sft, rank < opd


def _notes(
    config: ConfigDict, sft: np.ndarray, opd: np.ndarray, benchmarks: Benchmarks
) -> list[str]:
    """Return notes about checks that were skipped, and about splits that got fewer rows than configured."""
    notes = []
    if not config.filter.tokenizer:
        notes.append("the length of solutions was not checked, because filter.tokenizer is empty")
    if not config.filter.grade:
        notes.append(
            "solutions were not graded; rows with a column correctness_math_verify were filtered by it"
        )
    if not benchmarks.problems:
        notes.append(
            "rows were not compared with any benchmark, because decontaminate.benchmarks is empty"
        )
    for name, target, mask in (("sft", config.split.sft, sft), ("opd", config.split.opd, opd)):
        if mask.sum() < target:
            notes.append(f"split.{name}={target}, but only {int(mask.sum())} rows were left")
    return notes


def _chosen(markers: list[pathlib.Path], chosen: np.ndarray) -> Iterator[str]:
    lines = (line for marker in markers for line in _text_lines(_kept_file(marker)))
    return itertools.compress(lines, chosen)


def _kept_file(marker: pathlib.Path) -> pathlib.Path:
    return marker.with_suffix(".kept.jsonl")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _lines(file: pathlib.Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, _text_lines(file))


def _text_lines(file: pathlib.Path) -> Iterator[str]:
    with file.open(encoding="utf-8", newline="\n") as opened:
        yield from opened


def _write(file: pathlib.Path, lines: Iterable[str]) -> None:
    """Write lines to a file atomically."""
    advice = "make room and run the same command again"
    with atomic.reported(file, advice), atomic.replacing(file) as opened:
        opened.writelines(line.encode() for line in lines)
