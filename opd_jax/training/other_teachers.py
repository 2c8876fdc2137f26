"""Further teachers beside that of teacher.path: opened, and checked to read what the first one reads."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from opd_jax import data, models
from opd_jax.config import teacher_list
from opd_jax.data.columns import reach
from opd_jax.errors import ConfigError, ModelError
from opd_jax.sharding import multihost
from opd_jax.training.roles import open_model, same_prompts


@dataclasses.dataclass(frozen=True)
class OtherTeacher:
    """A further teacher.

    Attributes:
      name: as rows of the data name it.
      path: a local folder.
      model: its architecture.
      head_rows: as in `data.Alignment`, the one field of it in which teachers may differ.
    """

    name: str
    path: str
    model: models.ModelConfig
    head_rows: np.ndarray | None


def names_of(config: ConfigDict) -> tuple[str, ...]:
    """Return the names of all teachers, that of teacher.path first; one teacher has none."""
    others = teacher_list.parse(config.teachers.others)
    return (config.teachers.first, *others) if others else ()


def locate_others(config: ConfigDict) -> None:
    """Replace the paths of further teachers by local folders; `student` is that of student.path."""
    found = {
        name: os.path.abspath(config.student.path if path == "student" else models.locate(path))
        for name, path in teacher_list.parse(config.teachers.others).items()
    }
    config.teachers.others = teacher_list.joined(found)


def open_others(
    config: ConfigDict,
    date: str,
    *,
    student: data.Vocabulary,
    first: data.Vocabulary,
    alignment: data.Alignment,
    reference_ends: Sequence[int],
) -> list[OtherTeacher]:
    """Open the teachers of teachers.others. They read the student's ids and prompts as the first one does.

    `first`, `alignment`: of the teacher of teacher.path; `alignment.ends` has the end of golden solutions.
    Raises ModelError or ConfigError, one line, for one that does not.
    """
    others = teacher_list.parse(config.teachers.others)
    if others and alignment.teacher is not None:
        raise ConfigError(
            f"teachers.others={config.teachers.others} with a teacher.path that has another tokenizer than "
            "the student (docs/spans.md), wanted teachers that share the student's ids; set "
            "--config.teacher.path to such a model, or --config.teachers.others="
        )
    if others and config.teachers.wait == "host" and multihost.several():
        raise ConfigError(
            "teachers.wait=host in a run of several processes, wanted one process: weights that are divided "
            "over processes cannot wait in one; set --config.teachers.wait=device"
        )
    found = []
    for name, path in others.items():
        section = config.teacher.copy_and_resolve_references()
        section.path = path
        model, tokenizer = open_model(section, date)
        vocabulary = data.Vocabulary(tokenizer, model.vocab_size, model.eos_token_ids)
        if not data.share_ids(student, vocabulary):
            raise ModelError(
                f"{path}: the teacher {name!r} has another vocabulary than the student, wanted the same ids "
                "for ordinary tokens; several teachers are not compared by spans of text: correct "
                "--config.teachers.others"
            )
        own = data.align(
            student, vocabulary, special_tokens=config.scoring.special_tokens,
            end=alignment.ends.id if alignment.ends else None, reference_ends=reference_ends,
        )  # fmt: skip
        if what := _difference(alignment, own):
            raise ModelError(
                f"{path}: the teacher {name!r} and that of teacher.path={config.teacher.path} differ in "
                f"{what}, wanted teachers that read the student's ids in one way; correct "
                "--config.teachers.others"
            )
        if not same_prompts(first.tokenizer, tokenizer):
            raise ModelError(
                f"{path}: the chat template of the teacher {name!r} is not that of teacher.path="
                f"{config.teacher.path}, wanted the same prompts for all teachers; set "
                "--config.teacher.chat_template=FILE, which then applies to all of them"
            )
        found.append(OtherTeacher(name, path, model, own.head_rows))
    return found


def describe(config: ConfigDict) -> list[str]:
    """Return lines for the start of a run; none for one teacher."""
    names, section = names_of(config), config.teachers
    if not names:
        return []
    paths = [config.teacher.path, *teacher_list.parse(section.others).values()]
    listed = ", ".join(f"{name} ({path})" for name, path in zip(names, paths, strict=True))
    how = f"each rollout is scored by the one that column {section.column!r} of its row names"
    if not section.column:
        weights = ", ".join(f"{weight:g}" for weight in section.weights)
        how = f"every rollout is scored by all of them, and their log-ratios are mixed by {weights}"
    lines = [f"teachers: {listed}: {how}"]
    if section.wait == "host":
        lines.append("  teachers wait in host memory between their turns")
    return lines


def teacher_of(problem: data.Problem, column: str, names: Sequence[str]) -> int | str:
    """Return the index of the teacher that a problem's row names, or what is wrong with it, as text."""
    value = reach(problem.fields or {}, column)
    if isinstance(value, str) and value.strip() in names:
        return names.index(value.strip())
    shown = f"holds {value!r:.60}" if isinstance(value, str | int) else "is not there, or no text"
    return (
        f"teachers.column={column} {shown}, wanted the name of a teacher ({', '.join(names)}); correct the "
        "row, or add a teacher of this name to --config.teachers.others"
    )


def _difference(first: data.Alignment, other: data.Alignment) -> str:
    """Return in what two teachers read the student's ids differently, "" for nothing."""
    if (first.ends, first.foreign_ends) != (other.ends, other.foreign_ends):
        return "the tokens that end a response"
    if not (
        np.array_equal(first.scored, other.scored) and np.array_equal(first.drawn, other.drawn)
    ):
        return "the ids that they share with the student"
    if not np.array_equal(first.teacher_ids[first.drawn], other.teacher_ids[other.drawn]):
        return "their ids for the student's special tokens"
    return ""
