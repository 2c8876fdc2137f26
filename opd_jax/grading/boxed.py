"""The boxed answer of a text, and the grade of integers. Imports only `re`.

So code that only looks for a box, or grades integers, need not import math-verify and sympy.
"""

import re

_WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
_LONGEST = 20_000  # characters of an answer expression; longer ones are not answers


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...}; None without a box or where the last one is not closed.

    An earlier box is not the answer of a text that ends inside a later one, whose content is unknown. The
    papers' graders decide in the same way (docs/evaluation.md).
    """
    opened: list[int] = []  # start of the content of each open box, 0 for other braces
    latest, content = -1, None
    for brace in re.finditer(r"\\boxed\{|[{}]", text):
        if brace[0] == "{":
            opened.append(0)
        elif brace[0] != "}":
            latest, content = brace.end(), None
            opened.append(latest)
        elif opened and opened.pop() == latest:
            content = text[latest : brace.start()]
    return content


def boxed_answer(text: str) -> str | None:
    """Return the content of `last_boxed`; None where it is blank or too long to be an answer."""
    boxed = last_boxed(text)
    return boxed if boxed and boxed.strip() and len(boxed) <= _LONGEST else None


def same_whole_number(answer: str, gold: str) -> bool | None:
    """Return whether two integers are equal; None where a text is not plainly one, for math-verify to decide.

    Plainly means an optional sign and 1 to 20 digits. math-verify parses such a text to that sympy
    Integer and the text itself. It compares Integers by value (rounding enters only where one side is a
    Float) and texts letter by letter, and equal letters are equal numbers. So comparing the numbers gives
    its grade.
    """
    if not _WHOLE.fullmatch(answer) or not _WHOLE.fullmatch(gold):
        return None
    return int(answer) == int(gold)
