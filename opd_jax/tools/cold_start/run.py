"""Sample solutions from the teacher and filter them, as cold-start data for SFT.

2604.13016, Appendix C.1: "After generation, we filter out incomplete responses (e.g., truncated
outputs that do not finish properly) and degenerate repetitive responses." Where a problem has an
answer, incorrect solutions are dropped too.

Each batch of problems has its own random key and is saved when it is complete (sample_file.py), so a run
that was killed resumes at the next batch and produces the same file.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from opd_jax import config as configuration
from opd_jax import data, hardware, metrics, models, workdir
from opd_jax.config.validate import validate_sampling
from opd_jax.data import length_filter
from opd_jax.errors import ConfigError, DataError, ModelError
from opd_jax.grading.grader import Grade, Grader, make_grader
from opd_jax.rng import Stream, key_for
from opd_jax.rollout import Batching, SamplingParams, read_responses, row_keys, sample_responses
from opd_jax.tools.cold_start import report, sample_file
from opd_jax.tools.cold_start.report import Batch, Fate, table
from opd_jax.training import roles
from opd_jax.types import Outcome
from opd_jax.workdir import console


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


def run(config: ConfigDict, out: str, *, command: list[str]) -> dict[str, Any]:
    """Sample and filter solutions; write `out` (.jsonl) and its report, and return the report.

    Resumes an interrupted run of the same config. Raises an OpdError for errors that the user can
    correct; errors in the config, the model or the data are raised before anything is written.
    """
    file = pathlib.Path(out)
    sample_file.check_place(file)
    config = config.copy_and_resolve_references()
    config.data.date = config.data.date or sample_file.date_of(file)
    plan = make_plan(config)
    header = {
        "config": json.loads(configuration.to_json(configuration.SAMPLING.of(plan.config))),
        "sha256": plan.sha256,
    }
    complete = sample_file.finished(file, header)
    if complete is not None and not sample_file.partial_path(file).exists():
        print(f"{file} is complete already", table(complete), sep="\n", flush=True)
        return complete
    unread = models.check_weights(plan.config.teacher.path, plan.teacher)
    print(f"sampling from {plan.config.teacher.path}", *unread, f"data: {plan.problems.describe()}",
          f"problems sampled: {plan.count}", *data.prompt_notes("teacher", plan.tokenizer),
          sep="\n", flush=True)  # fmt: skip
    with sample_file.Partial(file, header) as partial:
        done = [Batch(**fields) for fields in partial.done]
        _sample_rest(plan, partial, done)
        counts = report.summary(
            done, samples=plan.config.sample.samples, skipped=plan.problems.skipped
        )
        full = counts | header | {"run": workdir.provenance(command)}
        kept = full["fates"][Fate.KEPT.value]
        partial.finish(full, write=kept > 0)
    if not kept:
        raise DataError(report.nothing_kept(file, full))
    print(f"\n{table(full)}\n\nwritten to {file} and {sample_file.report_path(file)}", flush=True)
    return full


def make_plan(config: ConfigDict) -> Plan:
    """Read and check everything except the weights. Writes and compiles nothing. Raises an OpdError."""
    validate_sampling(config)
    hardware.require_supported(jax.default_backend())
    roles.ask_for_full_products([config.teacher.dtype])
    config = roles.resolved(config, ["teacher"])
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
    problems = data.open_problems(
        config.data.train, field="data.train", columns=config.data.columns, size=config.data.size,
        need_solution="{solution}" in style.template, need_answer="{answer}" in style.template,
        bad_rows=config.data.bad_rows, shown=style.columns,
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
    room = teacher.max_position - budget
    if width > room:
        raise ConfigError(
            f"prompts of {width} tokens and sample.max_response_tokens={budget} exceed the teacher's "
            f"{teacher.max_position} positions; set --config.sample.max_response_tokens="
            f"{max(room + budget - width, 1)} or less, or extend the context: "
            f"--config.teacher.max_position={width + budget}"
        )
    count = min(config.sample.problems or len(problems), len(problems))
    return Plan(
        config, teacher, tokenizer, style, problems, count,
        _sha256(problems, count, style, tokenizer), width, vocabulary, stop_ids,
    )  # fmt: skip


def sample_batch(
    plan: Plan, number: int, params: models.Params, grader: Grader
) -> tuple[Batch, list[dict[str, Any]]]:
    """Sample, grade and filter batch `number` of the problems; return its results and the rows to write."""
    section = plan.config.sample
    first = number * section.batch
    problems = plan.problems[first : min(first + section.batch, plan.count)]
    rendered = plan.style.prompts(problems, plan.tokenizer)
    prompts = [prompt for prompt in rendered for _ in range(section.samples)]
    key = key_for(plan.config.seed, number, Stream.SAMPLE)
    began = time.perf_counter()
    sampled = sample_responses(
        models.Model(plan.teacher, params),
        prompts,
        SamplingParams(
            section.max_response_tokens,
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            stop_ids=plan.stop_ids,
            vocabulary=plan.vocabulary,
        ),
        keys=row_keys(key, len(prompts)),
        batching=Batching(
            slots=section.slots or None,
            max_prompt_tokens=plan.width,
            tile=hardware.tile(gpu=jax.default_backend() == "gpu"),
        ),
    )
    seconds = time.perf_counter() - began
    # Rollouts that decoding stopped because of repetition count as truncated too.
    truncated = (sampled.outcome_B != Outcome.EOS).tolist()
    golds = [problem.answer for problem in problems for _ in range(section.samples)]
    read = read_responses(
        sampled.responses(),
        ["" if cut else gold for gold, cut in zip(golds, truncated, strict=True)],
        plan.tokenizer,
        grader=grader,
        repetition=metrics.make_repetition_rule(plan.config.metrics),
    )
    # An empty text has no grade, because it counts as empty and not as unparsed.
    grades = [g if t.strip() else None for g, t in zip(read.grades, read.texts, strict=True)]
    fates = [
        fate(text, truncated=truncated[i], grade=grades[i], repetitive=repetitive, section=section)
        for i, (text, repetitive) in enumerate(zip(read.texts, read.flagged_B, strict=True))
    ]
    batch = Batch(
        lengths=sampled.response_length_B.tolist(),
        fates=[name.value for name in fates],
        grades=[grade and grade.value for grade in grades],
        seconds=seconds,
    )
    rows = [
        row(
            problems[i // section.samples],
            data.response_text(plan.tokenizer, sampled.prompt(i), sampled.response(i)),
            i % section.samples,
            section.samples,
        )
        for i, name in enumerate(fates)
        if name is Fate.KEPT
    ]
    return batch, rows


def fate(
    text: str, *, truncated: bool, grade: Grade | None, repetitive: bool, section: Any
) -> Fate:
    """Return whether a solution is kept, or why it is dropped. `section` is the config section sample."""
    if truncated:
        return Fate.TRUNCATED
    if not text.strip():
        return Fate.EMPTY
    if grade not in (None, Grade.CORRECT) and not section.keep_wrong:
        return Fate[grade.name]
    if not section.keep_repetitive and repetitive:
        return Fate.REPETITIVE
    return Fate.KEPT


def row(problem: data.Problem, solution: str, number: int, samples: int) -> dict[str, Any]:
    """Return a row in the format of data.open_problems; with several `samples` the id has `#number`."""
    name = problem.id if samples == 1 else f"{problem.id}#{number}"
    return dataclasses.replace(problem, id=name, solution=solution).row()


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


def _sample_rest(plan: Plan, partial: sample_file.Partial, done: list[Batch]) -> None:
    """Sample the batches that are not in `done`; append each to it and to the partial file."""
    total = -(-plan.count // plan.config.sample.batch)
    first = len(done)
    progress = console.Progress(total, first)
    if first:
        progress.say(f"resumed: {min(first * plan.config.sample.batch, plan.count)} problems done")
    if first == total:
        return
    dtype = roles.compute_dtype(plan.config.teacher.dtype)
    _, params = models.load(plan.config.teacher.path, dtype=dtype)
    with make_grader(plan.config.grading) as grader:
        began = time.perf_counter()
        for number in range(first, total):
            batch, rows = sample_batch(plan, number, params, grader)
            partial.add(dataclasses.asdict(batch), rows)
            done.append(batch)
            line = report.progress(
                done,
                len(done) - first,
                time.perf_counter() - began,
                size=plan.config.sample.batch,
                count=plan.count,
            )
            progress.show(line, always=number in (first, total - 1))
