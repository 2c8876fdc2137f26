"""Extract the answer from a text, and parse answers that are numbers or lists.

Imports only `re` and modules like it: the grading processes and the one that starts them share this file.
"""

import dataclasses
import math
import re

from opd_jax.grading.boxed import boxed_answer

# Fall-backs for texts without a box, tried in the configured order (config: eval.fallbacks).
# answer_line: DAPO's prompt asks for a last line "Answer: $Answer" (2604.13016, section 5.2).
# after_think: LUFFY's reward reads the text after </think>, whatever it contains.
# last_number: the last resort of Qwen2.5-Math (evaluation/parser.py, use_last_number).
FALLBACKS = ("answer_line", "after_think", "last_number")
# plain: math-verify's comparison. units: Minerva, numbers with units and powers of ten, equal within a
# relative 1e-4. several: OlympiadBench, lists of answers in any order.
RULES = ("plain", "units", "several")
# guarded: the rules of equivalence.py, then math-verify. math_verify: math-verify alone.
GRADERS = ("guarded", "math_verify")
RELATIVE = 1e-4  # Qwen2.5-Math, evaluation/grader.py: isclose(reference, prediction, rel_tol=1e-4)

_LINE = re.compile(r"(?i)\banswer[*_]*\s*[:：][*_]*[ \t]*([^\n]+)")
_TAIL = 4_000  # characters at the end of a text that are searched
_LONGEST = 2_000  # characters of an answer line


@dataclasses.dataclass(frozen=True)
class Found:
    """An answer: `text` is the expression or, if `free`, prose in which math-verify must find it."""

    text: str
    free: bool = False


def find(text: str, fallbacks: tuple[str, ...] = ()) -> Found | None:
    r"""Return the answer of a text: the content of its last \boxed{}, else the result of a fall-back.

    A text that ends inside its last box has no boxed answer (boxed.last_boxed).
    """
    box = boxed_answer(text)
    if box is not None:
        return Found(box)
    finders = dict(zip(FALLBACKS, (_answer_line, _after_think, _last_number), strict=True))
    for name in fallbacks:
        if (answer := finders[name](text)) is not None:
            return answer
    return None


def _answer_line(text: str) -> Found | None:
    lines = _LINE.findall(text)
    if not lines or len(lines[-1]) > _LONGEST:
        return None
    answer = lines[-1].strip().strip("*_").strip().rstrip(".").strip()
    if len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer.strip("$").strip()
    return Found(answer) if answer else None


def _after_think(text: str) -> Found | None:
    _, mark, after = text.rpartition("</think>")
    after = after.strip()
    return Found(after[-_TAIL:], free=True) if mark and after else None


def _last_number(text: str) -> Found | None:
    r"""Return the last number of a text without any \boxed, as Qwen2.5-Math does."""
    if "\\boxed" in text:
        return None
    numbers = re.findall(r"-?\d*\.?\d+", text[-_TAIL:].replace(",", ""))
    return Found(numbers[-1]) if numbers else None


# Blanks between digits are kept unless they group thousands: 1 1/2 is not 11/2.
_BLANK = r"(?<![\d\s])\s+|\s+(?![\d\s])|\s+(?=\d{3}(?!\d))"
_SPACE = re.compile(rf"\\[,;:!\s]|\\q?quad(?![a-z])|~|{_BLANK}|\\left(?![a-z])|\\right(?![a-z])|\$")


_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau"
    " upsilon phi chi psi omega varepsilon vartheta varkappa varpi varrho varsigma varphi Gamma Delta"
    " Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
).replace(" ", "|")
# A variable: one letter, maybe with an index and primes. \ln x, which `letters` turns into \lnx, is not.
NAME = rf"(?:[A-Za-z]|\\(?:{_GREEK}))(?:_\{{?\w+\}}?)?'*"


def letters(text: str) -> str:
    """Remove from an expression what changes only its look; equal letters are equal answers."""
    text = _SPACE.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return text.rstrip(".")


def same_letters(answer: str, gold: str) -> bool:
    """Return whether two expressions have equal letters; `x = 5` equals `5`."""
    answer, gold = letters(answer), letters(gold)
    if answer == gold or "=" in gold:
        return answer == gold
    named = re.fullmatch(rf"{NAME}=(.+)", answer, re.DOTALL)
    return named is not None and named[1] == gold


