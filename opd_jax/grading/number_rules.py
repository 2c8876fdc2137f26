r"""Rules for numbers: exact and decimal values, numerals of a base, ratios and times.

A rule takes an answer, a gold answer and `same`, which compares parts of them. It returns a verdict, or
None where it does not apply and math-verify decides (equivalence.decide).
"""

import dataclasses
import itertools
import re
from collections.abc import Callable
from fractions import Fraction
from math import gcd

from opd_jax.grading.extract import letters

Same = Callable[[str, str], bool]  # whether a part of an answer agrees with a part of a gold answer

FONT = (
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|sl|up|md|lf|normal)?|math(?:rm|bf|it|sf|tt|normal)|operatorname\*?"
    r"|[mhf]box|emph|underline|boldsymbol|pmb|bm)\s*"
)
_MINUS = str.maketrans("−－﹣", "---")  # Unicode's minus signs
# A number in any font, and e, i and pi in roman type.
_WRAPPED = re.compile(
    rf"{FONT}\{{\s*((?:\\?\$|[-+(.])*\d[^{{}}]*)\}}|\\math(?:rm|it)\{{\s*([ei]|\\pi)\s*\}}"
)
# 1e5, 2.5e-05, 3.E2, .5e1; not 2e-1, which is ambiguous, nor x_1e5.
_SCIENTIFIC = re.compile(
    r"(?<![\w.\\])(\d+\.\d*|\.\d+|\d+(?=[eE](?:\d|[+-]\d\d)))[eE]([+-]?\d{1,4})(?!\d|\.\d)"
)


def without_fonts(text: str) -> str:
    r"""Take numbers out of \text{} and similar commands: \text{073} becomes 073, x=\mathbf{5} becomes x=5.

    Unicode's minus signs become ASCII's.
    """
    return _WRAPPED.sub(lambda match: match[1] or f"{match[2]} ", text.translate(_MINUS))


def without_exponents(text: str) -> str:
    r"""Write 2.5e-05 as 2.5 \cdot 10^{-5}; math-verify reads the e as Euler's number.

    `2e-1` is unchanged: it may be 0.2, or twice e minus 1. `numbers` accepts either.
    """
    return _SCIENTIFIC.sub(
        lambda match: rf"{match[1].rstrip('.')} \cdot 10^{{{int(match[2])}}}", text
    )


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_POWER = r"[eE]([+-]?\d+)|(?:\\times|\\cdot|\*|×)10\^(?:\{([+-]?\d+)\}|(\d))"
_DECIMAL = re.compile(rf"([+-]?)({_DIGITS}?(?:\.\d*)?)(?:{_POWER})?")
_RATIO = re.compile(r"([+-]?)(?:\\frac\{([+-]?\d+)\}\{(\d+)\}|\\frac(\d)(\d)|(\d+)/(\d+))")
_AMBIGUOUS = re.compile(r"[+-]?\d+e[+-]\d")
_PRECISION = Fraction(1, 10_000)


def exact(text: str) -> Fraction | None:
    """Return the value of an integer, fraction or decimal number, maybe times a power of ten; else None."""
    plain = letters(text.replace("\\$", "").replace("{,}", ","))
    if not plain or len(plain) > 100 or re.search(r",(?!\\!)[\s~\\]", text):  # 100, 200 is a list
        return None
    plain = re.sub(r"^([+-]?)10\^", r"\g<1>1\\cdot10^", plain)
    if match := _RATIO.fullmatch(plain):
        upper, lower = (int(digits) for digits in match.groups()[1:] if digits)
        if not lower:
            return None
        value = Fraction(upper, lower)
    elif (match := _DECIMAL.fullmatch(plain)) and re.search(r"\d", match[2]):
        power = match[3] or match[4] or match[5] or "0"
        if len(power) > 5:
            return None
        value = Fraction(match[2].replace(",", "").rstrip(".")) * Fraction(10) ** int(power)
    else:
        return None
    return -value if match[1] == "-" else value


