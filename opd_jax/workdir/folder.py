"""The workdir is the truth: config.json, run.json, metrics.jsonl, rollouts.jsonl, eval/, checkpoints/."""

import json
import os
import pathlib
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
from ml_collections import ConfigDict

from opd_jax import config as configuration
from opd_jax import hardware
from opd_jax.config.fields import FIELDS
from opd_jax.errors import WorkdirError
from opd_jax.workdir import atomic

# Fields that may differ when a run goes on: they do not touch what is computed.
_SAFE = ("steps", "data.epochs", "eval.", "checkpoint.", "log.", "mesh.", "profile.",
         "grading.processes")  # fmt: skip
# NAME=VALUE where the name says so, USER:PASSWORD@ of an address, and tokens by their looks (Hugging
# Face, W&B, OpenAI, GitHub).
_SECRET = re.compile(
    r"(?i)((?:^|[-_.])(?:token|secret|password|passwd|api_?key|credentials?)=)\S+"
    r"|(://[^/\s:@]*:)[^/\s@]+(?=@)"
    r"|\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[opsu]_\w{16,}|[0-9a-f]{40})\b"
)
_PACKAGES = ("opd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers",
             "grain", "ml-collections", "math-verify", "numpy")  # fmt: skip


def _before(old: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that a run of an older version lacks and whose default would change what it computes.

    Any other field that came later had no other value than its default then.
    """
    found: dict[str, Any] = {}
    if old.get("loss.kl_estimator") == "k3" and old.get("loss.beta_kl"):
        found["loss.kl_clamp"] = 0.0
    if old.get("loss.pg_weight") and old.get("loss.group_coef"):
        found["grading.grader"] = "that of an older version"
    return found


def _flat(config: ConfigDict) -> dict[str, Any]:
    """The fields that training reads, as config.json has them."""
    return configuration.flatten(
        json.loads(configuration.to_json(configuration.TRAINING.of(config)))
    )


def _counts(name: str) -> bool:
    """Whether a field in the config.json of a run is one of training; older files also have others."""
    return name in configuration.TRAINING.fields or name not in FIELDS


def check(path: pathlib.Path, config: ConfigDict, *, accept: bool = False) -> list[str]:
    """Refuse a workdir that cannot be written or belongs to another config; creates nothing.

    Returns the differences that `accept` takes all the same; without it there are none. Raises
    WorkdirError that names the path or every field that differs.
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
        return []
    try:
        old = configuration.flatten(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, OSError, RecursionError) as error:
        raise WorkdirError(f"{file} cannot be read ({error}); give a new --workdir") from None
    usual = _flat(configuration.default())
    old = usual | _before(old) | {name: x for name, x in old.items() if _counts(name)}
    new = _flat(config)
    changed = [text for text in differences(old, new) if not text.startswith(_SAFE)]
    if changed and not accept:
        raise WorkdirError(
            f"workdir {str(path)!r} belongs to another config ({'; '.join(changed)}); "
            "give a new --workdir, the old values to go on with it, or --accept_changes to go on with these"
        )
    return changed


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


def date_of(path: pathlib.Path) -> str:
    """The day that prompts of a run or an evaluation print (`data.date`), "" where none is fixed."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))["data"]["date"]
        return found if isinstance(found, str) else ""
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""  # not there yet, or without it; what is broken is refused elsewhere


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
        "command": [without_secrets(word) for word in command],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": versions(),
        "devices": [device.device_kind for device in jax.devices()],
        "settings": hardware.record(hardware.of_jax(first.device_kind, first.platform)),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
    }


def without_secrets(text: str) -> str:
    """A word of a command line with what looks like a token or a password taken out."""
    return _SECRET.sub(lambda match: f"{match[1] or match[2] or ''}***", text)


def create(
    path: pathlib.Path, config: ConfigDict, command: list[str], *, changes: Sequence[str] = ()
) -> None:
    """Make the folder; write config.json, and run.json with what is needed to repeat the run.

    run.json keeps `changes`, of the config on the way, those of earlier starts before them.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        run = provenance(command)
        made = _changes(path / "run.json")
        if changes:
            made.append({"at": run["started"], "fields": list(changes)})
        atomic.write_json(path / "run.json", run | ({"changes": made} if made else {}), indent=2)
        kept = configuration.TRAINING.of(config)
        atomic.write_text(path / "config.json", configuration.to_json(kept))
    except OSError as error:
        raise WorkdirError(
            f"workdir {str(path)!r} cannot be written ({error.strerror}); "
            "give another one with --workdir"
        ) from None


def _changes(file: pathlib.Path) -> list[Any]:
    try:
        return list(json.loads(file.read_text(encoding="utf-8")).get("changes", []))
    except (ValueError, AttributeError, TypeError, OSError, RecursionError):
        return []  # not there yet, or of no use


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {name: metadata.version(name) for name in _PACKAGES}


def commit() -> str | None:
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
