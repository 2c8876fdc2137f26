"""The three roles: architecture, tokenizer and dtype of student, teacher and reference."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from opd_jax import data, hardware, models
from opd_jax.errors import ModelError


def resolved(config: ConfigDict, roles: Sequence[str]) -> ConfigDict:
    """A copy in which the models of `roles` are folders.

    A teacher that is the student has the student's path and, where it names none of its own, the
    student's positions and chat template.
    """
    config = config.copy_and_resolve_references()
    itself = config.teacher.path == "student"
    for role in ("student", "teacher", "reference"):
        section = config[role]
        if role in roles and section.path and section.path != "student":
            section.path = models.locate(section.path)
        if os.path.isdir(section.path):
            section.path = os.path.abspath(section.path)  # the run may go on from another directory
    if itself and "teacher" in roles:
        config.teacher.path = os.path.abspath(models.locate(config.student.path))
        for field in ("rope_theta", "max_position", "chat_template"):
            config.teacher[field] = config.teacher[field] or config.student[field]
    return config


def with_ends(model: models.ModelConfig, tokenizer: data.Tokenizer) -> models.ModelConfig:
    """The model with the end of turn of its chat template among its end tokens."""
    ends = dict.fromkeys([*model.eos_token_ids, tokenizer.end_of_turn()])
    known = tuple(i for i in ends if i is not None and i < model.vocab_size)
    return dataclasses.replace(model, eos_token_ids=known)


def _reference_ends(
    reference: models.ModelConfig, path: str, tokenizer: data.Tokenizer
) -> tuple[int, ...]:
    """End tokens of a reference with a folder of its own, which reads the student's ids.

    Raises ModelError where its tokenizer gives one of them another text.
    """
    if not os.path.isfile(os.path.join(path, "tokenizer.json")):
        return with_ends(reference, tokenizer).eos_token_ids
    own = data.Tokenizer(path)
    mine, theirs = ({i: t for t, i in x.vocabulary().items()} for x in (tokenizer, own))
    differing = [i for i in sorted(mine.keys() & theirs.keys()) if mine[i] != theirs[i]]
    if differing:
        i = differing[0]
        raise ModelError(
            f"{path}: id {i} is {theirs[i]!r} to the reference and {mine[i]!r} to the student, wanted the "
            "student's tokenizer; set --config.reference.path to a model with it"
        )
    return with_ends(reference, own).eos_token_ids


def _same_prompts(student: data.Tokenizer, teacher: data.Tokenizer) -> bool:
    """Whether both templates make the same ids of the same turns, or refuse the same turns."""

    def ids(tokenizer: data.Tokenizer, **turns: Any) -> list[int] | None:
        try:
            return tokenizer.chat("?", **turns)
        except (
            ModelError
        ):  # a template without system turns: such a prompt is refused when it comes
            return None

    earlier = (("user", "?"), ("assistant", "?"))
    every: list[dict[str, Any]] = [{}, {"system": "?"}, {"history": earlier}]
    return all(ids(student, **turns) == ids(teacher, **turns) for turns in every)


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of a role's field `dtype` on this machine."""
    return jnp.dtype(hardware.dtype_name(name, gpu=jax.default_backend() == "gpu"))


def architecture(section: Any) -> models.ModelConfig:
    """A role's architecture, its positions as configured. `section` is student, teacher, reference."""
    return models.load_config(
        section.path, rope_theta=section.rope_theta, max_position=section.max_position
    )


def open_model(section: Any, date: str) -> tuple[models.ModelConfig, data.Tokenizer]:
    """A role's architecture (its template's end of turn among its end tokens) and tokenizer.

    `date` is the day that its template prints, "" for today.
    """
    model = architecture(section)
    tokenizer = data.Tokenizer(
        section.path, chat_template=section.chat_template,
        enable_thinking=section.enable_thinking, date=date,
    )  # fmt: skip
    return with_ends(model, tokenizer), tokenizer


def prompt_styles(section: Any) -> tuple[data.PromptStyle, data.PromptStyle]:
    """The student's and the teacher's way to be shown a problem."""
    student = data.PromptStyle(section.prompt_template, section.system_prompt)
    own = {"template": section.teacher_prompt_template, "system": section.teacher_system_prompt}
    changed = {name: text for name, text in own.items() if text != "same"}
    return student, dataclasses.replace(student, **changed)


def golden_end(model: models.ModelConfig, tokenizer: data.Tokenizer, path: str) -> int:
    """What a golden solution ends with: the template's end of turn where that stops a rollout."""
    known = [i for i in model.eos_token_ids if i < tokenizer.size]
    if not known:
        raise ModelError(
            f"{path}: no eos_token_id in config.json or generation_config.json, and no "
            "chat template that closes a turn, wanted an end token; add it to generation_config.json"
        )
    end = tokenizer.end_of_turn()
    return end if end in known and end is not None else known[0]
