"""From a row of a file to a `Problem`: find the columns of problem, solution, answer and id.

The config names a column (`data.columns.answer=reward_model.ground_truth`), or it is found under its
usual names; docs/data.md lists them. All values become text (cells.py); a question may be spread over
several columns (question.py).
"""

import collections
import dataclasses
import difflib
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from opd_jax.data import cells
from opd_jax.data.cells import THOUGHTS, Unusable
from opd_jax.data.files import Row, RowError, place
from opd_jax.data.problem import Problem
from opd_jax.data.question import read_question
from opd_jax.data.templates import PARTS

# In order of precedence; the first column that holds a value is used.
PROBLEM = ("problem", "question", "prompt", "query", "instruction", "messages", "conversations")
# `target` is a solution only if it is a chat (LUFFY); in other files it is the answer.
SOLUTION = ("target", "generations", "solution", "response", "completion", "output",
            "messages", "conversations")  # fmt: skip
ANSWER = ("answer", "final_answer", "reward_model.ground_truth", "ground_truth", "expected_answer",
          "gold_answer")  # fmt: skip
ID = ("id", "unique_id", "uuid", "problem_id", "idx", "extra_info.index", "index")
UNFINISHED, WRONG = "no finished generation", "no correct generation"
_WITH_THOUGHTS = ("solution", "response", "completion", "output", "answer")
_MARKS = ("is_reasoning_complete", "correctness_math_verify")  # of OpenR1's generations
_SHOWN = 12  # names of columns in a line
_MISSING = object()

Counts = dict[str, collections.Counter[str]]  # of `count`; JSON can hold it


@dataclasses.dataclass(frozen=True)
class Columns:
    """The column (a dotted path) of each part of a problem; "" = found by its name, or absent.

    `read_problem` returns a part that comes from several columns as `context + question`.
    """

    problem: str = ""
    solution: str = ""
    answer: str = ""
    id: str = ""


def read_problem(
    row: Row,
    *,
    path: str,
    number: int,
    columns: Any,
    need_solution: bool = False,
    need_answer: bool = False,
    field: str = "data.columns",
    shown: Sequence[str] = (),
) -> tuple[Problem, Columns]:
    """Return the problem of a row, and the columns of its parts.

    `columns` has the fields of `Columns`; `field` is the config section it comes from; `shown` are further
    columns that a prompt template names. Raises RowError (file, line, the missing part, the available
    columns, the option that names the right one) where the row lacks the problem, or a part that is needed.
    """
    where = place(path, number)

    def part(name: str, candidates: tuple[str, ...], read: Any, needed: bool) -> tuple[Any, str]:
        chosen = getattr(columns, name)
        tried = []
        for column in (chosen,) if chosen else candidates:
            value = reach(row, column)
            if value is _MISSING or (value is None and not chosen):
                continue
            try:
                return read(value, row, column), column
            except Unusable as error:
                tried.append((column, error))
                if error.reason:  # the part is known to be wrong, so no other column is tried
                    break
        if not needed and not chosen:
            return None, ""
        if chosen and not tried:
            why = f"column {chosen!r} is not there"
        else:
            why = "; ".join(f"column {column!r} {error}" for column, error in tried)
            why = why or "none of " + ", ".join(candidates) + " is there"
        reason = next((error.reason for _, error in tried if error.reason), f"no {name}")
        raise RowError(
            f"{where}: no {name} ({why}); it has {_names(row)}; set --config.{field}.{name}=COLUMN",
            reason,
        )

    ask = functools.partial(
        read_question, alone=bool(columns.problem), answered=(*SOLUTION, columns.solution)
    )
    question, taken_problem = part("problem", PROBLEM, ask, True)
    taken_problem = " + ".join(name or taken_problem for name in question.parts)
    # One column may hold two parts: GSM8K's answer contains the solution, a solution's box the answer.
    read_solution = functools.partial(_solution, named=bool(columns.solution))
    solution, taken_solution = part("solution", SOLUTION, read_solution, False)
    read = functools.partial(_answer, choices=question.choices, named=bool(columns.answer))
    answer, taken_answer = part("answer", ANSWER, read, False)
    if solution is None and answer is not None:
        solution = _before_mark(reach(row, taken_answer))
        taken_solution = taken_answer if solution else ""
    if answer is None and solution and (box := cells.boxed(solution)):
        answer, taken_answer = box, taken_solution
    if solution and not columns.solution and taken_solution in _WITH_THOUGHTS:
        solution, taken_solution = _with_thoughts(solution, row, taken_solution)
    if need_solution and not solution:
        part("solution", SOLUTION, read_solution, True)
    if need_answer and answer is None:
        part("answer", ANSWER, read, True)
    name, taken_id = part("id", ID, lambda value, *_: cells.scalar(value), False)
    problem = Problem(
        id=name or f"{pathlib.Path(path).name.split('.')[0]}-{number}",
        prompt=question.prompt,
        solution=solution or "",
        answer=answer or "",
        system=question.system,
        history=question.history,
        columns=tuple((name, _shown_text(row, name, where)) for name in shown),
        fields=row,
    )
    return problem, Columns(taken_problem, taken_solution, taken_answer, taken_id)


def _shown_text(row: Row, name: str, where: str) -> str:
    """Return the text of a column that a prompt template names. Raises RowError where there is none."""
    value = reach(row, name)
    if value is _MISSING:
        match = difflib.get_close_matches(name, [*row, *PARTS], n=1, cutoff=0.5)
        hint = f"did you mean {{{match[0]}}}? " if match else ""
        raise RowError(
            f"{where}: the prompt template shows {{{name}}}, and there is no such column; {hint}it has "
            f"{_names(row)}; correct --config.data.prompt_template or teacher_prompt_template (braces "
            "that are text have a space inside: { x })",
            f"no column {name!r}",
        )
    try:
        return cells.scalar(value)
    except Unusable as error:
        raise RowError(
            f"{where}: the prompt template shows {{{name}}}, but this column {error}; correct the row, or "
            "show another column in --config.data.prompt_template or teacher_prompt_template",
            f"no {name}",
        ) from None


