"""Recorded rollouts with the teacher's log-probs: the files of a folder, read and written (docs/replay.md).

Lightning OPD (2604.13010): rollouts of the initial student are made and scored by the teacher once, and
training needs neither teacher nor sampler. A folder has one safetensors file for each step, and a manifest
with the identity of student, teacher and tokenizer, and the size and SHA-256 of every file.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from opd_jax import config as configuration
from opd_jax.data import Problem, Tokenizer
from opd_jax.errors import ConfigError, DataError, WorkdirError
from opd_jax.models.fingerprint import fingerprint
from opd_jax.training.recording import Recorded, unpack
from opd_jax.workdir import atomic

FORMAT = 1
MANIFEST = "manifest.json"
# Fields on which shapes or recorded numbers depend. A run must have the values of the recording.
FIXED = (
    "rollout.prompts_per_step", "rollout.samples_per_prompt", "rollout.max_prompt_tokens",
    "rollout.max_response_tokens", "scoring.temperature", "scoring.special_tokens",
    "data.prompt_template", "data.system_prompt", "reward.function", "reward.column",
    "grading.grader",
)  # fmt: skip
# Recorded, so that a resumed recording is the same one; a run that trains may have other values.
SAMPLED = (
    "seed", "steps", "rollout.temperature", "rollout.top_p", "rollout.top_k",
    "rollout.stop_on_repetition", "rollout.repetition_period", "data.train", "data.shuffle",
    "data.size", "data.teacher_prompt_template", "data.teacher_system_prompt",
)  # fmt: skip


def header(
    config: ConfigDict, tokenizer: Tokenizer, teacher_tokenizer: Tokenizer | None, *, places: int
) -> dict[str, Any]:
    """Return what identifies a recording: digests of models and tokenizers, and the fields it depends on.

    `teacher_tokenizer` is None where no teacher scores. Reads the weights of both folders.
    """
    flat = json.loads(json.dumps(configuration.flatten(config.to_dict())))
    digests = {"student": fingerprint(config.student.path), "tokenizer": vocabulary_of(tokenizer)}
    if teacher_tokenizer is not None:
        digests["teacher"] = fingerprint(config.teacher.path)
        digests["teacher_tokenizer"] = vocabulary_of(teacher_tokenizer)
    return {
        "format": FORMAT,
        "sha256": digests,
        "top_k": places,
        "config": {name: flat[name] for name in (*FIXED, *SAMPLED)},
    }


def vocabulary_of(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of the ids and texts of a tokenizer."""
    items = sorted(tokenizer.vocabulary().items())
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()


class Writer:
    """Write a recording file by file; an interrupted one is continued where its manifest ends.

    Raises WorkdirError: the folder holds something else, the recording of another config, or cannot be
    written.
    """

    def __init__(self, folder: pathlib.Path, header: dict[str, Any]):
        self.folder, self.header = folder, header
        self.shards: list[dict[str, Any]] = []
        file = folder / MANIFEST
        if file.exists():
            found = _manifest(folder)
            self.shards = found.pop("shards")
            if found != header:
                names = [name for name in header if found.get(name) != header[name]]
                raise WorkdirError(
                    f"{folder} is a recording of something else (its {', '.join(names)} differ); give "
                    "another --out, or run it with the config that it was begun with"
                )
            _check_shards(folder, self.shards)
        elif folder.exists() and any(folder.iterdir()):
            raise WorkdirError(f"{folder} is not empty and no recording; give another --out")

    def add(self, arrays: dict[str, np.ndarray], problems: Sequence[tuple[int, str]]) -> None:
        """Write the next file, and then the manifest that lists it; each of them completely or not at all.

        `problems` are the place in the data and the id of each problem of the step.
        """
        name = f"step-{len(self.shards) + 1:06d}.safetensors"
        contents = save({key: np.ascontiguousarray(x) for key, x in arrays.items()})
        shard = {
            "file": name,
            "bytes": len(contents),
            "sha256": hashlib.sha256(contents).hexdigest(),
            "tokens": int(np.sum(arrays["length"] - arrays["prompt_length"])),
            "places": [place for place, _ in problems],
            "ids": [problem for _, problem in problems],
        }
        advice = (
            "make room, and run the same command again: it goes on after the last complete file"
        )
        with atomic.reported(self.folder, advice):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic.replacing(self.folder / name) as out:
                out.write(contents)
            self.shards.append(shard)
            atomic.write_json(self.folder / MANIFEST, self.header | {"shards": self.shards})


@dataclasses.dataclass(frozen=True)
class Replay:
    """A recording that training reads, opened by `open_replay`; the loss reads `places` ids of a support."""

    folder: pathlib.Path
    header: dict[str, Any]
    shards: list[dict[str, Any]]
    width: int
    places: int = 0

    @property
    def order(self) -> list[int]:
        """The place in the data of every recorded problem, in the order of the steps."""
        return [place for shard in self.shards for place in shard["places"]]

    @property
    def tokens(self) -> int:
        """Response tokens of the recording."""
        return sum(shard["tokens"] for shard in self.shards)

    def read(self, step: int) -> Recorded:
        """Return the rollouts of step 1, 2, ...; after the last one the recording begins again."""
        shard = self.shards[(step - 1) % len(self.shards)]
        path = self.folder / shard["file"]
        try:
            found = unpack(load(path.read_bytes()), width=self.width)
        except (
            OSError,
            SafetensorError,
            KeyError,
            AssertionError,
            ValueError,
            IndexError,
        ) as error:
            raise DataError(
                f"{path}: cannot be read ({error}); write it again with launch/record.py"
            ) from error
        return found if self.places else dataclasses.replace(found, support=None)

    def describe(self) -> str:
        """Return one line for the start of a run."""
        steps = self.header["config"]["steps"]
        complete = "" if len(self.shards) == steps else f" (of {steps}: not complete)"
        return (
            f"replay: {len(self.shards)} steps{complete}, {self.tokens:,} response tokens from "
            f"{self.folder}; nothing is sampled, and the teacher's weights are not read"
        )


