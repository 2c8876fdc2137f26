"""What a suite leaves: a JSON file with the environment, and a table for the terminal."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import textwrap
from collections.abc import Sequence
from typing import Any

import jax

from opd_jax.tools.bench.measure import Row
from opd_jax.workdir import atomic

WIDTH = 100
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def environment() -> dict[str, Any]:
    """Versions, device, date and commit: what a figure means nothing without."""
    device = jax.local_devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "processors": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "device": device.device_kind,
        "devices": jax.local_device_count(),
        "backend": jax.default_backend(),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def write(path: pathlib.Path, suite: str, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """The rows so far as JSON; the file is replaced as a whole."""
    given = {"suite": suite, "environment": about, "rows": [dataclasses.asdict(r) for r in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, given, indent=1)


def read(path: pathlib.Path) -> list[Row]:
    """The rows of a file that `write` has written."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned, at most 100 columns wide; notes stand below their row."""
    head = ("what", "shape", "median s", "first s", "tok/s", "roof", "bound", "GiB")
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    spare = WIDTH - sum(widths[2:]) - 2 * (len(head) - 1)
    widths[1] = min(widths[1], spare // 2)
    widths[0] = min(widths[0], spare - widths[1])
    out = []
    for i, cells in enumerate(lines):
        texts = [
            cell[:width].ljust(width) if j < 2 else cell.rjust(width)
            for j, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        out.append("  ".join(texts).rstrip())
        if i and rows[i - 1].note:
            note = " ".join(rows[i - 1].note.split())
            out += textwrap.wrap(note, WIDTH, initial_indent="    ", subsequent_indent="    ")[:4]
    return "\n".join(out)


def _cells(row: Row) -> tuple[str, ...]:
    if row.status not in ("ok", "missed") or row.limit is not None:
        return (row.name, row.shape, row.status, "", "", "", "", "")
    return (
        row.name,
        row.shape,
        _number(row.median_s),
        _number(row.first_s),
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
        "" if row.fraction is None else f"{row.fraction:.0%}",
        row.bound or "",
        "" if row.peak_gib is None else f"{row.peak_gib:.2f}",
    )


def _number(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.2g}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit of the checkout that this file is in, or nothing."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except OSError:
        return ""
    return found.stdout.strip()
