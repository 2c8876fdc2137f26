r"""From a row of a file to a `Problem`: which column is the problem, the solution, the answer, the id.

A column is named by the config (`data.columns.answer=reward_model.ground_truth`) or found under the
names that people use; docs/data.md lists the shapes. Everything becomes text: numbers too (142.0 is
"142"), and GSM8K's "... #### 72" becomes a solution that ends in \boxed{72} and the answer "72".
"""

import dataclasses
import decimal
import math
import pathlib
import re
from typing import Any

from opd_jax.data.files import Row, RowError, place
from opd_jax.data.problem import Problem
from opd_jax.eval.boxed import last_boxed

# In the order in which they are looked for; the first that holds something is taken.
PROBLEM = ("problem", "question", "prompt", "query", "instruction", "messages", "conversations")
# Of `target` only a chat is a solution (LUFFY); elsewhere the word means the answer.
SOLUTION = ("target.0.content", "generations", "solution", "response", "completion", "output",
            "messages", "conversations")  # fmt: skip
ANSWER = ("answer", "final_answer", "reward_model.ground_truth", "ground_truth", "expected_answer",
          "gold_answer")  # fmt: skip
ID = ("id", "unique_id", "uuid", "problem_id", "idx", "extra_info.index", "index")
UNFINISHED, WRONG = "no finished generation", "no correct generation"

_GSM8K = re.compile(r"\s*####\s*(-?\$?[\d,]*\.?\d+)\s*$")
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT's {"from": ..., "value": ...}
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Columns:
    """The column (a dotted path) of each part of a problem; "" = found by its name, or absent."""

    problem: str = ""
    solution: str = ""
    answer: str = ""
    id: str = ""


class _Unusable(Exception):
    """Why a column does not hold what was looked for, and the reason to count it under."""

    def __init__(self, text: str, reason: str = ""):
        super().__init__(text)
        self.reason = reason


def read_problem(
    row: Row,
    *,
    path: str,
    number: int,
    columns: Any,
    need_solution: bool = False,
    need_answer: bool = False,
    field: str = "data.columns",
) -> tuple[Problem, Columns]:
    """The problem that a row holds, and the columns that its parts were taken from.

    `columns` has the fields of `Columns`; `field` is the config section it comes from. Raises
    RowError (file, line, what is missing, the columns that are there, the option that names the
    right one) where the row lacks the problem, or a part that is needed.
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
                return read(value, row), column
            except _Unusable as error:
                tried.append((column, error))
                if error.reason:  # found out to be wrong; another column is no substitute
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

    (prompt, system), taken_problem = part("problem", PROBLEM, _prompt, True)
    # One column may hold two parts: GSM8K's answer the solution too, a solution's box the answer.
    solution, taken_solution = part("solution", SOLUTION, _solution, False)
    answer, taken_answer = part("answer", ANSWER, _answer, False)
    if solution is None and answer is not None:
        text = reach(row, taken_answer)
        if isinstance(text, str) and _GSM8K.search(text):
            solution, taken_solution = _boxed_gsm8k(text), taken_answer
    if answer is None and solution is not None and (box := last_boxed(solution)) is not None:
        answer, taken_answer = box.strip() or None, taken_solution if box.strip() else ""
    if need_solution and solution is None:
        part("solution", SOLUTION, _solution, True)
    if need_answer and answer is None:
        part("answer", ANSWER, _answer, True)
    name, taken_id = part("id", ID, _scalar, False)
    if not system:  # as prepare_data writes it
        try:
            system = _text(row.get("system"))
        except _Unusable:
            system = ""
    problem = Problem(
        id=name or f"{pathlib.Path(path).name.split('.')[0]}-{number}",
        prompt=prompt,
        solution=solution or "",
        answer=answer or "",
        system=system,
    )
    return problem, Columns(taken_problem, taken_solution, taken_answer, taken_id)


def reach(row: Row, column: str) -> Any:
    """The value at a dotted path; integers index lists. A column whose name has the dots comes first."""
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


def _prompt(value: Any, row: Row) -> tuple[str, str]:
    """(problem, system) of a text or a chat."""
    if isinstance(value, str):
        return _text(value), ""
    turns = _chat(value)
    users = [text for role, text in turns if role == "user"]
    if not users:
        raise _Unusable("has no user turn")
    systems = [text for role, text in turns if role == "system"]
    return _text(users[-1]), _unicode(systems[0]) if systems else ""


def _solution(value: Any, row: Row) -> str:
    if value is row.get("generations"):
        return _generation(value, row)
    if isinstance(value, str):
        text = _text(value)
        return _boxed_gsm8k(text) if _GSM8K.search(text) else text
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return _text(value[0])  # several ways to solve it: the first
    turns = _chat(value)
    if not turns or turns[-1][0] != "assistant":
        raise _Unusable("does not end in an assistant turn")
    return _text(turns[-1][1])


def _generation(value: Any, row: Row) -> str:
    """OpenR1-Math: the first generation that is finished and that math-verify found correct."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _Unusable("is not a list of texts")
    finished = _flags(row, "is_reasoning_complete", len(value))
    correct = _flags(row, "correctness_math_verify", len(value))
    for text, *marks in zip(value, finished, correct, strict=True):
        if all(marks) and text.strip():
            return _text(text)
    if not any(finished):
        raise _Unusable("has no generation that is_reasoning_complete", UNFINISHED)
    raise _Unusable("has no finished generation with correctness_math_verify", WRONG)


