"""Output of a suite: a JSON file with the environment, and a table for the terminal."""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import textwrap
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax

from opd_jax.errors import ConfigError
from opd_jax.tools.bench.measure import Row
from opd_jax.workdir import atomic, folder
from opd_jax.workdir.console import aligned

WIDTH = 100
_DRIVER = pathlib.Path("/proc/driver/nvidia/version")


def environment() -> dict[str, Any]:
    """Return versions, device, date and commit, which every figure needs to be meaningful."""
    device = jax.local_devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": folder.commit(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "processors": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "device": device.device_kind,
        "devices": jax.local_device_count(),
        "backend": jax.default_backend(),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "versions": folder.versions(),
        "gpu": gpu_versions(),
    }


def gpu_versions() -> dict[str, str]:
    """Return the versions of NVIDIA's packages (cuDNN, NCCL, ...), of JAX's plug-ins and of the driver."""
    names = (one.metadata["Name"].lower() for one in metadata.distributions())
    starts = ("nvidia-", "jax-cuda")
    found = {name: metadata.version(name) for name in sorted(set(names)) if name.startswith(starts)}
    if _DRIVER.exists():
        found["driver"] = _DRIVER.read_text(errors="replace").split("\n")[0]
    return found


def write(path: pathlib.Path, suite: str, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Write the rows so far as JSON; the file is replaced atomically."""
    content = {"suite": suite, "environment": about, "rows": [dataclasses.asdict(r) for r in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, content, indent=1)


def resumed(path: pathlib.Path, suite: str, about: dict[str, Any]) -> dict[str, list[Row]]:
    """Return the rows of a file by case, of cases without a fault; nothing where there is no file.

    Raises ConfigError where they were measured by another suite, commit, device, JAX or XLA_FLAGS.
    """
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    there = {"suite": content["suite"]} | _origin(content["environment"])
    here = {"suite": suite} | _origin(about)
    if different := [name for name in here if there[name] != here[name]]:
        name = different[0]
        raise ConfigError(
            f"{path} was measured with {name} {there[name]!r}, this is {here[name]!r}; give another "
            "--out, or leave --resume out"
        )
    by_case: dict[str, list[Row]] = {}
    for row in read(path):
        by_case.setdefault(row.case, []).append(row)
    return {case: rows for case, rows in by_case.items() if all(row.status == "ok" for row in rows)}


def _origin(about: dict[str, Any]) -> dict[str, Any]:
    found = {name: about[name] for name in ("commit", "device", "backend", "flags")}
    return found | {"jax": about["versions"]["jax"]}


def read(path: pathlib.Path) -> list[Row]:
    """Return the rows of a file written by `write`."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def table(rows: Sequence[Row]) -> str:
    """Format rows as an aligned table at most 100 columns wide; a note follows its row."""
    head = ("what", "shape", "median s", "first s", "tok/s", "x floor", "roof", "bound", "GiB")
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    spare = WIDTH - sum(widths[2:]) - 2 * (len(head) - 1)
    widths[1] = min(widths[1], spare // 2)
    widths[0] = min(widths[0], spare - widths[1])
    short = [(line[0][: widths[0]], line[1][: widths[1]], *line[2:]) for line in lines]
    out = []
    for i, text in enumerate(aligned(short, left=(0, 1))):
        out.append(text)
        if i and rows[i - 1].note:
            note = " ".join(rows[i - 1].note.split())
            out += textwrap.wrap(note, WIDTH, initial_indent="    ", subsequent_indent="    ")[:4]
    return "\n".join(out)


def _cells(row: Row) -> tuple[str, ...]:
    if row.status not in ("ok", "missed") or row.limit is not None:
        return (row.name, row.shape, row.status, *[""] * 6)
    return (
        row.name,
        row.shape,
        _number(row.median_s),
        _number(row.first_s),
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
        f"{row.median_s / row.floor_s:.2f}" if row.median_s and row.floor_s else "",
        "" if row.fraction is None else f"{row.fraction:.0%}",
        row.bound or "",
        "" if row.peak_gib is None else f"{row.peak_gib:.2f}",
    )


def _number(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.2g}"
