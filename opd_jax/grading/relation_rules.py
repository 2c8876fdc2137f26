r"""Rules for relations: equations of numbers, identities, inequalities against intervals.

A rule takes an answer, a gold answer and `same`, which compares parts of them. It returns a verdict, or
None where it does not apply and math-verify decides (equivalence.decide).
"""

import dataclasses
import re

from opd_jax.grading.extract import NAME, letters, parts
from opd_jax.grading.list_rules import matched
from opd_jax.grading.number_rules import Same, exact

_FUNCTIONS = re.compile(r"\\(?:frac|sqrt|pi|cdot|times|div|left|right|log|ln|sin|cos|tan)(?![a-z])")


def sides(text: str) -> list[str] | None:
    """Return the sides of one equation, or of a chain of them; None for others, lists among them."""
    plain = letters(text)
    if "=" not in plain or re.search(r"[<>]|\\(?:[lg]eq?|neq?|approx|equiv|in)(?![a-z])", plain):
        return None
    chain = plain.split("=")
    return chain if all(chain) and len(parts(text)) == 1 else None


def equations(answer: str, gold: str, same: Same) -> bool | None:
    """An equation of numbers counts as the value of its sides, unless these contradict each other.

    math-verify subtracts the sides, so that 3=3 equals 5=5.
    """
    parsed, parsed_gold = sides(answer) or [answer], sides(gold) or [gold]
    equation = [side for chain in (parsed, parsed_gold) if len(chain) > 1 for side in chain]
    if not equation or not all(map(_constant, equation)):
        return None
    agreed = any(same(side, parsed_gold[-1]) for side in parsed)
    return agreed and not any(_contradicts(side, parsed_gold[-1]) for side in parsed)


def _constant(side: str) -> bool:
    return not re.search(r"[A-Za-z]", _FUNCTIONS.sub("", side))


def _contradicts(one: str, other: str) -> bool:
    """Return whether two numbers are more than 1 % apart; nearer ones may be rounded, as in 1/3 = 0.33.

    Integers are not rounded: 101=100 contradicts itself.
    """
    a, b = exact(one), exact(other)
    if a is None or b is None:
        return False
    if a.denominator == b.denominator == 1 and not re.search(r"[.eE^]", one + other):
        return a != b
    return abs(a - b) > max(abs(a), abs(b)) / 100