def numbers(answer: str, gold: str, same: Same) -> bool | None:
    """Integers and fractions agree exactly; other decimals to six places, as in math-verify, and to 1e-4.

    The relative limit matters below 0.01, where six places are fewer than four digits.
    """
    parsed, parsed_gold = exact(answer), exact(gold)
    if parsed is None or parsed_gold is None:
        return None
    if parsed == parsed_gold:
        return True
    if any(_AMBIGUOUS.fullmatch(letters(text)) for text in (answer, gold)):
        return None
    decimal = any(re.search(r"[.e]|10\^", text.rstrip(". ")) for text in (answer, gold))
    if not decimal or 1 in (parsed.denominator, parsed_gold.denominator):
        return False
    near = abs(parsed - parsed_gold) <= _PRECISION * max(abs(parsed), abs(parsed_gold))
    return near and round(parsed, 6) == round(parsed_gold, 6)


_BASES = (
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
_WORDS = {word: base for base, word in enumerate(_BASES, start=2)} | {"sixteen": 16}
_NUMERAL = re.compile(
    r"([+-]?)\(?([0-9A-Za-z]+(?:,[0-9A-Za-z]+)*(?:\.[0-9A-Za-z]+)?)\)?"
    r"(?:_\{?\(?(?:base)?|\(?base)(\d{1,2}|[A-Za-z]+)\)?\}?\)?"
)
# Inside an expression: 52_9+1. An index of a letter, a_2, is no base.
_INSIDE = re.compile(
    r"(?<![\w.\\}])\(?(\d[0-9A-Z]*)\)?_(?:\{\(?(\d{1,2}|[A-Za-z]+)\)?\}|(\d|[A-Za-z]))"
)


@dataclasses.dataclass(frozen=True)
class Numeral:
    """Digits without leading zeros, and their base: a number, or a letter in its place."""

    digits: str
    base: int | str


def numeral(text: str) -> Numeral | None:
    r"""Return a numeral with its base: 52_9, (11001)_{2}, A3_{16}, 2143 \text{ base } 5; None for others."""
    plain = letters(re.sub(rf"{FONT}\{{([^{{}}]*)\}}", r"\1", text)).rpartition("=")[2]
    match = _NUMERAL.fullmatch(plain)
    if match is None:
        return None
    base = _base(match[3])
    digits = match[2].replace(",", "").upper()
    if isinstance(base, str):
        is_number = digits.replace(".", "").isdigit()
        return Numeral(match[1].strip("+") + _shortest(digits), base) if is_number else None
    if not 2 <= base <= 36:
        return None
    if not digits.replace(".", "").isdigit():  # a_{12} is a term of a sequence
        is_number = re.search(r"\d", digits) or re.search(r"[A-Z]{2}", match[2])
        if not is_number or any(int(digit, 36) >= base for digit in digits.replace(".", "")):
            return None
    return Numeral(match[1].strip("+") + _shortest(digits), base)


def _base(text: str) -> int | str:
    return int(text) if text.isdigit() else _WORDS.get(text.lower(), text)


def _shortest(digits: str) -> str:
    """Return the digits without leading and trailing zeros that do not matter: 0101.10 is 101.1."""
    integer, point, fraction = digits.partition(".")
    fraction = fraction.rstrip("0")
    return (integer.lstrip("0") or "0") + (point + fraction if fraction else "")


def bases(answer: str, gold: str, same: Same) -> bool | None:
    """Numerals agree if digits and base agree; a base missing on one side is that of the other side.

    Inside expressions they count as their values, 52_9+1 as 47+1; bases that are letters must be the same
    on both sides.
    """
    parsed, parsed_gold = numeral(answer), numeral(gold)
    if parsed and parsed_gold:
        return parsed == parsed_gold
    if _INSIDE.search(answer) and _INSIDE.search(gold):
        letters_of = [
            sorted(b for m in _INSIDE.finditer(text) if isinstance(b := _base(m[2] or m[3]), str))
            for text in (answer, gold)
        ]
        if letters_of[0] != letters_of[1]:
            return False
        values = [_INSIDE.sub(_value_of, text) for text in (answer, gold)]
        return same(*values) if values != [answer, gold] else None
    one = parsed or parsed_gold
    if one is None:
        return None
    bare = letters(gold if parsed else answer).strip("()").replace(",", "").upper()
    if not re.fullmatch(r"[+-]?[0-9A-Z]+(\.[0-9A-Z]+)?", bare):
        return None
    return "-" * bare.startswith("-") + _shortest(bare.lstrip("+-")) == one.digits


def _value_of(match: re.Match[str]) -> str:
    """Return the value of a numeral in an expression; its text where its base is a letter or too small."""
    base = _base(match[2] or match[3])
    try:
        return f"{int(match[1], base)}" if isinstance(base, int) else match[0]
    except ValueError:
        return match[0]


_TERM = r"(?:\d|\.|\\sqrt|\\pi|\\frac|[{}+\-/^])+"
_COLONS = re.compile(
    rf"[(\[]?({_TERM}(?::{_TERM})+)[)\]]?(?:\\text\{{)?(?:([ap])\.?m\.?)?\}}?", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Colons:
    """Terms separated by colons; `half` is "a" or "p" if the text says a.m. or p.m."""

    terms: tuple[str, ...]
    half: str = ""

    @property
    def digital(self) -> bool:
        """Whether it looks like a time: an hour, then groups of two digits below 60."""
        hour, *others = self.terms
        hours = re.fullmatch(r"\d\d?", hour) is not None and int(hour) <= 24
        return hours and all(re.fullmatch(r"[0-5]\d", term) for term in others)

    @property
    def clock(self) -> bool:
        """Whether it can only be a time: it says a.m. or p.m., or pads with zeros as in 3:05."""
        padded = self.digital and any(term.startswith("0") for term in self.terms)
        return bool(self.half) or padded

    @property
    def time(self) -> bool:
        """Whether it is a time, or a quarter of an hour not in lowest terms as a ratio: 10:30, not 7:15."""
        quarter = self.digital and self.terms[-1] in ("15", "30", "45")
        return self.clock or (quarter and gcd(*map(int, self.terms)) != 1)


def colons(text: str) -> Colons | None:
    r"""Return a ratio or a time: 1:2, 1:\sqrt{3}:2, 10:30, 3:00 \text{ p.m.}; None for others."""
    match = _COLONS.fullmatch(letters(text).replace("\\colon", ":"))
    if match is None:
        return None
    terms = tuple(match[1].split(":"))
    if any(term.count("{") != term.count("}") for term in terms):
        return None
    return Colons(terms, (match[2] or "").lower())


def ratios(answer: str, gold: str, same: Same) -> bool | None:
    r"""Ratios agree if they are proportional, times if they are the same; 10:30 is not \frac{1}{3}.

    Two texts are compared as times if either can only be a time (3:05, 10:30 a.m.), or if the gold is a
    quarter of an hour (4:30) and the answer could be a time on a clock (2:15 could, 2:5 against 12:30
    could not).
    """
    parsed, parsed_gold = colons(answer), colons(gold)
    if parsed and parsed_gold:
        if parsed.clock or parsed_gold.clock or (parsed.digital and parsed_gold.time):
            halves = {parsed.half, parsed_gold.half} - {""}
            times = [[term.lstrip("0") for term in text.terms] for text in (parsed, parsed_gold)]
            return times[0] == times[1] and len(halves) < 2
        return len(parsed.terms) == len(parsed_gold.terms) and all(
            map(same, _quotients(parsed.terms), _quotients(parsed_gold.terms))
        )
    one, other = (parsed, gold) if parsed else (parsed_gold, answer)
    if one is None or "=" in other:
        return None
    if one.time or len(one.terms) > 2:
        return False
    (quotient,) = _quotients(one.terms)
    return same(quotient, other) if parsed else same(other, quotient)


def _quotients(terms: tuple[str, ...]) -> list[str]:
    return [rf"\frac{{{one}}}{{{other}}}" for one, other in itertools.pairwise(terms)]
