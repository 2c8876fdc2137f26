"""Cold-start data: solutions that the teacher writes, filtered, as a file that SFT trains on.

2604.13016, Appendix C.1: "After generation, we filter out incomplete responses (e.g., truncated
outputs that do not finish properly) and degenerate repetitive responses." Where a problem has an
answer, solutions that miss it are dropped too.

Batches of problems are sampled with keys of their own and written one by one (sample_file.py), so a
run that was killed goes on where it was, and ends in the same file.
"""

import collections
import dataclasses
import datetime
import hashlib
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from enum import Enum
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
from opd_jax.tools.cold_start import sample_file
from opd_jax.training import roles
from opd_jax.types import Outcome
from opd_jax.workdir import console


class Fate(Enum):
    """What becomes of a solution: the first reason to drop it, in this order, or it is kept."""

    TRUNCATED = "truncated"  # no end token
    EMPTY = "empty"
    WRONG = "wrong"
    UNPARSED = "unparsed"
    TIMEOUT = "timeout"
    REPETITIVE = "repetitive"
    KEPT = "kept"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked config and what follows from it, before weights are loaded.

    Attributes:
      config: as given; teacher and budget resolved.
      teacher, tokenizer, style: of the model that samples.
      problems: that fit; the first `count` are sampled. `sha256` is of these, as they are shown.
      width: tokens of the longest prompt.
      vocabulary: ids that the tokenizer knows. stop_ids: end tokens among them.
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


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch of problems, sampled: `lengths`, `fates` and `grades` speak of one solution each.

    `lengths` count tokens, the end token included; a grade is None where none was asked for.
    `seconds` went by while sampling.
    """

    lengths: list[int]
    fates: list[str]
    grades: list[str | None]
    seconds: float


def run(config: ConfigDict, out: str, *, command: list[str]) -> dict[str, Any]:
    """Sample, filter, and write `out` (.jsonl) and its report, which is returned.

    Goes on where an earlier run of the same config was stopped. Raises an OpdError for whatever the
    user can mend; what is refused is refused before anything is written.
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
    finished = sample_file.finished(file, header)
    if finished is not None and not sample_file.partial_path(file).exists():
        print(f"{file} is finished already", table(finished), sep="\n", flush=True)
        return finished
    unread = models.check_weights(plan.config.teacher.path, plan.teacher)
    print(f"sampling from {plan.config.teacher.path}", *unread, f"data: {plan.problems.describe()}",
          f"problems sampled: {plan.count}", *data.prompt_notes("teacher", plan.tokenizer),
          sep="\n", flush=True)  # fmt: skip
    with sample_file.Partial(file, header) as partial:
        done = [Batch(**found) for found in partial.done]
        _sample_rest(plan, partial, done)
        report = summary(done, plan) | header | {"run": workdir.provenance(command)}
        kept = report["fates"][Fate.KEPT.value]
        partial.finish(report, write=kept > 0)
    if not kept:
        raise DataError(_nothing_kept(file, report))
    print(f"\n{table(report)}\n\nwritten to {file} and {sample_file.report_path(file)}", flush=True)
    return report


