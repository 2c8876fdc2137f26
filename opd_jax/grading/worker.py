"""The process that runs math-verify: it reads one JSON line and writes one grade name per answer.

Answers come from models and files, and math-verify evaluates them: a tower of powers can take forever or
exhaust the memory. So they are evaluated here, under a memory limit and a limit of processor time per
answer, which ends the process. The parent (`grader.Grader`) kills a process that sleeps; if the parent
was killed, an alarm does. This module does not import JAX, so that it starts in a second.
"""

import contextlib
import functools
import itertools
import json
import logging
import re
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from math_verify import parse, verify
from sympy import Basic, Expr, Float, Integer, MatrixBase, Symbol, UnevaluatedExpr, nan, oo, zoo
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from opd_jax.grading import equivalence
from opd_jax.grading.extract import RELATIVE, Found, close, find, number, parts, same_letters
from opd_jax.grading.list_rules import matched

_MEMORY = 4 * 2**30
_ALONE_S = 600  # limit of one answer without a parent; far more than the parent ever allows
_PARTS = 40  # longest list whose answers are compared one by one


def grade(
    text: str,
    gold: str,
    fallbacks: tuple[str, ...] = (),
    rule: str = "plain",
    grader: str = "guarded",
) -> str:
    """Return the grade name of an answer: CORRECT, WRONG, or UNPARSED (none that math-verify can parse)."""
    answer = find(text, fallbacks)
    return "UNPARSED" if answer is None else compare(answer, gold, rule, grader)


def compare(found: Found, gold: str, rule: str, grader: str = "guarded") -> str:
    """Return the grade name of an extracted answer. Rules: extract.RULES; graders: extract.GRADERS.

    The grader `math_verify` is the library alone: it ignores `rule` and the rules of equivalence.py.
    """
    answer, free = found.text, found.free
    if grader == "math_verify":
        parsed = _parse(answer, free)
        return _name(verify(_parse(gold), parsed, timeout_seconds=None)) if parsed else "UNPARSED"
    if not free and same_letters(answer, gold):
        return "CORRECT"
    if rule == "units" and not free:
        answer, gold = _latex(answer), _latex(gold)
        value = number(gold)
        if value is not None and (answer_value := _value(answer)) is not None:
            return _name(close(answer_value, value))
    if rule == "several":
        answer, gold = answer.replace("$", ""), gold.replace("$", "")
        if len(parts(gold)) > 1 and not free:
            return _several(answer, gold)
    return _guarded(answer, gold, free)


def _name(correct: bool) -> str:
    return "CORRECT" if correct else "WRONG"


def _guarded(answer: str, gold: str, free: bool = False) -> str:
    """Return the grade name by the rules of equivalence.py or, where none applies, by math-verify."""
    gold = equivalence.readable(gold)
    if not free:
        answer = equivalence.readable(answer)
        if same_letters(answer, gold):
            return "CORRECT"
        if (verdict := equivalence.decide(answer, gold, _same)) is not None:
            return _name(verdict)
    parsed = _parse(answer, free)
    if not parsed:
        return "UNPARSED"
    correct = _verify(_parse(gold), parsed)
    return _name(correct and (free or not equivalence.refuted(answer, gold, _same)))


def _same(answer: str, gold: str) -> bool:
    return _guarded(answer, gold) == "CORRECT"


def _several(answer: str, gold: str) -> str:
    """Grade a list: it must have as many answers as gold, each equal to a different one of gold's."""
    answers, golds = parts(answer), parts(gold)
    if len(answers) == len(golds) <= _PARTS and matched(answers, golds, _same):
        return "CORRECT"
    grade = _guarded(answer, gold)
    return "WRONG" if grade == "CORRECT" and len(answers) != len(golds) else grade


def _latex(expression: str) -> str:
    r"""Convert Minerva's answers in Python syntax to LaTeX: np.arcsin(10/13), \exp{a*t}."""
    expression = re.sub(r"\bnp\.(arc\w+|sin|cos|tan|exp|sqrt|log)", r"\\\1", expression)
    expression = re.sub(r"\\exp\s*\{([^{}]*)\}", r"e^{\1}", expression)
    expression = re.sub(
        r"\\(arcsin|arccos|arctan)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", r"\\\1(\2)", expression
    )
    return expression.replace("*", r" \cdot ")


def _value(expression: str) -> float | None:
    """Return the value of a number, or of an expression with one: the last side of an equation."""
    last = re.split(r"(?<![<>!\\])=|\\approx|\\simeq|≈", expression)[-1]
    value = number(last)
    if value is not None:
        return value
    for parsed in _parse(last):
        try:
            return float(parsed)
        except (TypeError, ValueError, OverflowError, AttributeError):
            continue
    return None


def _verify(gold: list[Any], answer: list[Any]) -> bool:
    """Return math-verify's verdict, except for pairs whose values differ or whose texts it has cut."""
    if _plainly_different(gold, answer):
        return False
    # The order matters: verify(gold, answer) is not symmetric.
    if not verify(gold, answer, timeout_seconds=None):
        return False
    if len(gold) == len(answer) == 2:
        return not (_values_differ(gold[0], answer[0]) or _statements_differ(gold[0], answer[0]))
    # math-verify compares unparsable answers as texts, from which it cuts a \text{} at the end.
    return not any(text.count("{") != text.count("}") for text in gold + answer)


