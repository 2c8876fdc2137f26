"""The workdir of a run: check it against a config, create it, write config.json and run.json.

A workdir also has metrics.jsonl, rollouts.jsonl, eval/ and checkpoints/.
"""

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

# Fields that may change when a run is resumed, because they do not affect training.
_SAFE = ("steps", "data.epochs", "eval.", "checkpoint.", "log.", "mesh.", "processes.",
         "watchdog.", "profile.", "grading.processes", "guard.self_test",
         "reward.processes", "reward.seconds", "reward.on_error")  # fmt: skip
# Secrets: NAME=VALUE with a name such as token, USER:PASSWORD@ in a URL, and tokens in the formats of
# Hugging Face, W&B, OpenAI and GitHub.
_SECRET = re.compile(
    r"(?i)((?:^|[-_.])(?:token|secret|password|passwd|api_?key|credentials?)=)\S+"
    r"|(://[^/\s:@]*:)[^/\s@]+(?=@)"
    r"|\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[opsu]_\w{16,}|[0-9a-f]{40})\b"
)
_PACKAGES = ("opd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers",
             "grain", "ml-collections", "math-verify", "numpy")  # fmt: skip


def _older_values(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of fields that a run of an older version lacks, where they differ from the default.

    Older versions behaved like the default of any other field that was added later.
    """
    values: dict[str, Any] = {}
    if old.get("loss.kl_estimator") == "k3" and old.get("loss.beta_kl"):
        values["loss.kl_clamp"] = 0.0
    if old.get("loss.pg_weight") and old.get("loss.group_coef"):
        values["grading.grader"] = "that of an older version"
    return values


def _flat(config: ConfigDict) -> dict[str, Any]:
    """Return the fields that training reads, in the representation of config.json."""
    return configuration.flatten(
        json.loads(configuration.to_json(configuration.TRAINING.of(config)))
    )


def _is_training_field(name: str) -> bool:
    """Return whether training reads a field of config.json; older files also have other fields."""
    return name in configuration.TRAINING.fields or name not in FIELDS


def check(path: pathlib.Path, config: ConfigDict, *, accept: bool = False) -> list[str]:
    """Check that a workdir can be written and belongs to `config`. Creates nothing.

    Returns the fields that differ, which are allowed only with `accept`. Raises WorkdirError that names
    the path or every field that differs.
    """
    if above := obstacle(path):
        raise WorkdirError(
            f"workdir {str(path)!r} cannot be written ({above} is read-only or not a folder); "
            "give another folder with --workdir"
        )
    file = path / "config.json"
    if not file.exists():
        if path.exists() and any(path.iterdir()):
            raise WorkdirError(
                f"workdir {str(path)!r} is not empty and has no config.json, so it is not a run; "
                "give a new folder with --workdir"
            )
        return []
    try:
        old = configuration.flatten(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, OSError, RecursionError) as error:
        raise WorkdirError(f"{file} cannot be read ({error}); give a new --workdir") from None
    usual = _flat(configuration.default())
    old = (
        usual
        | _older_values(old)
        | {name: x for name, x in old.items() if _is_training_field(name)}
    )
    new = _flat(config)
    changed = [text for text in differences(old, new) if not text.startswith(_SAFE)]
    if changed and not accept:
        raise WorkdirError(
            f"workdir {str(path)!r} belongs to another config ({'; '.join(changed)}); "
            "give a new --workdir, set the old values to resume it, or give --accept_changes to resume it "
            "with the new ones"
        )
    return changed


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """Return the config.json of a run, which has at least `student.path`. Raises WorkdirError: no run."""
    if not path.is_dir():
        raise WorkdirError(
            f"workdir {str(path)!r} does not exist; give the folder that train.py printed first"
        )
    file = path / "config.json"
    if not file.is_file():
        raise WorkdirError(
            f"workdir {str(path)!r} has no config.json, so it is not a run; "
            "give the folder that train.py printed first"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config["student"]["path"], str):
            raise TypeError("student.path is not a string")
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise WorkdirError(
            f"{file} cannot be read as the config of a run ({error}); "
            "restore it, or give another workdir"
        ) from error
    return config


def date_of(path: pathlib.Path) -> str:
    """Return the date in the prompts of a run or an evaluation (`data.date`), "" where none is fixed."""
    try:
        date = json.loads((path / "config.json").read_text(encoding="utf-8"))["data"]["date"]
        return date if isinstance(date, str) else ""
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""  # missing, or without the field; `read_config` reports a damaged file


def obstacle(folder: pathlib.Path) -> pathlib.Path | None:
    """Return the existing path that prevents creating or writing `folder`, None where nothing does."""
    while not folder.exists():
        folder = folder.parent
    writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    return None if writable else folder


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `FIELD: OLD there, NEW now` for every field in which two flat configs differ."""
    return [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]


def provenance(command: list[str]) -> dict[str, Any]:
    """Return what is needed in addition to the config to repeat a run: versions, commit, devices, command."""
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
    """Replace tokens and passwords in a word of a command line by ***."""
    return _SECRET.sub(lambda match: f"{match[1] or match[2] or ''}***", text)


def create(
    path: pathlib.Path, config: ConfigDict, command: list[str], *, changes: Sequence[str] = ()
) -> None:
    """Create the folder; write config.json, and run.json with what is needed to repeat the run.

    run.json also lists the `changes` of the config, after those of earlier starts.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        run = provenance(command)
        history = _changes(path / "run.json")
        if changes:
            history.append({"at": run["started"], "fields": list(changes)})
        atomic.write_json(
            path / "run.json", run | ({"changes": history} if history else {}), indent=2
        )
        kept = configuration.TRAINING.of(config)
        atomic.write_text(path / "config.json", configuration.to_json(kept))
    except OSError as error:
        raise WorkdirError(
            f"workdir {str(path)!r} cannot be written ({error.strerror}); "
            "give another folder with --workdir"
        ) from None


def _changes(file: pathlib.Path) -> list[Any]:
    try:
        return list(json.loads(file.read_text(encoding="utf-8")).get("changes", []))
    except (ValueError, AttributeError, TypeError, OSError, RecursionError):
        return []  # missing or damaged


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {name: metadata.version(name) for name in _PACKAGES}


def commit() -> str | None:
    """Return the git commit of the package's source tree, with `+` where it has changes; None outside git."""
    here = pathlib.Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip()