_MANTISSA = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?"
_NUMBER = re.compile(
    rf"({_MANTISSA})(?:[eE]([+-]?\d+)|(?:(?:\\times|\\cdot|\*|×)?10\^(?:\{{([+-]?\d+)\}}|(-?\d))))?"
)
# Units after a number: \mathrm{~cm}, \text{ km/h}, \%, ^\circ, cm, with powers; x alone is not a unit.
_FONT = r"\\(?:mathrm|text|textrm|rm|operatorname|mathbf)"
_BARE = r"(?![abceiknprtxyz](?![A-Za-z]))[A-Za-zμΩÅ°]++"
_WORD = rf"(?:{_FONT}\{{[^{{}}]*\}}|\\(?:AA|Omega|mu|circ|degree)|{_BARE})"
_UNIT = re.compile(
    rf"(?:\\%|%|\^\{{?\\circ\}}?|(?:[/*·]|\\cdot|\\times)?{_WORD}(?:\^\{{?-?\d\}}?)?)++"
)


def number(text: str) -> float | None:
    r"""Return the value of a decimal number, maybe with a power of ten and a unit; None for other texts.

    4.5e33, 4.5\times 10^{33} \mathrm{erg/s}, 1,000, -1./3, 10^{-8}, 45^\circ. A percent sign is a unit.
    """
    plain = re.sub(r"\\(?:mathrm|text|textrm|rm|mathbf)\{[~\s]*\}", "", text)
    plain = letters(re.sub(r"\\[$]", "", plain)).replace("{,}", ",").lstrip("≈")
    plain = re.sub(r"^\\(?:approx|sim|simeq)", "", plain)
    if match := re.fullmatch(r"([+-]?\d+)\.?/(\d+)\.?", plain):
        return int(match[1]) / int(match[2]) if len(plain) < 40 and int(match[2]) else None
    if re.match(r"[+-]?10\^", plain):
        plain = plain.replace("10^", "1\\times10^", 1)
    match = _NUMBER.match(plain)
    if match is None or match[1] in ("", "+", "-", "."):
        return None
    rest = plain[match.end() :]
    if rest and not _UNIT.fullmatch(rest):
        return None
    mantissa = match[1].replace(",", "")
    exponent = next((part for part in match.groups()[1:] if part), "0")
    if len(exponent) > 5 or len(mantissa) > 40:
        return None
    try:
        value = float(f"{mantissa}e{exponent}")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def close(a: float, b: float) -> bool:
    """Return whether two numbers are equal within 1e-4 of the larger."""
    return math.isclose(a, b, rel_tol=RELATIVE)


def parts(text: str) -> list[str]:
    r"""Split a list into its answers: at commas, semicolons, "and" and "or" outside of brackets.

    Braces around the list are removed, \pm stands for two answers. Spacing commands are blanks.
    """
    text = re.sub(r"(?<!\\)\\[,;:!]", " ", text)
    text = text.replace("$", " ").replace("\\{", "{").replace("\\}", "}").replace("\\left{", "{")
    text = text.replace("\\right}", "}").strip().rstrip(".").strip()
    text = re.sub(r"\\text\s*\{\s*,?\s*(and|or)\s*\}", r" \1 ", text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3})", "", text)
    while text.startswith("{") and _closes(text) == len(text) - 1:
        text = text[1:-1].strip()
    pieces, depth, start = [], 0, 0
    for mark in re.finditer(r"[()\[\]{},;]|\s(?:and|or)\s", text):
        if mark[0] in "([{":
            depth += 1
        elif mark[0] in ")]}":
            depth -= 1
        elif depth <= 0:
            pieces.append(text[start : mark.start()])
            start = mark.end()
    pieces.append(text[start:])
    clean = [part.strip() for part in pieces if part.strip()]
    both = [
        [part.replace("\\pm", "+", 1), part.replace("\\pm", "-", 1)]
        if part.count("\\pm") == 1 else [part]
        for part in clean
    ]  # fmt: skip
    return [part for pair in both for part in pair]


def _closes(text: str) -> int:
    """Return the position at which the bracket that opens a text closes; -1 where it does not."""
    depth = 0
    for mark in re.finditer(r"[{}]", text):
        depth += 1 if mark[0] == "{" else -1
        if depth == 0:
            return mark.start()
    return -1