def _values_differ(gold: Any, answer: Any) -> bool:
    """Return whether numbers in two expressions that math-verify calls equal are more than 1e-4 apart.

    It rounds to six decimals and drops small terms, so that 2^{-98} equals 2^{-99}.
    """
    values = [sorted(_values(one), key=lambda readings: abs(readings[0])) for one in (gold, answer)]
    return len(values[0]) == len(values[1]) and not all(map(_near, *values))


def _statements_differ(gold: Any, answer: Any) -> bool:
    """Return whether two relations that hold for every value, x < x+1 and y < y+1, have different sides.

    math-verify calls any two such relations equal.
    """
    pair = gold, answer
    if not all(isinstance(one, Relational) and _is_settled(one) for one in pair):
        return False
    gold_sides, answer_sides = ({one.lhs, one.rhs} for one in pair)
    return bool(gold.free_symbols | answer.free_symbols) and gold_sides != answer_sides


def _is_settled(relation: Relational) -> bool:
    """Return whether the difference of a relation's sides is a number."""
    sides = relation.lhs, relation.rhs
    return all(isinstance(side, Expr) for side in sides) and not (sides[0] - sides[1]).free_symbols


def _values(expression: Any) -> Iterator[tuple[Expr, ...]]:
    """Yield the numbers in an expression: itself, or those of its members, bounds, entries and sides.

    Each comes with its readings: math-verify accepts 9 and 0.09 for 9 %.
    """
    if isinstance(expression, MatrixBase):
        yield from (value for entry in expression.flat() for value in _values(entry))
    elif isinstance(expression, Expr) and not expression.free_symbols:
        percent = expression.replace(UnevaluatedExpr, lambda _: Integer(1))
        readings = [percent] if percent == expression else [percent, percent / 100]
        yield tuple(reading.evalf(15) for reading in readings)
    elif isinstance(expression, Relational):
        if isinstance(expression.lhs, Symbol):  # 2x=6 and x=3 are one equation
            yield from _values(expression.rhs)
        elif not expression.free_symbols:  # 3<4 and 5<6 both hold
            yield from (value for side in expression.args for value in _values(side))
    elif isinstance(expression, Basic) and not isinstance(expression, Expr):
        yield from (value for argument in expression.args for value in _values(argument))


def _near(ones: tuple[Expr, ...], others: tuple[Expr, ...]) -> bool:
    """Return whether two numbers are within 1e-4 of the larger in one of their readings.

    A value of precision 1 is only known to be small: evalf computed no digit of it.
    """
    return any(
        one == other
        or 1 in (getattr(one, "_prec", 0), getattr(other, "_prec", 0))
        or bool(abs(one - other) <= RELATIVE * max(abs(one), abs(other)))
        for one, other in itertools.product(ones, others)
    )


def _plainly_different(gold: list[Any], answer: list[Any]) -> bool:
    """Return whether two ordinary expressions have very different values at two points.

    If so, math-verify need not simplify their difference, which takes up to a second for a wrong answer.
    Objects with rules of their own (sets, relations, percentages, single symbols, functions) are left to it.
    """
    if len(gold) != 2 or len(answer) != 2 or gold[1] == answer[1]:  # [expression, text]
        return False
    pair = gold[0], answer[0]
    for one in pair:
        if not isinstance(one, Expr) or isinstance(one, Symbol) or one.is_Matrix:
            return False
        if one.has(UnevaluatedExpr, AppliedUndef, zoo, nan, oo):
            return False
    symbols = sorted(pair[0].free_symbols | pair[1].free_symbols, key=str)
    for start in (0.37, 1.71):
        points = {symbol: Float(start + 0.618 * i) for i, symbol in enumerate(symbols)}
        try:
            one, other = (complex(each.evalf(15, subs=points)) for each in pair)
        except (TypeError, ValueError, OverflowError, AttributeError, ZeroDivisionError):
            return False
        if not abs(one - other) > 1e-3 * max(abs(one), abs(other), 1.0):
            return False
    return True


@functools.lru_cache(maxsize=4096)  # gold answers and common answers recur
def _parse(expression: str, free: bool = False) -> list[Any]:
    """Parse an expression with math-verify, or prose in which it must find one (`free`)."""
    return parse(expression if free else f"\\boxed{{{expression}}}", parsing_timeout=None)


def main() -> None:
    """Serve until standard input closes; the argument is the limit per answer, in CPU seconds."""
    limit = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    # macOS has no memory limit; the time limit remains.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for signal_number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # the run handles them and ends this process
        signal.signal(signal_number, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    grades, sys.stdout = sys.stdout, sys.stderr  # a library may print; that is not a grade
    for count, line in enumerate(sys.stdin):
        request = json.loads(line)
        # The default action of the alarm ends the process, even inside one long operation.
        signal.alarm(_ALONE_S)
        # The timer ends the process too, but counts processor time, so that the load of the machine does
        # not matter. The parent's first request has no limit, because it builds the parser's tables.
        signal.setitimer(signal.ITIMER_PROF, limit if count else 0)
        try:
            answer = Found(request["answer"], request["free"])
            outcome = compare(answer, request["gold"], request["rule"], request["grader"])
        except (Exception, RecursionError, MemoryError):  # sympy may raise any type of error
            outcome = "UNPARSED"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        print(outcome, file=grades, flush=True)


if __name__ == "__main__":
    main()
