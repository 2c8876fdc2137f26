"""The problems of a run: those that fit their token budgets, and those that are held out."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from opd_jax import data
from opd_jax.data.length_filter import (
    Misfit,
    golden_misfit,
    harness_misfit,
    prompt_misfit,
    teacher_misfit,
    unknown_id,
    unread_misfit,
    without_misfits,
)
from opd_jax.errors import ConfigError
from opd_jax.sharding import multihost
from opd_jax.training import horizon
from opd_jax.training.other_teachers import names_of, teacher_of
from opd_jax.training.rewards import column_value
from opd_jax.training.setup import Setup

_GENERATED_CHECKED = 2048  # of generated problems: their prompts are all alike


def with_data(setup: Setup, train: data.Problems, benchmark: data.Problems | None) -> Setup:
    """Return the setup with the problems that fit, `steps` resolved, and the held-out prompts."""
    config = setup.config
    train, longest = _fitting(setup, train, "data.train", golden=setup.terms.needs_golden)
    train, jump_problems = _held_for_jumps(config, train)
    notes = [*setup.notes, f"data: {train.describe()}"]
    held_out: list[data.Problem] = []
    if benchmark is not None:
        benchmark, longest_held_out = _fitting(setup, benchmark, "eval.data", golden=False)
        longest = max(longest, longest_held_out)
        held_out = benchmark[: config.eval.problems or None]
        notes.append(f"held out: {benchmark.describe()}; the first {len(held_out)} are measured")
    if config.data.epochs:
        config.steps = max(
            round(config.data.epochs * len(train) / config.rollout.prompts_per_step), 1
        )
        notes.append(
            f"steps: {config.steps}, that is data.epochs={config.data.epochs:g} of "
            f"{len(train)} problems, {config.rollout.prompts_per_step} a step"
        )
    notes += horizon.describe(horizon.make_rules(config), config.steps)
    if not setup.tokenizer.has_template:
        notes.append("prompts: plain text, because the student's tokenizer has no chat template")
    return dataclasses.replace(
        setup,
        train=train,
        held_out=held_out,
        prompts=setup.student_style.prompts(held_out, setup.tokenizer),
        teacher_prompts=setup.teacher_style.prompts(held_out, setup.teacher_tokenizer),
        jump_problems=jump_problems,
        jump_prompts=setup.student_style.prompts(jump_problems, setup.tokenizer),
        teacher_width=longest + setup.harness_room + setup.teacher_response,
        notes=notes,
    )


def _held_for_jumps(
    config: ConfigDict, train: data.Problems
) -> tuple[data.Problems, list[data.Problem]]:
    """Return the problems to train on and `jump.problems` others, drawn from the seed."""
    count = config.jump.problems
    if not count:
        return train, []
    if multihost.several():
        raise ConfigError(
            f"jump.problems={count} in a run of several processes, wanted one process: snapshots of weights "
            "that are divided over processes are not built; set --config.jump.problems=0"
        )
    if count >= len(train):
        raise ConfigError(
            f"jump.problems={count} leaves none of the {len(train)} problems of data.train; set "
            f"--config.jump.problems={max(len(train) // 10, 1)} or name a larger file"
        )
    indices = np.random.default_rng(config.seed).choice(len(train), count, replace=False)
    held = [train[int(index)] for index in indices]
    return train.without({"held for jumps": indices.tolist()}), held


def _fitting(
    setup: Setup, problems: data.Problems, field: str, *, golden: bool
) -> tuple[data.Problems, int]:
    """Return the problems that fit their token budgets, and the length of the teacher's longest prompt.

    The budgets are those of prompts and, with `golden`, of golden solutions. Raises DataError at the first
    problem that exceeds one, unless data.bad_rows = "skip".
    """
    styles = (setup.student_style, setup.teacher_style)
    shows_solution = any("{solution}" in style.template for style in styles)
    if (
        problems.generated
        and setup.others
        and setup.config.teachers.column
        and field == "data.train"
    ):
        raise ConfigError(
            f"teachers.column={setup.config.teachers.column} with data.train={problems.name}, whose problems "
            "have no columns; name a file: --config.data.train=FILE"
        )
    alike = problems.generated and not shows_solution and not golden
    count = min(len(problems), _GENERATED_CHECKED) if alike else len(problems)
    longest = setup.config.rollout.max_prompt_tokens
    rewarded = setup.config.reward.column if field == "data.train" else ""
    routed = setup.config.teachers.column if field == "data.train" and setup.others else ""
    unread = _unread_tokens(setup) if golden and setup.terms.golden_divergence else {}

    def misfits(block: list[data.Problem]) -> list[Misfit | None]:
        nonlocal longest
        texts = setup.student_style.texts(block, setup.tokenizer)
        prompts = setup.tokenizer.prompt_ids(texts)
        teacher_prompts: list[list[int]] = [[]] * len(block)
        if setup.separate_prompts:
            teacher_prompts = setup.teacher_style.prompts(block, setup.teacher_tokenizer)
        reasons = [_misfit(setup, *ids) for ids in zip(prompts, teacher_prompts, strict=True)]
        if setup.harness_style is not None and field == "data.train":
            written = setup.harness_style.prompts(block, setup.tokenizer)
            most = setup.config.harness.max_prompt_tokens
            reasons = [
                reason or harness_misfit(len(ids), most)
                for reason, ids in zip(reasons, written, strict=True)
            ]
        if rewarded:
            reasons = [
                reason or _reward_misfit(problem, rewarded)
                for reason, problem in zip(reasons, block, strict=True)
            ]
        if routed:
            reasons = [
                reason or _teacher_misfit(problem, routed, names_of(setup.config))
                for reason, problem in zip(reasons, block, strict=True)
            ]
        if golden:
            rollout = setup.config.rollout
            reasons = [
                reason
                or golden_misfit(
                    block[i], texts[i], len(prompts[i]), setup.student_style, setup.tokenizer,
                    rows=setup.student.vocab_size, width=setup.width,
                    response=rollout.max_response_tokens,
                )
                for i, reason in enumerate(reasons)
            ]  # fmt: skip
            if setup.terms.golden_divergence:
                reasons = [
                    reason or _unread(setup, problem, unread)
                    for problem, reason in zip(block, reasons, strict=True)
                ]
        pairs = zip(teacher_prompts, reasons, strict=True)
        longest = max([longest, *(len(ids) for ids, reason in pairs if reason is None)])
        return reasons

    skip = setup.config.data.bad_rows == "skip"
    return without_misfits(problems, misfits, field=field, count=count, skip=skip), longest


def _reward_misfit(problem: data.Problem, column: str) -> Misfit | None:
    """Return why the column of the reward cannot be used for a problem, or None."""
    value = column_value(problem, column)
    return ("no reward", value) if isinstance(value, str) else None


def _teacher_misfit(problem: data.Problem, column: str, names: tuple[str, ...]) -> Misfit | None:
    """Return why a problem has no teacher, or None."""
    value = teacher_of(problem, column, names)
    return ("no teacher", value) if isinstance(value, str) else None


def _unread_tokens(setup: Setup) -> dict[int, str]:
    """Return the text of each id that means something else to the teacher; rollouts never hold them."""
    ids = np.flatnonzero(~setup.alignment.drawn).tolist()
    texts = {i: setup.tokenizer.decode([i], special=True) for i in ids}
    # A piece of a character has no text of its own: it may be in any solution.
    return {i: "" if "\ufffd" in text else text for i, text in texts.items()}


def _unread(setup: Setup, problem: data.Problem, unread: dict[int, str]) -> Misfit | None:
    """Return why the teacher cannot read a golden solution as the student does, or None."""
    return unread_misfit(
        problem,
        lambda: setup.student_style.golden([problem], setup.tokenizer)[0],
        unread=unread,
        response=setup.config.rollout.max_response_tokens if setup.separate_prompts else None,
    )


def _misfit(setup: Setup, prompt: list[int], teacher_prompt: list[int]) -> Misfit | None:
    """Return why a problem does not fit, or None; `teacher_prompt` is empty where it is the student's."""
    rollout = setup.config.rollout
    if misfit := prompt_misfit(len(prompt), rollout.max_prompt_tokens):
        return misfit
    readers = {"student": setup.student.vocab_size}
    if setup.terms.needs_reference:
        readers["reference"] = setup.reference.vocab_size
    if setup.teacher is not None:
        teachers = (setup.teacher, *(other.model for other in setup.others))
        rows = {"teacher": min(teacher.vocab_size for teacher in teachers)}
        positions = min(teacher.max_position for teacher in teachers)
        room = setup.harness_room
        misfit = teacher_misfit(len(teacher_prompt) + room, positions, setup.teacher_response)
        if misfit and room:
            misfit = misfit[0], f"{misfit[1]}, or a smaller --config.harness.max_tokens"
        if misfit and setup.reader is not None:
            misfit = misfit[0], misfit[1] + ", or a smaller --config.scoring.span_room"
        misfit = misfit or unknown_id(
            teacher_prompt, setup.teacher_tokenizer, what="teacher's prompt", rows=rows
        )
        if misfit:
            return misfit
        readers |= {} if setup.separate_prompts else rows
    return unknown_id(prompt, setup.tokenizer, what="prompt", rows=readers)