def _flags(row: Row, column: str, count: int) -> list[bool]:
    marks = row.get(column)
    if marks is None:  # not checked by anybody: the caller may (prepare_data grades)
        return [True] * count
    if not isinstance(marks, list) or len(marks) != count:
        raise _Unusable(
            f"has {count} generations, but {column} does not have as many marks", "no solution"
        )
    return [mark is True for mark in marks]


def _answer(value: Any, row: Row) -> str:
    if isinstance(value, list):  # OlympiadBench: several answers are all wanted
        if not value:
            raise _Unusable("is an empty list")
        return ", ".join(_scalar(item, row) for item in value)
    text = _scalar(value, row)
    if match := _GSM8K.search(text):
        return _number(match)
    return text


def _scalar(value: Any, row: Row) -> str:
    """Text of a text or a number; 142.0 is "142"."""
    if isinstance(value, str):
        return _text(value).strip()
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return str(value)
        except ValueError:  # more digits than Python writes
            raise _Unusable("is a number of too many digits") from None
    if isinstance(value, float | decimal.Decimal):
        if not math.isfinite(value):
            raise _Unusable(f"is {value}")
        return str(int(value)) if value == int(value) else str(value)
    raise _Unusable(f"is {_kind(value)}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Unusable(f"is {_kind(value)}")
    if not value.strip():
        raise _Unusable("is empty")
    return _unicode(value)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        raise _Unusable("is not valid Unicode") from None
    return text


def _chat(value: Any) -> list[tuple[str, str]]:
    """(role, text) of every turn of [{"role": ..., "content": ...}, ...]."""
    if not isinstance(value, list):
        raise _Unusable(f"is {_kind(value)}")
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise _Unusable("is a list, but not of chat turns")
        role = turn.get("role", turn.get("from"))
        text = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise _Unusable("has a chat turn without role and content")
        turns.append((_ROLES.get(role, role), text))
    return turns


def _boxed_gsm8k(text: str) -> str:
    r"""GSM8K's solution: calculator marks removed, "#### 1,000" as a last line \boxed{1000}."""
    match = _GSM8K.search(text)
    assert match is not None  # callers have looked
    steps = _CALCULATOR.sub("", text[: match.start()]).rstrip()
    return f"{steps}\n\\boxed{{{_number(match)}}}"


def _number(match: re.Match[str]) -> str:
    return match[1].replace(",", "").replace("$", "")


def _kind(value: Any) -> str:
    kind = type(value).__name__
    return {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text"}.get(
        kind, kind
    )


def _names(row: Row) -> str:
    # Whatever a file calls its columns, an error is one line that can be printed.
    names = sorted(" ".join(str(n).encode(errors="replace").decode().split()) for n in row)
    return (", ".join(names[:20]) + (", ..." if len(names) > 20 else "")) or "no columns"
