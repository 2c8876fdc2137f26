"""The workdir is the truth: config.json, run.json, metrics.jsonl, rollouts.jsonl, eval/, checkpoints/."""

import json
import os
import pathlib
import platform
import subprocess
import time
from importlib import metadata
from typing import Any

import jax
from ml_collections import ConfigDict

from opd_jax import config as configuration
from opd_jax import devices
from opd_jax.errors import WorkdirError

# Fields that may differ when a run goes on: they do not touch what is computed.
_SAFE = ("steps", "data.epochs", "eval.", "checkpoint.", "log.", "mesh.", "profile.")
_PACKAGES = ("opd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers",
             "grain", "ml-collections", "math-verify", "numpy")  # fmt: skip


def check(path: pathlib.Path, config: ConfigDict) -> None:
    """Refuse a workdir that cannot be written or belongs to another config; creates nothing.

    Raises WorkdirError that names the path or every field that differs.
    """
    if above := obstacle(path):
        raise WorkdirError(
            f"workdir {str(path)!r} cannot be written ({above} is read-only or not a folder); "
            "give another one with --workdir"
        )
    file = path / "config.json"
    if not file.exists():
        if path.exists() and any(path.iterdir()):
            raise WorkdirError(
                f"workdir {str(path)!r} is not empty and holds no config.json, so it is not a run; "
                "give a new folder with --workdir"
            )
        return
    try:
        old = configuration.flatten(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise WorkdirError(f"{file} cannot be read ({error}); give a new --workdir") from None
    new = configuration.flatten(json.loads(configuration.to_json(config)))
    changed = [text for text in differences(old, new) if not text.startswith(_SAFE)]
    if changed:
        raise WorkdirError(
            f"workdir {str(path)!r} belongs to another config ({'; '.join(changed)}); "
            "give a new --workdir, or the old values to go on with it"
        )


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """What config.json of a run holds, with at least `student.path`. Raises WorkdirError: no run."""
    if not path.is_dir():
        raise WorkdirError(
            f"workdir {str(path)!r} does not exist; give the folder that train.py printed first"
        )
    file = path / "config.json"
    if not file.is_file():
        raise WorkdirError(
            f"workdir {str(path)!r} holds no config.json, so it is not a run; "
            "give the folder that train.py printed first"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config["student"]["path"], str):
            raise TypeError("student.path is not text")
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise WorkdirError(
            f"{file} cannot be read as the config of a run ({error}); "
            "restore it, or give another workdir"
        ) from error
    return config


def obstacle(folder: pathlib.Path) -> pathlib.Path | None:
    """What keeps a folder from being made or written into: the nearest path that exists; or None."""
    while not folder.exists():
        folder = folder.parent
    writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    return None if writable else folder


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`FIELD: OLD there, NEW now` of every field in which two flat configs differ."""
    return [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]


def provenance(command: list[str]) -> dict[str, Any]:
    """What is needed, beside the config, to repeat a run: versions, commit, devices, command."""
    first = jax.devices()[0]
    return {
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "devices": [device.device_kind for device in jax.devices()],
        "settings": devices.record(devices.of_jax(first.device_kind, first.platform)),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
    }


def create(path: pathlib.Path, config: ConfigDict, command: list[str]) -> None:
    """Make the folder; write config.json, and run.json with what is needed to repeat the run."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(configuration.to_json(config), encoding="utf-8")
        run = json.dumps(provenance(command), indent=2) + "\n"
        (path / "run.json").write_text(run, encoding="utf-8")
    except OSError as error:
        raise WorkdirError(
            f"workdir {str(path)!r} cannot be written ({error.strerror}); "
            "give another one with --workdir"
        ) from None


class Lines:
    """A JSONL file of the run, one object a line, each with its `step`, flushed line by line."""

    def __init__(self, path: pathlib.Path, *, resume_step: int):
        """Open for appending, cutting off lines of steps after `resume_step` and a torn last line."""
        self._path = path
        self._open(resume_step)

    def _open(self, resume_step: int) -> None:
        if self._path.exists():
            kept = [line for line in _whole_lines(self._path) if line["step"] <= resume_step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
            temporary.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one object."""
        self._file.write(_line(row))
        self._file.flush()

    def go_back(self, step: int) -> None:
        """Move the lines of steps after `step` to `NAME.rolled_back.jsonl` beside it; go on after `step`."""
        self._file.close()
        lines = _whole_lines(self._path)
        aside = self._path.with_suffix(".rolled_back.jsonl")
        with aside.open("a", encoding="utf-8") as file:
            file.writelines(_line(line) for line in lines if line["step"] > step)
        self._open(step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NoLines:
    """In the place of `Lines` in a process that writes nothing."""

    def write(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def go_back(self, step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _whole_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # not splitlines: texts hold U+2028
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # torn by a kill; everything after it is later than the checkpoint
    return rows


def _commit() -> str | None:
    """Commit of the source tree the package runs from, `+` where it has changes; None outside git."""
    here = pathlib.Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip()