def make_plan(config: ConfigDict) -> Plan:
    """Read and check all but the weights. Raises an OpdError; writes and compiles nothing."""
    validate_sampling(config)
    hardware.require_supported(jax.default_backend())
    config = roles.resolved(config, ["teacher"])
    if not config.teacher.path:
        raise ConfigError(
            "teacher.path='', wanted the model that samples; set --config.teacher.path=DIR, or take "
            "a config that has a teacher, such as configs/opd.py"
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
            f"{config.teacher.path}: no eos_token_id that its tokenizer knows in config.json or "
            "generation_config.json, wanted at least one end token; add it to generation_config.json"
        )
    student_style, style = roles.prompt_styles(config.data)
    problems = data.open_problems(
        config.data.train, field="data.train", columns=config.data.columns, size=config.data.size,
        need_solution="{solution}" in style.template, need_answer="{answer}" in style.template,
        bad_rows=config.data.bad_rows,
    )  # fmt: skip
    limit = config.rollout.max_prompt_tokens

    def misfit(ids: list[int]) -> length_filter.Misfit | None:
        tokens, rows = len(ids), {"teacher": teacher.vocab_size}
        if style == student_style or tokens < 1:
            found = length_filter.prompt_misfit(tokens, limit)
        else:  # not the prompt that `limit` is for
            found = length_filter.teacher_misfit(tokens, teacher.max_position, budget)
        return found or length_filter.unknown_id(ids, tokenizer, what="prompt", rows=rows)

    problems, width = _that_fit(problems, style, tokenizer, config, misfit)
    room = teacher.max_position - budget
    if width > room:
        raise ConfigError(
            f"prompts of {width} tokens and sample.max_response_tokens={budget} are more than the "
            f"teacher's {teacher.max_position} positions; set --config.sample.max_response_tokens="
            f"{max(room + budget - width, 1)} or less, or stretch the model: "
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
    """Sample, grade and filter batch `number` of the problems; returns it and the rows to write."""
    section = plan.config.sample
    first = number * section.batch
    problems = plan.problems[first : min(first + section.batch, plan.count)]
    each = plan.style.prompts(problems, plan.tokenizer)
    prompts = [prompt for prompt in each for _ in range(section.samples)]
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
        batching=Batching(slots=section.slots or None, max_prompt_tokens=plan.width),
    )
    seconds = time.perf_counter() - began
    cut = (sampled.outcome_B != Outcome.EOS).tolist()  # also what was stopped on repetition
    golds = [problem.answer for problem in problems for _ in range(section.samples)]
    read = read_responses(
        sampled.responses(),
        ["" if c else gold for gold, c in zip(golds, cut, strict=True)],
        plan.tokenizer,
        grader=grader,
        repetition=metrics.make_repetition_rule(plan.config.metrics),
    )
    # An empty text has no grade: it is counted as empty, not as unparsed.
    grades = [g if t.strip() else None for g, t in zip(read.grades, read.texts, strict=True)]
    fates = [
        fate(text, truncated=cut[i], grade=grades[i], repetitive=repetitive, section=section)
        for i, (text, repetitive) in enumerate(zip(read.texts, read.flagged_B, strict=True))
    ]
    batch = Batch(
        lengths=sampled.response_length_B.tolist(),
        fates=[found.value for found in fates],
        grades=[given and given.value for given in grades],
        seconds=seconds,
    )
    rows = [
        row(
            problems[i // section.samples],
            data.response_text(plan.tokenizer, sampled.prompt(i), sampled.response(i)),
            i % section.samples,
            section.samples,
        )
        for i, found in enumerate(fates)
        if found is Fate.KEPT
    ]
    return batch, rows


def fate(
    text: str, *, truncated: bool, grade: Grade | None, repetitive: bool, section: Any
) -> Fate:
    """What becomes of one solution. `section` is the config section sample."""
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
    """A row of the file, as data.open_problems reads it; one of several `samples` has a `#number`."""
    name = problem.id if samples == 1 else f"{problem.id}#{number}"
    return dataclasses.replace(problem, id=name, solution=solution).row()


def summary(batches: Sequence[Batch], plan: Plan) -> dict[str, Any]:
    """The counts, lengths and speed of a report."""
    fates = [name for batch in batches for name in batch.fates]
    grades = [name for batch in batches for name in batch.grades]
    lengths = [length for batch in batches for length in batch.lengths]
    kept = [n for n, name in zip(lengths, fates, strict=True) if name == Fate.KEPT.value]
    counted = collections.Counter(fates)
    graded = collections.Counter(grades)
    samples = plan.config.sample.samples
    each = [fates[i : i + samples] for i in range(0, len(fates), samples)]
    finished = len(fates) - counted[Fate.TRUNCATED.value] - counted[Fate.EMPTY.value]
    seconds = sum(batch.seconds for batch in batches)
    return {
        "problems": len(each),
        "problems_with_a_solution": sum(Fate.KEPT.value in names for names in each),
        "rows_left_out": plan.problems.skipped,
        "solutions": len(fates),
        "fates": {name.value: counted[name.value] for name in Fate},
        "grades": {name.value: graded[name.value] for name in Grade}
        | {"ungraded": finished - sum(graded[name.value] for name in Grade)},
        "tokens": {"all": _lengths(lengths), "kept": _lengths(kept)},
        "seconds": round(seconds, 3),
        "tokens_per_s": round(sum(lengths) / max(seconds, 1e-9), 1),
    }


def table(report: dict[str, Any]) -> str:
    """What a person sees at the end: what became of the solutions, how long they are."""
    total = report["solutions"]
    lines = [f"{'':20}{'solutions':>10}{'share':>8}{'mean length':>13}"]
    lines.append(f"{'sampled':20}{total:>10,}{1:>8.1%}{report['tokens']['all']['mean']:>13.1f}")
    for name, count in report["fates"].items():
        if name != Fate.KEPT.value and count:
            lines.append(f"{'  - ' + name:20}{count:>10,}{count / total:>8.1%}")
    kept = report["fates"][Fate.KEPT.value]
    lines.append(
        f"{'kept':20}{kept:>10,}{kept / total:>8.1%}{report['tokens']['kept']['mean']:>13.1f}"
    )
    for name in ("WRONG", "UNPARSED", "TIMEOUT"):
        if count := report["grades"][name] - report["fates"][name.lower()]:
            lines.append(f"{count:,} {name.lower()} solutions are not dropped (keep_wrong)")
    if count := report["grades"]["ungraded"]:
        lines.append(f"{count:,} solutions are ungraded: their problems have no answer")
    lines.append(
        f"{report['problems_with_a_solution']:,} of {report['problems']:,} problems have a solution; "
        f"{report['tokens_per_s']:,.0f} tokens/s"
    )
    return "\n".join(lines)


def _that_fit(
    problems: data.Problems,
    style: data.PromptStyle,
    tokenizer: data.Tokenizer,
    config: ConfigDict,
    misfit: Callable[[list[int]], length_filter.Misfit | None],
) -> tuple[data.Problems, int]:
    """The problems in whose prompts `misfit` finds nothing wrong, and the size of the longest prompt."""
    longest = 1

    def misfits(block: list[data.Problem]) -> list[length_filter.Misfit | None]:
        nonlocal longest
        prompts = style.prompts(block, tokenizer)
        found = [misfit(ids) for ids in prompts]
        good = [len(ids) for ids, why in zip(prompts, found, strict=True) if why is None]
        longest = max([longest, *good])
        return found

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
    """Of the problems to sample, as the model is shown them: a changed file is another run."""
    digest = hashlib.sha256()
    for i in range(count):
        problem = problems[i]
        text, system, history = style.turns(problem)
        prompt = tokenizer.render(text, system=system, history=history)
        shown = [problem.id, prompt, problem.answer]
        digest.update(json.dumps(shown).encode())
    return digest.hexdigest()


def _sample_rest(plan: Plan, partial: sample_file.Partial, done: list[Batch]) -> None:
    """Sample the batches that are not in `done`, and add each to it and to the partial file."""
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
            line = _progress(plan, done, first, time.perf_counter() - began)
            progress.show(line, always=number in (first, total - 1))


def _progress(plan: Plan, done: list[Batch], first: int, elapsed: float) -> str:
    """`problems 128/1000  kept 92%  1,234 tok/s  0:03:20 left`; rates are of this process."""
    size = plan.config.sample.batch
    problems = min(len(done) * size, plan.count)
    fates = [name for batch in done for name in batch.fates]
    new = done[first:]
    rate = sum(sum(batch.lengths) for batch in new) / sum(batch.seconds for batch in new)
    left = elapsed / (problems - first * size) * (plan.count - problems)
    return (
        f"problems {problems:,}/{plan.count:,}  kept {fates.count(Fate.KEPT.value) / len(fates):.0%}"
        f"  {rate:,.0f} tok/s  {datetime.timedelta(seconds=int(left))} left"
    )


def _nothing_kept(file: pathlib.Path, report: dict[str, Any]) -> str:
    dropped = {name: n for name, n in report["fates"].items() if n}
    advice = {
        "truncated": "raise --config.sample.max_response_tokens",
        "empty": "see whether the teacher's chat template is the right one",
        "repetitive": "look at the solutions: --config.sample.keep_repetitive=true",
    }.get(max(dropped, key=dropped.__getitem__), "look at them: --config.sample.keep_wrong=true")
    counts = ", ".join(f"{name} {n}" for name, n in dropped.items())
    return (
        f"none of {report['solutions']} solutions can be kept ({counts}), wanted at least one; "
        f"{file} was not written, {sample_file.report_path(file)} was; {advice}"
    )


def _lengths(lengths: list[int]) -> dict[str, float]:
    if not lengths:
        return {"sum": 0, "mean": 0.0, "median": 0.0, "max": 0}
    return {
        "sum": sum(lengths),
        "mean": round(statistics.fmean(lengths), 2),
        "median": statistics.median(lengths),
        "max": max(lengths),
    }
