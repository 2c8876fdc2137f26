"""What cold-start sampling is about to do, checked before weights are loaded."""

import dataclasses
import hashlib
import json
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from opd_jax import data, hardware, models
from opd_jax.config.validate import validate_sampling
from opd_jax.data import length_filter
from opd_jax.errors import ConfigError, ModelError
from opd_jax.tools.cold_start import choose
from opd_jax.training import roles


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked config and the values derived from it, before weights are loaded.

    Attributes:
      config: the config, with teacher and token budget resolved.
      teacher, tokenizer, style: model config, tokenizer and prompt style of the teacher.
      problems: problems that fit their token budgets; the first `count` are sampled.
      sha256: digest of these `count` problems, as rendered in prompts.
      width: tokens of the longest prompt.
      vocabulary: number of ids that the tokenizer knows. stop_ids: end tokens among them.
      hint: prompt style that shows the answer, and the tokens of its longest prompt; None without one.
      student: the student for which solutions are chosen; None where all of them stay.
    """

    config: ConfigDict
    teacher: models.ModelConfig
    tokenizer: data.Tokenizer
    style: data.PromptStyle
    problems: data.Problems
    count: int
    sha256: str
    width: int
    vocabulary: int
    stop_ids: tuple[int, ...]
    hint: tuple[data.PromptStyle, int] | None = None
    student: choose.Student | None = None


def make_plan(config: ConfigDict) -> Plan:
    """Read and check everything except the weights. Writes and compiles nothing. Raises an OpdError."""
    validate_sampling(config)
    hardware.require_supported(jax.default_backend())
    used = ["teacher"] + ["student"] * (config.sample.choose != "all")
    roles.ask_for_full_products([config[role].dtype for role in used])
    config = roles.resolved(config, used)
    if not config.teacher.path:
        raise ConfigError(
            "teacher.path='' names no model to sample from; set --config.teacher.path=DIR, or use a "
            "config with a teacher, such as configs/opd.py"
        )
    budget = config.sample.max_response_tokens or config.rollout.max_response_tokens
    config.sample.max_response_tokens = budget
    teacher, tokenizer = roles.open_model(config.teacher, config.data.date)
    if tokenizer.prints_date:
        config.data.date = str(tokenizer.day)
    vocabulary = min(tokenizer.size, teacher.vocab_size)
    stop_ids = tuple(i for i in teacher.eos_token_ids if i < vocabulary)
    if not stop_ids:
        raise ModelError(
            f"{config.teacher.path}: neither config.json nor generation_config.json has an eos_token_id "
            "that the tokenizer knows; add one to generation_config.json"
        )
    student_style, style = roles.prompt_styles(config.data)
    hinted = dataclasses.replace(style, template=config.sample.hint)
    problems = data.open_problems(
        config.data.train, field="data.train", columns=config.data.columns, size=config.data.size,
        need_solution="{solution}" in style.template, need_answer="{answer}" in style.template,
        bad_rows=config.data.bad_rows, shown=tuple(dict.fromkeys(style.columns + hinted.columns)),
    )  # fmt: skip
    limit = config.rollout.max_prompt_tokens

    def misfit(ids: list[int]) -> length_filter.Misfit | None:
        tokens, rows = len(ids), {"teacher": teacher.vocab_size}
        if style == student_style or tokens < 1:
            reason = length_filter.prompt_misfit(tokens, limit)
        else:  # `limit` applies to the student's prompt, which differs
            reason = length_filter.teacher_misfit(tokens, teacher.max_position, budget)
        return reason or length_filter.unknown_id(ids, tokenizer, what="prompt", rows=rows)

    problems, width = _without_misfits(problems, style, tokenizer, config, misfit)
    _require_room("teacher", teacher, width, budget)
    count = min(config.sample.problems or len(problems), len(problems))
    hint = None
    if config.sample.hint:
        hint = hinted, _longest(problems, count, hinted, tokenizer)
        _require_room("teacher", teacher, hint[1], budget)
    return Plan(
        config, teacher, tokenizer, style, problems, count,
        _sha256(problems, count, style, tokenizer), width, vocabulary, stop_ids, hint,
        _student(config, student_style, problems, count) if "student" in used else None,
    )  # fmt: skip


def _student(
    config: ConfigDict, style: data.PromptStyle, problems: data.Problems, count: int
) -> choose.Student:
    """Read the student for which solutions are chosen, without its weights."""
    model, tokenizer = roles.open_model(config.student, config.data.date)
    known = min(tokenizer.size, model.vocab_size)
    if config.sample.choose_top_k > known:
        raise ConfigError(
            f"sample.choose_top_k={config.sample.choose_top_k} is more than the student's {known} ids; set "
            f"--config.sample.choose_top_k={known}"
        )
    width = _longest(problems, count, style, tokenizer)
    _require_room("student", model, width, config.sample.max_response_tokens)
    return choose.Student(
        model, tokenizer, style, roles.golden_end(model, tokenizer, config.student.path),
        tuple(i for i in model.eos_token_ids if i < known), width,
    )  # fmt: skip


def _longest(
    problems: data.Problems, count: int, style: data.PromptStyle, tokenizer: data.Tokenizer
) -> int:
    """Return the tokens of the longest prompt of the first `count` problems."""
    return max(
        len(prompt)
        for start in range(0, count, 1024)
        for prompt in style.prompts(problems[start : min(start + 1024, count)], tokenizer)
    )


def _require_room(role: str, model: models.ModelConfig, width: int, budget: int) -> None:
    """Raise ConfigError where a prompt of `width` tokens and a response exceed the positions."""
    if width + budget > model.max_position:
        raise ConfigError(
            f"prompts of {width} tokens and sample.max_response_tokens={budget} exceed the {role}'s "
            f"{model.max_position} positions; set --config.sample.max_response_tokens="
            f"{max(model.max_position - width, 1)} or less, or extend the context: "
            f"--config.{role}.max_position={width + budget}"
        )


def _without_misfits(
    problems: data.Problems,
    style: data.PromptStyle,
    tokenizer: data.Tokenizer,
    config: ConfigDict,
    misfit: Callable[[list[int]], length_filter.Misfit | None],
) -> tuple[data.Problems, int]:
    """Return the problems whose prompts `misfit` accepts, and the length of the longest prompt."""
    longest = 1

    def misfits(block: list[data.Problem]) -> list[length_filter.Misfit | None]:
        nonlocal longest
        prompts = style.prompts(block, tokenizer)
        reasons = [misfit(ids) for ids in prompts]
        fitting = [len(ids) for ids, why in zip(prompts, reasons, strict=True) if why is None]
        longest = max([longest, *fitting])
        return reasons

    count = len(problems)
    if problems.generated:
        count = min(config.sample.problems or count, count)
    skip = config.data.bad_rows == "skip"
    kept = length_filter.without_misfits(
        problems, misfits, field="data.train", count=count, skip=skip
    )
    return kept, longest


def _sha256(
    problems: data.Problems, count: int, style: data.PromptStyle, tokenizer: data.Tokenizer
) -> str:
    """Return a digest of the problems to sample as rendered in prompts, to detect changed data."""
    digest = hashlib.sha256()
    for i in range(count):
        problem = problems[i]
        text, system, history = style.turns(problem)
        prompt = tokenizer.render(text, system=system, history=history)
        digest.update(json.dumps([problem.id, prompt, problem.answer]).encode())
    return digest.hexdigest()