def identities(answer: str, gold: str, same: Same) -> bool | None:
    """An equation that always holds agrees with another only if the sides are the same: x=x is not y=y."""
    parsed, parsed_gold = sides(answer), sides(gold)
    if parsed is None or parsed_gold is None or len(parsed) != 2 or len(parsed_gold) != 2:
        return None
    if not (same(*parsed) or same(*parsed_gold)):
        return None
    return all(map(same, parsed, parsed_gold)) or all(map(same, parsed, parsed_gold[::-1]))


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval: its bounds as texts, and whether each belongs to it."""

    bounds: tuple[str, str]
    closed: tuple[bool, bool]


@dataclasses.dataclass(frozen=True)
class Ranges:
    """A union of intervals; `form` is interval, inequality or membership, `name` the variable or empty."""

    pieces: tuple[Range, ...]
    form: str
    name: str = ""


_SIGNS = {
    r"\\(?:leqslant|leqq|leq|le)(?![a-z])|<=": "≤", r"\\(?:geqslant|geqq|geq|ge)(?![a-z])|>=": "≥",
    r"\\neq?(?![a-z])": "≠", r"\\lt(?![a-z])": "<", r"\\gt(?![a-z])": ">", "∞": r"\\infty",
}  # fmt: skip
_OR = re.compile(
    r"\\(?:cup|lor|vee)(?![a-z])|∪|\\text\s*\{\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])"
)
_BUILDER = re.compile(r"\\\{([A-Za-z])(?:\\in\\mathbb\{?R\}?)?(?:\\mid|\\vert|\||:)(.*)\\\}")
_NO_VARIABLES = ("e", "\\pi", "\\infty")
_FREE = (False, False)
_MIRRORED = {"<": ">", "≤": "≥", ">": "<", "≥": "≤"}


def ranges(text: str) -> Ranges | None:
    r"""Return intervals, or inequalities solved for one variable: (0,12.5), 0<x<12.5, x \in [3,\infty)."""
    for pattern, sign in _SIGNS.items():
        text = re.sub(pattern, sign, text)
    if builder := _BUILDER.fullmatch(letters(text)):
        text = builder[2]
    name, member, rest = text.partition("\\in")
    if member and re.fullmatch(NAME, letters(name)) and not re.match("[a-z]", rest):
        interval = ranges(rest)
        return interval and dataclasses.replace(interval, form="membership", name=letters(name))
    pieces: list[Range] = []
    variables = set()
    for part in map(letters, _OR.split(text)):
        solution = _inequality(part) or _interval(part)
        if solution is None:
            return None
        variables.add(solution[0])
        pieces += solution[1]
    if len(variables) != 1:
        return None
    variable = variables.pop()
    return Ranges(tuple(pieces), "inequality" if variable else "interval", variable)


def _interval(text: str) -> tuple[str, list[Range]] | None:
    bounds = parts(text[1:-1])
    if text[:1] not in ("(", "[", "]") or text[-1:] not in (")", "]", "[") or len(bounds) != 2:
        return None
    return "", [_range(bounds, (text[0] == "[", text[-1] == "]"))]


def _inequality(text: str) -> tuple[str, list[Range]] | None:
    """Return (variable, intervals) of x<3, 3≥x, 0<x≤1 or x≠3; None where it is not solved for a variable."""
    split = re.split(r"([<>≤≥≠])", text)
    terms, signs = split[::2], split[1::2]
    if len(signs) not in (1, 2) or not all(terms) or len(parts(text)) != 1:
        return None
    candidates = [t for t in terms if re.fullmatch(NAME, t) and t not in _NO_VARIABLES]
    variable = terms[1] if len(signs) == 2 else max(candidates, default="")  # x in a < x
    bounds = [term for term in terms if term != variable]
    inside = rf"(?<![A-Za-z\\]){re.escape(variable)}(?![A-Za-z])"
    if variable not in candidates or len(bounds) != len(signs):
        return None
    if any(re.search(inside, bound) for bound in bounds):
        return None
    if signs == ["≠"]:
        low, high = ["-\\infty", bounds[0]], [bounds[0], "\\infty"]
        return variable, [_range(low, _FREE), _range(high, _FREE)]
    if len(signs) == 1:
        sign = signs[0] if terms[0] == variable else _MIRRORED[signs[0]]
        closed = sign in "≤≥"
        if sign in "<≤":
            return variable, [_range(["-\\infty", bounds[0]], (False, closed))]
        return variable, [_range([bounds[0], "\\infty"], (closed, False))]
    if set(signs) <= {">", "≥"}:
        bounds, signs = bounds[::-1], [_MIRRORED[sign] for sign in signs[::-1]]
    if not set(signs) <= {"<", "≤"}:
        return None
    return variable, [_range(bounds, (signs[0] == "≤", signs[1] == "≤"))]


def _range(bounds: list[str], closed: tuple[bool, bool]) -> Range:
    """Return the interval; an end at infinity is open whatever its bracket."""
    lower, upper = (bound.lstrip("+") for bound in bounds)
    return Range(
        (lower, upper), (closed[0] and "\\infty" not in lower, closed[1] and "\\infty" not in upper)
    )


def inequalities(answer: str, gold: str, same: Same) -> bool | None:
    """An inequality solved for one variable agrees with the interval of its values, and the reverse."""
    parsed, parsed_gold = ranges(answer), ranges(gold)
    if parsed is None or parsed_gold is None:
        return None
    if parsed.form == parsed_gold.form:
        equal = parsed.form == "inequality" and parsed == parsed_gold
        return True if equal else None
    if parsed.name and parsed_gold.name and parsed.name != parsed_gold.name:
        return False
    return matched(parsed.pieces, parsed_gold.pieces, lambda one, other: _alike(one, other, same))


def _alike(parsed: Range, parsed_gold: Range, same: Same) -> bool:
    return parsed.closed == parsed_gold.closed and all(
        one == other or ("\\infty" not in one + other and same(one, other))
        for one, other in zip(parsed.bounds, parsed_gold.bounds, strict=True)
    )
