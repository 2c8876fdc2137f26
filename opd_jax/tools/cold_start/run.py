"""Sample solutions from the teacher and filter them, as cold-start data for SFT.

2604.13016, Appendix C.1: "After generation, we filter out incomplete responses (e.g., truncated
outputs that do not finish properly) and degenerate repetitive responses." Where a problem has an
answer, incorrect solutions are dropped too.

Each batch of problems has its own random key and is saved when it is complete (sample_file.py), so a run
that was killed resumes at the next batch and produces the same file.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from opd_jax import config as configuration
from opd_jax import data, hardware, metrics, models, workdir
from opd_jax.errors import DataError
from opd_jax.grading.grader import Grade, Grader, make_grader
from opd_jax.rng import Stream, key_for
from opd_jax.rollout import Batching, SamplingParams, read_responses, row_keys, sample_responses
from opd_jax.tools.cold_start import choose, report, sample_file
from opd_jax.tools.cold_start.plan import Plan, make_plan
from opd_jax.tools.cold_start.report import Batch, Fate, Tier, table
from opd_jax.training import roles
from opd_jax.types import Outcome
from opd_jax.workdir import console


class Weights(NamedTuple):
    """The loaded models; `student` only where solutions are chosen for it."""

    teacher: models.Params
    student: models.Params | None = None


@dataclasses.dataclass(frozen=True)
class Solutions:
    """Sampled solutions, so many to each problem, adjacent: results of the filter, and texts."""

    lengths: list[int]
    fates: list[Fate]
    grades: list[Grade | None]
    texts: list[str]
    seconds: float


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
    choice = []
    if plan.student is not None:
        choice = [f"chosen by {plan.config.sample.choose} for {plan.config.student.path}"]
        choice += models.check_weights(plan.config.student.path, plan.student.config)
    print(f"sampling from {plan.config.teacher.path}", *unread, *choice, f"data: {plan.problems.describe()}",
          f"problems sampled: {plan.count}", *data.prompt_notes("teacher", plan.tokenizer),
          sep="\n", flush=True)  # fmt: skip
    with sample_file.Partial(file, header) as partial:
        done = [Batch(**fields) for fields in partial.done]
        _sample_rest(plan, partial, done)
        counts = report.summary(
            done, samples=plan.config.sample.samples, skipped=plan.problems.skipped
        )
        full = counts | header | {"run": workdir.provenance(command)}
        kept = full["problems_with_a_solution"] > 0
        partial.finish(full, write=kept)
    if not kept:
        raise DataError(report.nothing_kept(file, full))
    print(f"\n{table(full)}\n\nwritten to {file} and {sample_file.report_path(file)}", flush=True)
    return full


def sample_batch(
    plan: Plan, number: int, params: Weights, grader: Grader
) -> tuple[Batch, list[dict[str, Any]]]:
    """Sample, grade and filter batch `number` of the problems; return its results and the rows to write."""
    section = plan.config.sample
    first = number * section.batch
    problems = plan.problems[first : min(first + section.batch, plan.count)]
    rendered = plan.style.prompts(problems, plan.tokenizer)
    key = key_for(plan.config.seed, number, Stream.SAMPLE)
    found = _solve(
        plan, problems, rendered, params.teacher, grader,
        samples=section.samples, width=plan.width, key=key,
    )  # fmt: skip
    if plan.student is not None:
        return _chosen(plan, number, problems, found, params, grader)
    rows = [
        row(
            problems[i // section.samples],
            found.texts[i],
            i % section.samples,
            section.samples,
        )
        for i, name in enumerate(found.fates)
        if name is Fate.KEPT
    ]
    return _results(found), rows


def _results(found: Solutions) -> Batch:
    return Batch(
        lengths=found.lengths,
        fates=[name.value for name in found.fates],
        grades=[grade and grade.value for grade in found.grades],
        seconds=found.seconds,
    )


def _chosen(
    plan: Plan,
    number: int,
    problems: list[data.Problem],
    found: Solutions,
    params: Weights,
    grader: Grader,
) -> tuple[Batch, list[dict[str, Any]]]:
    """Choose one solution to each problem, after one more try at those without a correct one."""
    section = plan.config.sample
    several = range(section.samples)
    places = [[i * section.samples + j for j in several] for i in range(len(problems))]
    kept = [[n for n in ours if found.fates[n] is Fate.KEPT] for ours in places]
    right = [grade is Grade.CORRECT for grade in found.grades]
    tried = [
        i
        for i, ours in enumerate(kept)
        if plan.hint is not None and problems[i].answer and not any(right[n] for n in ours)
    ]
    hinted, lengths = _second_try(plan, number, problems, tried, params.teacher, grader)
    score = _agreement(plan, number, problems, found, kept, params.student)
    fates, tiers, rows = list(found.fates), list[Tier | None](), list[dict[str, Any]]()
    for i, problem in enumerate(problems):
        best = None
        if kept[i] and i not in hinted:
            best = kept[i][choose.choose([right[n] for n in kept[i]], [score[n] for n in kept[i]])]
        for n in kept[i]:
            fates[n] = Fate.KEPT if n == best else Fate.NOT_CHOSEN
        if best is None and i not in hinted:
            tiers.append(None)
            continue
        if best is None:
            tier, text = Tier.HINTED, hinted[i]
        else:
            tier = Tier.CORRECT if right[best] else Tier.WRONG
            tier, text = tier if problem.answer else Tier.UNGRADED, found.texts[best]
        tiers.append(tier)
        rows.append(row(problem, text, 0, 1) | {"tier": tier.value})
    batch = dataclasses.replace(
        _results(dataclasses.replace(found, fates=fates)),
        tiers=[tier and tier.value for tier in tiers], hinted=lengths,
    )  # fmt: skip
    return batch, rows


def _second_try(
    plan: Plan,
    number: int,
    problems: list[data.Problem],
    tried: list[int],
    teacher: models.Params,
    grader: Grader,
) -> tuple[dict[int, str], list[int]]:
    """Ask once more with the answer in the prompt: {index: text} of correct solutions, and all lengths."""
    if not tried:
        return {}, []
    assert plan.hint is not None
    style, width = plan.hint
    # Padded to a power of two, so that few programs are compiled; the first ones do not change.
    count = 1 << (len(tried) - 1).bit_length()
    asked = [problems[i] for i in (tried + tried[-1:] * count)[:count]]
    found = _solve(
        plan, asked, style.prompts(asked, plan.tokenizer), teacher, grader,
        samples=1, width=width, key=key_for(plan.config.seed, number, Stream.HINT),
    )  # fmt: skip
    hinted = {
        i: text
        for i, text, name, grade in zip(tried, found.texts, found.fates, found.grades, strict=False)
        if name is Fate.KEPT and grade is Grade.CORRECT
    }
    return hinted, found.lengths[: len(tried)]


def _agreement(
    plan: Plan,
    number: int,
    problems: list[data.Problem],
    found: Solutions,
    kept: list[list[int]],
    student: models.Params | None,
) -> list[float]:
    """Return how near each solution is to the student, by sample.choose; only those that are kept matter."""
    section = plan.config.sample
    assert plan.student is not None
    assert student is not None
    stay = {n for ours in kept for n in ours}
    texts = [text if n in stay else "" for n, text in enumerate(found.texts)]
    solutions = [
        texts[i * section.samples : (i + 1) * section.samples] for i in range(len(problems))
    ]
    if section.choose == "likelihood":
        scores = choose.likelihoods(plan.student, student, problems, solutions)
    else:
        scores = choose.overlaps(
            plan.student, student, problems, solutions,
            key=key_for(plan.config.seed, number, Stream.AGREEMENT),
            top_k=section.choose_top_k, budget=section.max_response_tokens,
        )  # fmt: skip
    return [x for ours in scores for x in ours]


def _solve(
    plan: Plan,
    problems: list[data.Problem],
    rendered: list[list[int]],
    teacher: models.Params,
    grader: Grader,
    *,
    samples: int,
    width: int,
    key: jax.Array,
) -> Solutions:
    """Sample, grade and filter `samples` solutions to each problem, whose prompts are `rendered`."""
    section = plan.config.sample
    prompts = [prompt for prompt in rendered for _ in range(samples)]
    began = time.perf_counter()
    sampled = sample_responses(
        models.Model(plan.teacher, teacher),
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
            max_prompt_tokens=width,
            tile=hardware.tile(gpu=jax.default_backend() == "gpu"),
        ),
    )
    seconds = time.perf_counter() - began
    # Rollouts that decoding stopped because of repetition count as truncated too.
    truncated = (sampled.outcome_B != Outcome.EOS).tolist()
    golds = [problem.answer for problem in problems for _ in range(samples)]
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
    texts = [
        data.response_text(plan.tokenizer, sampled.prompt(i), sampled.response(i))
        if name is Fate.KEPT
        else ""
        for i, name in enumerate(fates)
    ]
    return Solutions(sampled.response_length_B.tolist(), fates, grades, texts, seconds)


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
    _, teacher = models.load(plan.config.teacher.path, dtype=dtype)
    params = Weights(teacher)
    if plan.student is not None:
        dtype = roles.compute_dtype(plan.config.student.dtype)
        params = Weights(teacher, models.load(plan.config.student.path, dtype=dtype)[1])
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
