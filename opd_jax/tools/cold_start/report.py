"""The report of cold-start sampling: why solutions were kept or dropped, lengths and speed."""

import collections
import dataclasses
import datetime
import pathlib
import statistics
from collections.abc import Sequence
from enum import Enum
from typing import Any

from opd_jax.grading.grader import Grade
from opd_jax.tools.cold_start import sample_file


class Fate(Enum):
    """Result of the filter for a solution: the first reason to drop it, in this order, or KEPT."""

    TRUNCATED = "truncated"  # no end token
    EMPTY = "empty"
    WRONG = "wrong"
    UNPARSED = "unparsed"
    TIMEOUT = "timeout"
    REPETITIVE = "repetitive"
    NOT_CHOSEN = (
        "not chosen"  # sample.choose: another solution to the problem is nearer to the student
    )
    KEPT = "kept"


class Tier(Enum):
    """How the chosen solution of a problem was found: the tiers of 2605.09725, and one without an answer."""

    CORRECT = "correct"
    HINTED = "correct after the answer was shown"
    WRONG = "wrong"  # the nearest one; only with sample.keep_wrong
    UNGRADED = "ungraded"


@dataclasses.dataclass(frozen=True)
class Batch:
    """Results of one batch of problems.

    Attributes:
      lengths: tokens of each solution, including the end token.
      fates: value of the `Fate` of each solution.
      grades: value of the `Grade` of each solution, None where it was not graded.
      seconds: duration of sampling.
      tiers: with sample.choose, of each problem the value of the `Tier` of its solution; None without one.
      hinted: tokens of each solution to a problem whose prompt showed the answer.
    """

    lengths: list[int]
    fates: list[str]
    grades: list[str | None]
    seconds: float
    tiers: list[str | None] = dataclasses.field(default_factory=list)
    hinted: list[int] = dataclasses.field(default_factory=list)


def summary(batches: Sequence[Batch], *, samples: int, skipped: dict[str, int]) -> dict[str, Any]:
    """Return the counts, lengths and speed of a report.

    `samples`: solutions per problem. `skipped`: number of rows left out of the data, by reason.
    """
    fates = [name for batch in batches for name in batch.fates]
    grades = [name for batch in batches for name in batch.grades]
    lengths = [length for batch in batches for length in batch.lengths]
    kept = [n for n, name in zip(lengths, fates, strict=True) if name == Fate.KEPT.value]
    by_fate = collections.Counter(fates)
    by_grade = collections.Counter(grades)
    problems = [fates[i : i + samples] for i in range(0, len(fates), samples)]
    solved = sum(Fate.KEPT.value in names for names in problems)
    tiers = collections.Counter(tier for batch in batches for tier in batch.tiers)
    chosen = {"chosen": {tier.value: tiers[tier.value] for tier in Tier}} if tiers else {}
    finished = len(fates) - by_fate[Fate.TRUNCATED.value] - by_fate[Fate.EMPTY.value]
    seconds = sum(batch.seconds for batch in batches)
    return {
        "problems": len(problems),
        "problems_with_a_solution": solved + tiers[Tier.HINTED.value],
        "rows_left_out": skipped,
        "solutions": len(fates),
        "fates": {name.value: by_fate[name.value] for name in Fate},
        "grades": {name.value: by_grade[name.value] for name in Grade}
        | {"ungraded": finished - sum(by_grade[name.value] for name in Grade)},
        "tokens": {"all": _lengths(lengths), "kept": _lengths(kept)},
        "seconds": round(seconds, 3),
        "tokens_per_s": round(sum(lengths) / max(seconds, 1e-9), 1),
    } | chosen


def table(report: dict[str, Any]) -> str:
    """Format a report as text: numbers of kept and dropped solutions, and their mean lengths."""
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
    if chosen := report.get("chosen"):
        counts = ", ".join(f"{count:,} {name}" for name, count in chosen.items() if count)
        lines.append(f"chosen: {counts or 'none'}")
    lines.append(
        f"{report['problems_with_a_solution']:,} of {report['problems']:,} problems have a solution; "
        f"{report['tokens_per_s']:,.0f} tokens/s"
    )
    return "\n".join(lines)


def progress(batches: Sequence[Batch], new: int, elapsed: float, *, size: int, count: int) -> str:
    """Return `problems 128/1000  kept 92%  1,234 tok/s  0:03:20 left`.

    Rates cover the last `new` batches, which this process sampled in `elapsed` seconds. A batch has `size`
    problems; there are `count` in total.
    """
    problems = min(len(batches) * size, count)
    fates = [name for batch in batches for name in batch.fates]
    sampled = batches[-new:]
    rate = sum(sum(batch.lengths) for batch in sampled) / sum(batch.seconds for batch in sampled)
    left = elapsed / (problems - (len(batches) - new) * size) * (count - problems)
    return (
        f"problems {problems:,}/{count:,}  kept {fates.count(Fate.KEPT.value) / len(fates):.0%}"
        f"  {rate:,.0f} tok/s  {datetime.timedelta(seconds=int(left))} left"
    )


def nothing_kept(file: pathlib.Path, report: dict[str, Any]) -> str:
    """Return the error message for a run that kept no solution."""
    dropped = {name: n for name, n in report["fates"].items() if n}
    advice = {
        "truncated": "raise --config.sample.max_response_tokens",
        "empty": "check the teacher's chat template",
        "repetitive": "inspect the solutions with --config.sample.keep_repetitive=true",
    }.get(
        max(dropped, key=dropped.__getitem__), "inspect them with --config.sample.keep_wrong=true"
    )
    counts = ", ".join(f"{name} {n}" for name, n in dropped.items())
    return (
        f"none of {report['solutions']} solutions can be kept ({counts}); {file} was not written, but "
        f"{sample_file.report_path(file)} was; {advice}"
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
