"""The workdir is the truth: config.json, run.json, metrics.jsonl, rollouts.jsonl, eval/, checkpoints/."""

import json
import os
import pathlib
import platform
import shutil
import subprocess
import time
from importlib import metadata
from typing import Any

import jax
from ml_collections import ConfigDict

from opd_jax import config as configuration
from opd_jax import devices, whole
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
        whole.write_text(path / "config.json", configuration.to_json(config))
        whole.write_json(path / "run.json", provenance(command), indent=2)
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
            _cut(self._path, _end(self._path, resume_step))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one object."""
        self._file.write(_line(row))
        self._file.flush()

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
