"""Filter a block of rows: each is kept, or dropped for the first reason that applies."""

import collections
import hashlib
from typing import Any

from ml_collections import ConfigDict

from opd_jax.data.columns import UNFINISHED, WRONG, Counts, count, read_problem
from opd_jax.data.files import Row, RowError
from opd_jax.data.files import place as line_of
from opd_jax.data.problem import Problem
from opd_jax.data.prompts import PromptStyle
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.errors import DataError, ModelError
from opd_jax.grading.grader import Grade, Grader
from opd_jax.tools.prepare_data.decontaminate import Benchmarks

_STYLE = PromptStyle(system="none")  # for counting the tokens of solutions
_REASONS = {UNFINISHED: "unfinished", WRONG: "wrong"}  # names in the report


def judge(
    block: list[tuple[str, int, Row | RowError]],
    *,
    config: ConfigDict,
    benchmarks: Benchmarks,
    tokenizer: Tokenizer | None,
    grader: Grader | None,
    seen: set[int],
) -> dict[str, Any]:
    """Return the kept and dropped rows of a block, counts by reason, and the benchmark problems found.

    `seen` has the keys of the problems kept so far, and is updated.
    """
    keep = config.filter
    dropped: dict[int, dict[str, Any]] = {}  # index in the block -> line of dropped.jsonl
    problems: dict[int, Problem] = {}
    hits: dict[str, set[int]] = {method: set() for method in benchmarks.methods}
    rows_hit: collections.Counter[str] = collections.Counter()
    counts: Counts = {}

    def drop(place: int, reason: str, **more: Any) -> None:
        path, number, _ = block[place]
        problem = problems.pop(place, None)
        line = {"source": path, "line": number, "id": problem.id if problem else None}
        dropped[place] = line | {"reason": reason} | more

    for place, (path, number, row) in enumerate(block):
        try:
            if isinstance(row, RowError):
                raise row
            problems[place], sources = read_problem(
                row, path=path, number=number, columns=config.data.columns,
                need_solution=keep.solution, need_answer=keep.answer,
            )  # fmt: skip
            count(counts, row, problems[place], sources)
        except RowError as error:
            unreadable = isinstance(row, RowError) or error.reason == "no problem"
            if config.data.bad_rows == "refuse" and unreadable:
                raise
            drop(place, _REASONS.get(error.reason, error.reason), detail=str(error))
    if grader:
        ungraded = [i for i in problems if not _is_graded(block[i][2], config.data.columns)]
        pairs = [(problems[i].solution, problems[i].answer) for i in ungraded]
        for place, grade in zip(ungraded, grader.grade(pairs), strict=True):
            if grade is not Grade.CORRECT:
                drop(place, "wrong", detail=f"math-verify: {grade.value}")
    if tokenizer:
        for place in list(problems):
            try:
                length = len(_STYLE.golden([problems[place]], tokenizer)[0])
            except ModelError as error:
                if not problems[place].history:  # not caused by this row
                    raise
                if config.data.bad_rows == "refuse":
                    raise DataError(
                        f"{line_of(*block[place][:2])}: problem {problems[place].id}: {error}; or "
                        "skip such rows with --config.data.bad_rows=skip"
                    ) from None
                drop(place, "template refuses the turns", detail=str(error))
                continue
            if length > keep.max_tokens:
                drop(place, "too long", detail=f"{length} tokens")
    places = list(problems)
    for place, matches in zip(
        places, benchmarks.find([problems[i].question for i in places]), strict=True
    ):
        if not matches:
            continue
        matched = [(benchmarks.problems[match.problem], match) for match in matches]
        for match in matches:
            hits[match.method].add(match.problem)
        # A row counts once for each method, each benchmark, and each benchmark by any method.
        rows_hit.update({f"{b.benchmark} {match.method}" for b, match in matched})
        rows_hit.update({f"{b.benchmark} any" for b, _ in matched})
        rows_hit.update({f"any {match.method}" for _, match in matched})
        drop(place, "contaminated", problem=problems[place].question, matches=[
            {"benchmark": b.benchmark, "id": b.id, "line": b.number, "method": match.method,
             "score": match.score, "problem": b.prompt} for b, match in matched
        ])  # fmt: skip
    if not keep.duplicates:
        for place in list(problems):
            key = problem_key(problems[place].question)
            if key in seen:
                drop(place, "duplicate")
            seen.add(key)
    kept = [
        problem.row() | {"source": block[place][0], "line": block[place][1]}
        for place, problem in problems.items()
    ]
    return {
        "read": len(block),
        "reasons": collections.Counter(line["reason"] for line in dropped.values()),
        "hits": {method: sorted(places) for method, places in hits.items()},
        "rows_hit": dict(sorted(rows_hit.items())),
        "columns": counts,
        "rows": {"kept": kept, "dropped": [dropped[place] for place in sorted(dropped)]},
    }


def problem_key(problem: str, seed: int | None = None) -> int:
    """Return a 64-bit hash of a problem's text, ignoring whitespace; with a seed, for the split.

    Unlike in decontamination, symbols count: 2+3 and 2-3 are two problems.
    """
    text = " ".join(problem.split())
    data = text if seed is None else f"{seed} {text}"
    return int.from_bytes(hashlib.blake2b(data.encode(), digest_size=8).digest(), "big")


def row_key(row: dict[str, Any], seed: int | None = None) -> int:
    """Return `problem_key` of a kept row."""
    earlier = [turn["content"] for turn in row.get("history", ())]
    return problem_key("\n".join([*earlier, row["problem"]]), seed)


def _is_graded(row: Row | RowError, columns: Any) -> bool:
    """Return whether the row has results of math-verify, which read_problem has applied already."""
    if not isinstance(row, dict) or columns.solution not in ("", "generations"):
        return False
    return isinstance(row.get("correctness_math_verify"), list) and "generations" in row
