r"""The boxed answer of a text, and the grade of whole numbers. Imports nothing but `re`.

Whoever only looks for a box, or grades whole numbers, never pays for importing math-verify and sympy.
"""

import re

_WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
_LONGEST = 20_000  # characters of an answer expression; longer ones are not answers


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}; None where there is no box or the last one is not closed.

    An earlier box is not the answer of a text that ends inside another one: what the last box was going
    to hold is unknown. The papers' graders decide so (docs/evaluation.md).
    """
    opened: list[int] = []  # where the content of each open box starts, 0 for other braces
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
    """What `last_boxed` finds, None where it is blank or too long to be an answer."""
    boxed = last_boxed(text)
    return boxed if boxed and boxed.strip() and len(boxed) <= _LONGEST else None


def same_whole_number(answer: str, gold: str) -> bool | None:
    """Whether two whole numbers are equal; None where one is not plainly one: math-verify has to say.

    Plainly means a sign or none and 1 to 20 digits. Of such a text math-verify makes that sympy
    Integer and the text itself; it compares Integers with Integers by value (rounding enters only
    where one side is a Float) and texts with texts letter by letter, and equal letters are equal
    numbers. So comparing the numbers gives its grade.
    """
    if not _WHOLE.fullmatch(answer) or not _WHOLE.fullmatch(gold):
        return None
    return int(answer) == int(gold)