def reach(row: Row, column: str) -> Any:
    """Return the value at a dotted path; integers index lists. A column with this exact name comes first."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", name):
            if not -len(value) <= int(name) < len(value):
                return _MISSING
            value = value[int(name)]
        else:
            return _MISSING
    return value


def count(counts: Counts, row: Row, problem: Problem, taken: Columns) -> None:
    """Add a row to `counts`: the columns of its problem, what was not read, earlier turns.

    Not read may be columns, and keys of the turns of a chat: `messages[].tool_calls`.
    """
    paths = {path for part in dataclasses.astuple(taken) for path in part.split(" + ")}
    paths_shown = paths | {name for name, _ in problem.columns}
    known = paths_shown | {path.split(".")[0] for path in paths_shown}
    known |= set(_MARKS) if "generations" in known else set()
    entries = {part: [column] for part, column in dataclasses.asdict(taken).items()} | {
        "not read": [name for name in row if name not in known and cells.holds(row[name])]
        + [
            f"{path}[].{key}"
            for path in sorted(paths)
            for key in sorted(cells.unread(reach(row, path)))
        ],
        "earlier turns": ["rows"] * bool(problem.history),
    }
    for kind, names in entries.items():
        counts.setdefault(kind, collections.Counter()).update(names)


def describe(counts: Mapping[str, Mapping[str, int]]) -> str:
    """`problem from question, answer from answer; 12 with earlier turns; not read: level`."""
    sources = [
        f"{part} from {_ranked(counts[part])}"
        for part in ("problem", "solution", "answer", "id")
        if any(counts.get(part, ()))
    ]
    phrases = [", ".join(sources)] if sources else []
    if turns := counts.get("earlier turns"):
        phrases.append(f"{turns['rows']} with earlier turns")
    if names := sorted(counts.get("not read", ())):
        phrases.append(f"not read: {_listed(names, _SHOWN)}")
    return "; ".join(phrases)


def _ranked(counts: Mapping[str, int]) -> str:
    """Return `answer`, or `answer (90) | none (10)` where rows differ."""
    if len(counts) == 1:
        return next(iter(counts))
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return " | ".join(f"{column or 'none'} ({n})" for column, n in ranked)


def _solution(value: Any, row: Row, column: str, *, named: bool) -> str:
    if value is row.get("generations"):
        return _generation(value, row)
    if column == "target" and not named:
        cells.chat(value)
    return cells.solution(value)


def _generation(value: Any, row: Row) -> str:
    """Return OpenR1-Math's first generation that is finished and that math-verify found correct."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise Unusable("is not a list of texts")
    finished = _flags(row, "is_reasoning_complete", len(value))
    correct = _flags(row, "correctness_math_verify", len(value))
    for text, *marks in zip(value, finished, correct, strict=True):
        if all(marks) and text.strip():
            return cells.golden(cells.text(text))
    if not any(finished):
        raise Unusable("has no generation that is_reasoning_complete", UNFINISHED)
    raise Unusable("has no finished generation with correctness_math_verify", WRONG)


def _flags(row: Row, column: str, count: int) -> list[bool]:
    marks = row.get(column)
    if marks is None:  # not verified in the file; the caller may verify (prepare_data grades)
        return [True] * count
    if not isinstance(marks, list) or len(marks) != count:
        raise Unusable(
            f"has {count} generations, but {column} does not have as many marks", "no solution"
        )
    return [mark is True for mark in marks]


def _with_thoughts(solution: str, row: Row, column: str) -> tuple[str, str]:
    """Put thoughts from a column of their own before a solution; also return the columns of both."""
    for name in THOUGHTS:
        complete = cells.with_thoughts(row.get(name), solution)
        if complete != solution:
            return complete, f"{name} + {column}"
    return solution, column


def _answer(
    value: Any, row: Row, column: str, *, choices: tuple[tuple[str, str], ...], named: bool
) -> str:
    shown = {part for choice in choices for part in choice}
    if isinstance(value, str) and cells.is_placeholder(value) and value.strip() in shown - {""}:
        return cells.option(value)  # the choice `None`, which elsewhere is a placeholder
    if choices and not named and _may_be_place(value, choices):
        raise Unusable(
            "is a number beside choices: it may be the position of a choice, or its text (a column that "
            "you name is used unchanged)",
            "no answer",
        )
    return cells.answer(value)


def _may_be_place(value: Any, choices: tuple[tuple[str, str], ...]) -> bool:
    """Return whether an answer may mean "the second": an integer, or its text where no choice shows it."""
    if isinstance(value, str):
        shown = {part for choice in choices for part in choice}
        text = value.strip()
        is_number = re.fullmatch(r"\d{1,2}(?:\.0+)?", text) is not None
        return is_number and float(text) <= len(choices) and shown.isdisjoint((text, ""))
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def _before_mark(value: Any) -> str | None:
    """Return the solution in GSM8K's answer, None where there is none."""
    if not isinstance(value, str) or cells.marked(value) is None:
        return None
    try:
        return cells.golden(value)
    except Unusable:  # it holds only the answer
        return None


def _names(row: Row) -> str:
    return _listed(sorted(row), 20) or "no columns"


def _listed(names: list[str], most: int) -> str:
    # Column names may contain anything; the result must be one printable line.
    shown = [" ".join(str(n).encode(errors="replace").decode().split()) for n in names[:most]]
    return ", ".join(shown) + (", ..." if len(names) > most else "")
