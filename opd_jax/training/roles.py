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
    """Return a copy of the config in which the models of `roles` are local folders.

    A teacher that is the student gets the student's path, and the student's positions and chat template
    where it sets none.
    """
    config = config.copy_and_resolve_references()
    itself = config.teacher.path == "student"
    for role in ("student", "teacher", "reference"):
        section = config[role]
        if role in roles and section.path and section.path != "student":
            section.path = models.locate(section.path)
        if os.path.isdir(section.path):
            section.path = os.path.abspath(section.path)  # a resume may start in another directory
    if itself and "teacher" in roles:
        config.teacher.path = os.path.abspath(models.locate(config.student.path))
        for field in ("rope_theta", "max_position", "chat_template"):
            config.teacher[field] = config.teacher[field] or config.student[field]
    return config


def with_ends(model: models.ModelConfig, tokenizer: data.Tokenizer) -> models.ModelConfig:
    """Return the model with its chat template's end of turn added to its end tokens."""
    ends = dict.fromkeys([*model.eos_token_ids, tokenizer.end_of_turn()])
    known = tuple(i for i in ends if i is not None and i < model.vocab_size)
    return dataclasses.replace(model, eos_token_ids=known)


def reference_end_ids(
    reference: models.ModelConfig, path: str, tokenizer: data.Tokenizer
) -> tuple[int, ...]:
    """Return the end tokens of a reference with its own folder, which reads the student's ids.

    Raises ModelError where its tokenizer maps one of the ids to another text.
    """
    if not os.path.isfile(os.path.join(path, "tokenizer.json")):
        return with_ends(reference, tokenizer).eos_token_ids
    reference_tokenizer = data.Tokenizer(path)
    student_text, reference_text = (
        {i: text for text, i in x.vocabulary().items()} for x in (tokenizer, reference_tokenizer)
    )
    shared = sorted(student_text.keys() & reference_text.keys())
    differing = [i for i in shared if student_text[i] != reference_text[i]]
    if differing:
        i = differing[0]
        raise ModelError(
            f"{path}: id {i} is {reference_text[i]!r} to the reference and {student_text[i]!r} to the "
            "student, but the two must share a tokenizer; set --config.reference.path to a model with "
            "the student's"
        )
    return with_ends(reference, reference_tokenizer).eos_token_ids


def same_prompts(student: data.Tokenizer, teacher: data.Tokenizer) -> bool:
    """Return whether both templates render the same turns to the same ids, or refuse the same turns."""

    def ids(tokenizer: data.Tokenizer, **turns: Any) -> list[int] | None:
        try:
            return tokenizer.chat("?", **turns)
        # A template without system turns: such a prompt is refused when it occurs.
        except ModelError:
            return None

    earlier = (("user", "?"), ("assistant", "?"))
    every: list[dict[str, Any]] = [{}, {"system": "?"}, {"history": earlier}]
    return all(ids(student, **turns) == ids(teacher, **turns) for turns in every)


def compute_dtype(name: str) -> jnp.dtype:
    """Return the dtype of a role's field `dtype` on this machine."""
    return jnp.dtype(hardware.dtype_name(name, gpu=jax.default_backend() == "gpu"))


def ask_for_full_products(names: Sequence[str]) -> list[str]:
    """Let JAX multiply float32 numbers exactly where a model computes in float32 on a GPU.

    `names`: fields `dtype` of the roles that a run has. Returns the line about it for the start of the run.
    """
    dtypes = [compute_dtype(name).name for name in names]
    wanted = hardware.matmul_precision(
        dtypes, gpu=jax.default_backend() == "gpu",
        current=jax.config.values["jax_default_matmul_precision"],
    )  # fmt: skip
    if wanted is None:
        return []
    jax.config.update("jax_default_matmul_precision", wanted)
    return [
        "note: a model computes in float32, so every product of float32 numbers has full precision instead "
        "of TF32, which takes several times as long; JAX_DEFAULT_MATMUL_PRECISION=tensorfloat32 undoes that"
    ]


def architecture(section: Any) -> models.ModelConfig:
    """Load a role's architecture, positions as configured; `section` is student, teacher or reference."""
    return models.load_config(
        section.path, rope_theta=section.rope_theta, max_position=section.max_position
    )


def open_model(section: Any, date: str) -> tuple[models.ModelConfig, data.Tokenizer]:
    """Load a role's architecture (its template's end of turn is an end token) and its tokenizer.

    `date` is the day that its template prints, "" for today.
    """
    model = architecture(section)
    tokenizer = data.Tokenizer(
        section.path, chat_template=section.chat_template,
        enable_thinking=section.enable_thinking, date=date,
    )  # fmt: skip
    return with_ends(model, tokenizer), tokenizer


def prompt_styles(section: Any) -> tuple[data.PromptStyle, data.PromptStyle]:
    """Return the student's and the teacher's prompt templates."""
    student = data.PromptStyle(section.prompt_template, section.system_prompt)
    own = {"template": section.teacher_prompt_template, "system": section.teacher_system_prompt}
    changed = {name: text for name, text in own.items() if text != "same"}
    return student, dataclasses.replace(student, **changed)


def harness_style(config: ConfigDict) -> data.PromptStyle | None:
    """Return the template of the prompt to which the student writes for the teacher; None without one."""
    section = config.harness
    if not section.prompt:
        return None
    system = section.system_prompt
    return data.PromptStyle(
        section.prompt, config.data.system_prompt if system == "same" else system
    )


def golden_end(model: models.ModelConfig, tokenizer: data.Tokenizer, path: str) -> int:
    """Return the token that ends golden solutions: the template's end of turn where that stops a rollout."""
    known = [i for i in model.eos_token_ids if i < tokenizer.size]
    if not known:
        raise ModelError(
            f"{path}: the model has no end token: no eos_token_id in config.json or "
            "generation_config.json, and no chat template that closes a turn; add eos_token_id to "
            "generation_config.json"
        )
    end = tokenizer.end_of_turn()
    return end if end in known and end is not None else known[0]