def open_replay(
    config: ConfigDict, tokenizer: Tokenizer, teacher_tokenizer: Tokenizer | None, *, places: int
) -> Replay:
    """Open the recording `replay.path` and check everything about it but the student's weights.

    `places`: ids of the support that the loss reads, 0 for none. Raises DataError or ConfigError, one line:
    a folder without a manifest, a file that is missing, cut short or changed, another tokenizer, or fields
    with other values than the recording's.
    """
    folder = pathlib.Path(config.replay.path)
    found = _manifest(folder)
    shards = found.pop("shards")
    if not shards:
        raise DataError(f"{folder}: no step is recorded yet; run launch/record.py to its end")
    _check_shards(folder, shards)
    own = {"tokenizer": tokenizer} | (
        {"teacher_tokenizer": teacher_tokenizer} if teacher_tokenizer else {}
    )
    if teacher_tokenizer and "teacher_tokenizer" not in found["sha256"]:
        raise ConfigError(
            f"replay.path={folder} was recorded without a teacher, and this loss reads its log-probs; record "
            "again with this config"
        )
    for name, one in own.items():
        if found["sha256"].get(name) != vocabulary_of(one):
            role = "student" if name == "tokenizer" else "teacher"
            raise ConfigError(
                f"replay.path={folder} was recorded with another tokenizer than that of {config[role].path}; "
                f"set --config.{role}.path to the {role} of the recording, or record again"
            )
    flat = json.loads(json.dumps(configuration.flatten(config.to_dict())))
    differing = [name for name in FIXED if found["config"].get(name) != flat[name]]
    if differing:
        name = differing[0]
        raise ConfigError(
            f"{name}={flat[name]}, but replay.path={folder} was recorded with {found['config'].get(name)}; "
            f"set --config.{name}={found['config'].get(name)}, or record again"
        )
    if places and places != found["top_k"]:
        raise ConfigError(
            f"loss.top_k={places} with loss.support=teacher, but replay.path={folder} was recorded with "
            f"{found['top_k'] or 'no'} ids of the teacher; set --config.loss.top_k={found['top_k']}, or "
            "record again with this config"
        )
    width = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    return Replay(folder, found, shards, width, places)


def check_problems(replay: Replay, problems: Sequence[Problem], field: str) -> None:
    """Raise DataError where the recorded problems are not those of the data, in the same places."""
    for shard in replay.shards:
        for place, name in zip(shard["places"], shard["ids"], strict=True):
            found = problems[place].id if place < len(problems) else "none"
            if found != name:
                raise DataError(
                    f"{field}: problem {place} is {found}, but replay.path={replay.folder} was recorded "
                    f"with {name} there; name the same file, with the same data.bad_rows and token budgets"
                )


def check_rewards(replay: Replay) -> None:
    """Raise ConfigError where no rollout of the first step has a verdict or a reward."""
    recorded = replay.read(1)
    if recorded.rewards is None and all(grade is None for grade in recorded.grades):
        raise ConfigError(
            f"replay.path={replay.folder} was recorded without a reward and from problems without answers, "
            "and this loss needs the reward of each rollout; record again with this config"
        )


def student_fault(replay: Replay, path: str) -> str:
    """Return "" where the folder `path` holds the recorded student, else one line."""
    if replay.header["sha256"]["student"] == fingerprint(path):
        return ""
    return (
        f"student.path={path} is not the student that {replay.folder} was recorded with; set "
        "--config.student.path to that one, record again, or train off-policy from the first step on: "
        "--config.replay.other_student=True --config.loss.importance_cap=2"
    )


def _manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Return the manifest of a recording. Raises DataError where there is none that can be used."""
    file = folder / MANIFEST
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise DataError(
                f"{file}: format {found['format']}, wanted {FORMAT}; record again with launch/record.py"
            )
        wanted = {"sha256": dict, "config": dict, "shards": list, "top_k": int}
        if not all(isinstance(found[name], kind) for name, kind in wanted.items()):
            raise TypeError("a field has the wrong type")
    except FileNotFoundError:
        raise DataError(
            f"{folder} is no recording: it has no {MANIFEST}; write one with launch/record.py --out={folder}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} cannot be read ({error}); record again") from None
    return found


def _check_shards(folder: pathlib.Path, shards: list[dict[str, Any]]) -> None:
    """Raise DataError where a file is missing, has another size, or other contents than were written."""
    for shard in shards:
        path = folder / shard["file"]
        try:
            size = path.stat().st_size
            if size != shard["bytes"]:
                raise DataError(
                    f"{path} has {size:,} bytes, wanted {shard['bytes']:,}: it was cut short or changed; "
                    "copy it again, or record again"
                )
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror or error}); copy it again, or record again"
            ) from None
        if digest != shard["sha256"]:
            raise DataError(f"{path} has other contents than were written; copy it again")
