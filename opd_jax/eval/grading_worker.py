"""The process that runs math-verify: one JSON line in, one grade name out.

Answers come from models and files, and math-verify evaluates what they say: a tower of powers can
take forever or eat the memory. So it runs here, under a memory limit and a limit of processor time
an answer, which ends the process. The parent (`grade.Grader`) kills one that sleeps; where the parent
was killed, an alarm does. Kept free of JAX: it starts in a second.
"""

import contextlib
import functools
import json
import logging
import re
import resource
import signal
import sys
import warnings
from typing import Any

from math_verify import parse, verify
from sympy import Expr, Float, Symbol, UnevaluatedExpr, nan, oo, zoo
from sympy.core.function import AppliedUndef

from opd_jax.eval.answer import Found, close, find, letters, number, parts, same_letters

_MEMORY = 4 * 2**30
_ALONE_S = 600  # for one answer; far more than the parent ever allows
_PARTS = 40  # answers of a list that are compared one by one


def grade(text: str, gold: str, fallbacks: tuple[str, ...] = (), rule: str = "plain") -> str:
    """Grade name of an answer: CORRECT, WRONG, or UNPARSED (no answer, or none math-verify can read)."""
    found = find(text, fallbacks)
    return "UNPARSED" if found is None else compare(found, gold, rule)


def compare(found: Found, gold: str, rule: str) -> str:
    """Grade name of an answer that was found. Rules: answer.RULES."""
    if not found.free and same_letters(found.text, gold):
        return "CORRECT"
    expression, wanted = found.text, gold
    if rule == "units" and not found.free:
        expression, wanted = _latex(expression), _latex(wanted)
        value = number(wanted)
        if value is not None and (given := _value(expression)) is not None:
            return "CORRECT" if close(given, value) else "WRONG"
    if rule == "several":
        expression, wanted = expression.replace("$", ""), wanted.replace("$", "")
        if len(parts(wanted)) > 1 and not found.free:
            return _several(expression, wanted)
    answer = parse(expression, parsing_timeout=None) if found.free else _parse(expression)
    if not answer:
        return "UNPARSED"
    return "CORRECT" if _verify(_parse(wanted), answer) else "WRONG"


def _several(expression: str, wanted: str) -> str:
    """Of a list: as many answers as are wanted, each equal to another one of these."""
    left, given = parts(wanted), parts(expression)
    if len(given) == len(left) <= _PARTS:
        for part in given:
            parsed = _parse(part)
            same = next((one for one in left if letters(one) == letters(part)), None)
            same = same or next((one for one in left if _verify(_parse(one), parsed)), None)
            if same is None:
                break
            left.remove(same)
        if not left:
            return "CORRECT"
    answer = _parse(expression)
    if not answer:
        return "UNPARSED"
    return (
        "CORRECT"
        if len(given) == len(parts(wanted)) and _verify(_parse(wanted), answer)
        else "WRONG"
    )


def _latex(expression: str) -> str:
    """Minerva writes some answers as Python would: np.arcsin(10/13), \\exp{a*t}."""
    expression = re.sub(r"\bnp\.(arc\w+|sin|cos|tan|exp|sqrt|log)", r"\\\1", expression)
    expression = re.sub(r"\\exp\s*\{([^{}]*)\}", r"e^{\1}", expression)
    expression = re.sub(
        r"\\(arcsin|arccos|arctan)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", r"\\\1(\2)", expression
    )
    return expression.replace("*", r" \cdot ")


def _value(expression: str) -> float | None:
    """The value of a number, or of an expression that is one: the last side of an equation."""
    last = re.split(r"(?<![<>!\\])=|\\approx|\\simeq|≈", expression)[-1]
    found = number(last)
    if found is not None:
        return found
    for parsed in _parse(last):
        try:
            return float(parsed)
        except (TypeError, ValueError, OverflowError, AttributeError):
            continue
    return None


def _verify(gold: list[Any], answer: list[Any]) -> bool:
    if _plainly_different(gold, answer):
        return False
    # The order matters: verify(gold, answer) is not symmetric.
    return verify(gold, answer, timeout_seconds=None)


def _plainly_different(gold: list[Any], answer: list[Any]) -> bool:
    """Whether two ordinary expressions have values far apart at two points: no need to simplify.

    math-verify would simplify their difference, which takes up to a second for a wrong answer. What it
    treats in a way of its own (sets, relations, percentages, single symbols, functions) is left to it.
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
            one, other = (complex(found.evalf(15, subs=points)) for found in pair)
        except (TypeError, ValueError, OverflowError, AttributeError, ZeroDivisionError):
            return False
        if not abs(one - other) > 1e-3 * max(abs(one), abs(other), 1.0):
            return False
    return True


@functools.lru_cache(maxsize=4096)  # the gold answer and the usual ones come again and again
def _parse(expression: str) -> list[Any]:
    return parse(f"\\boxed{{{expression}}}", parsing_timeout=None)


def main() -> None:
    """Serve until standard input closes; the argument is the limit of an answer, in CPU seconds."""
    limit = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    with contextlib.suppress(
        ValueError, OSError
    ):  # macOS has no such limit; the time limit remains
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for asked in (signal.SIGINT, signal.SIGTERM):  # the run is asked, and ends us when it is done
        signal.signal(asked, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    grades, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no grade
    for count, line in enumerate(sys.stdin):
        request = json.loads(line)
        signal.alarm(
            _ALONE_S
        )  # its default ends the process, also in the midst of one long operation
        # Also ends the process, but counts processor time: a busy machine does not use it up. The first
        # answer has no limit: it is the parent's, and pays for the parser's tables.
        signal.setitimer(signal.ITIMER_PROF, limit if count else 0)
        try:
            found = Found(request["answer"], request["free"])
            outcome = compare(found, request["gold"], request["rule"])
        except (Exception, RecursionError, MemoryError):  # whatever sympy makes of a hostile answer
            outcome = "UNPARSED"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        print(outcome, file=grades, flush=True)


if __name__ == "__main__":
    main()
