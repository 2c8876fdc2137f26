r"""Rules for lists: sets and tuples, lists with an ellipsis, named values.

A rule takes an answer, a gold answer and `same`, which compares parts of them. It returns a verdict, or
None where it does not apply and math-verify decides (equivalence.decide).
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from opd_jax.grading.extract import NAME, letters, parts
from opd_jax.grading.number_rules import FONT, Same, colons, numeral

T = TypeVar("T")
# Names before a value in a list: AB, \text{length}, \angle ABC, \overline{AB}, f(1).
_LONG = re.compile(
    rf"(?:\\?[A-Za-z]+|{FONT}\{{[^{{}}=]*\}}|\\[a-z]+\{{[A-Za-z]+\}})(?:_(?:\w|\{{\w+\}}))?'*(?:\([^()=]*\))?"
)
# A value of a function at numbers: f(1), P(-2,3).
_AT = re.compile(
    r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\w|\{\w+\}))?'*\([+-]?[\d./]+(?:,[+-]?[\d./]+)*\)"
)
_ELLIPSIS = re.compile(r"\\(?:[lc]?dots|dots[cbmio])(?![a-z])|\.\.\.|…")


def members(text: str) -> tuple[str, list[str]]:
    r"""Return the brackets around a text, () or [] or \{\} or none, and the members of the list inside.

    A bare { is invisible to a reader and counts as no bracket.
    """
    plain = letters(text).replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
    marks = plain.replace("\\{", "⟅").replace("\\}", "⟆")  # one character a bracket
    if marks[:1] in ("(", "[", "⟅") and _closing(marks) == len(marks) - 1:
        inside = marks[1:-1].replace("⟅", "\\{").replace("⟆", "\\}")
        return (marks[0] + marks[-1]).replace("⟅", "{").replace("⟆", "}"), parts(inside)
    return "", parts(text)


def _closing(text: str) -> int:
    """Return the position at which the bracket that opens a text closes; -1 where it does not."""
    depth = 0
    for place, mark in enumerate(text):
        depth += (mark in "([{⟅") - (mark in ")]}⟆")
        if depth == 0:
            return place
    return -1


def matched(answers: Sequence[T], golds: Sequence[T], same: Callable[[T, T], bool]) -> bool:
    """Return whether the answers agree with the golds one to one, in some order."""
    remaining = list(golds)
    for answer in answers:
        match = next((gold for gold in remaining if same(answer, gold)), None)
        if match is None:
            return False
        remaining.remove(match)
    return not remaining


def bracket(text: str) -> str | None:
    r"""Return `set` for \{1,2\}, `tuple` for (1,2); None for others."""
    around, inside = members(text)
    if around == "{}":
        return "set"
    return "tuple" if around == "()" and len(inside) > 1 else None


def brackets(answer: str, gold: str, same: Same) -> bool | None:
    r"""A tuple is not a set: (1,2) is not \{1,2\}. A list without brackets may be either.

    Members with a base or a colon follow the rules for these: (52_9,1) is not (52_8,1).
    """
    if {bracket(answer), bracket(gold)} == {"set", "tuple"}:
        return False
    (around, parsed), (gold_around, parsed_gold) = members(answer), members(gold)
    if not around or around != gold_around or len(parsed) != len(parsed_gold):
        return None
    if not any(numeral(part) or colons(part) for part in parsed + parsed_gold):
        return None
    if around != "{}":
        return all(map(same, parsed, parsed_gold))
    return all(any(same(part, other) for other in parsed_gold) for part in parsed) and all(
        any(same(part, other) for part in parsed) for other in parsed_gold
    )


def sequence(text: str) -> list[str] | None:
    r"""Return the members of a list with an ellipsis, including the ellipsis; None for other texts.

    A decimal with more digits to come, 0.142857\ldots, is not a list.
    """
    if not _ELLIPSIS.search(text):
        return None
    plain = _ELLIPSIS.sub("…", text)
    if re.fullmatch(r"[+-]?\d*\.\d+…", letters(plain)):
        return None
    plain = re.sub(r"(?<=[^+\-*\s])\s*,?\s*…\s*,?\s*(?![+\-*])", ",…,", plain)
    return [letters(member) for member in members(plain)[1]]


def ellipses(answer: str, gold: str, same: Same) -> bool | None:
    r"""Lists with \ldots agree as progressions of integers, or else member by member."""
    parsed, parsed_gold = sequence(answer), sequence(gold)
    if parsed is None and parsed_gold is None:
        return None
    if brackets(answer, gold, same) is False:
        return False
    parsed, parsed_gold = parsed or members(answer)[1], parsed_gold or members(gold)[1]
    one, other = _progression(parsed), _progression(parsed_gold)
    if one and other:
        return one == other
    return len(parsed) == len(parsed_gold) and all(
        part == gold_part if "…" in part + gold_part else same(part, gold_part)
        for part, gold_part in zip(parsed, parsed_gold, strict=True)
    )


def _progression(shown: list[str]) -> tuple[int, int, int | None] | None:
    """Return (first, step, last; None without an end) of 1, 3, 5, …, 99 or of all its members."""
    if not all(re.fullmatch(r"[+-]?\d{1,9}|…", one) for one in shown) or shown.count("…") > 1:
        return None
    cut = shown.index("…") if "…" in shown else len(shown)
    head, tail = [*map(int, shown[:cut])], [*map(int, shown[cut + 1 :])]
    if len(head) + len(tail) < 2 or not head:
        return None
    step = head[1] - head[0] if len(head) > 1 else 1 if tail[0] > head[0] else -1
    last = tail[-1] if tail else None if "…" in shown else head[-1]
    steps = [b - a for run in (head, tail) for a, b in itertools.pairwise(run)]
    if not step or any(one != step for one in steps):
        return None
    if last is not None and ((last - head[0]) % step or (last - head[-1]) * step < 0):
        return None
    return head[0], step, last


def named(text: str) -> list[tuple[str, str]] | None:
    """Return (name, value) of x=3, y=4 or (x,y)=(3,4), at least two, or of f(1)=3 alone; None for others.

    math-verify parses only the f of f(1)=3.
    """
    if tuples := re.fullmatch(r"(\(.*\))=(\(.*\))", letters(text)):
        left, right = members(tuples[1])[1], members(tuples[2])[1]
        pairs = [*zip(left, right, strict=False)] if len(left) == len(right) else []
    else:
        listed = parts(re.sub(r"\\q?quad(?![a-z])|\\\\", ",", text))
        pairs = [(one[0], one[2]) for one in (letters(part).partition("=") for part in listed)]
    plain = all(
        (re.fullmatch(NAME, name) or _LONG.fullmatch(name)) and value and "=" not in value
        for name, value in pairs
    )
    if not plain or not pairs:
        return None
    if len(pairs) == 1 and (not _AT.fullmatch(pairs[0][0]) or _AT.search(pairs[0][1])):
        return None
    return [(re.sub(rf"{FONT}(?=\{{)|[{{}}]", "", name), value) for name, value in pairs]


def names(answer: str, gold: str, same: Same) -> bool | None:
    """Values agree name by name; a tuple or a list without names has the order of the names.

    One name with several values, x=1 or x=2, is a set of values.
    """
    parsed, parsed_gold = named(answer), named(gold)
    if parsed and parsed_gold:
        return len(parsed) == len(parsed_gold) and all(
            matched(
                [v for n, v in parsed if n == name], [v for n, v in parsed_gold if n == name], same
            )
            for name in {name for name, _ in parsed}
        )
    one, text = (parsed, gold) if parsed else (parsed_gold, answer)
    if one is None:
        return None
    kind, (_, others) = bracket(text), members(text)
    if len(one) == 1:
        value = one[0][1]
        return None if "=" in text else same(value, text) if parsed else same(text, value)
    if len(others) < 2 or any("=" in other for other in others):
        return None
    several = len({name for name, _ in one}) > 1
    if several and (kind == "tuple" or (parsed_gold and kind is None)):
        values = [value for _, value in _in_order(one)]
        pair = (values, others) if parsed else (others, values)
        return len(values) == len(others) and all(map(same, *pair))
    if kind == "tuple" or (several and parsed_gold):
        return False  # a tuple is not a set of solutions; a set does not assign values to names
    values = [value for _, value in one]
    return matched(values, others, same) if parsed else matched(others, values, same)


def _in_order(named: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Sort by name where the names are consecutive letters (x, y, z); else keep the order."""
    ordered = sorted(named)
    run = "".join(name for name, _ in ordered)
    in_alphabet = (
        len(run) == len(named) and run.isalpha() and ord(run[-1]) - ord(run[0]) + 1 == len(run)
    )
    return ordered if in_alphabet else named
