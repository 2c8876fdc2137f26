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
# What may stand before a value in a list of them: AB, \text{length}, \angle ABC, \overline{AB}, f(1).
_LONG = re.compile(
    rf"(?:\\?[A-Za-z]+|{FONT}\{{[^{{}}=]*\}}|\\[a-z]+\{{[A-Za-z]+\}})(?:_(?:\w|\{{\w+\}}))?'*(?:\([^()=]*\))?"
)
# A value of a function at numbers: f(1), P(-2,3).
_AT = re.compile(
    r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\w|\{\w+\}))?'*\([+-]?[\d./]+(?:,[+-]?[\d./]+)*\)"
)
_ELLIPSIS = re.compile(r"\\(?:[lc]?dots|dots[cbmio])(?![a-z])|\.\.\.|…")


def members(text: str) -> tuple[str, list[str]]:
    r"""The brackets around a text, () or [] or \{\} or none, and the members of the list inside.

    A bare { encloses nothing that a reader sees.
    """
    plain = letters(text).replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
    marks = plain.replace("\\{", "⟅").replace("\\}", "⟆")  # one character a bracket
    if marks[:1] in ("(", "[", "⟅") and _closing(marks) == len(marks) - 1:
        inside = marks[1:-1].replace("⟅", "\\{").replace("⟆", "\\}")
        return (marks[0] + marks[-1]).replace("⟅", "{").replace("⟆", "}"), parts(inside)
    return "", parts(text)


def _closing(text: str) -> int:
    """Where the bracket closes that opens a text; -1 where it does not."""
    depth = 0
    for place, mark in enumerate(text):
        depth += (mark in "([{⟅") - (mark in ")]}⟆")
        if depth == 0:
            return place
    return -1


def matched(answers: Sequence[T], golds: Sequence[T], same: Callable[[T, T], bool]) -> bool:
    """Whether the answers agree with the golds in some order, one with one."""
    left = list(golds)
    for answer in answers:
        found = next((gold for gold in left if same(answer, gold)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def bracket(text: str) -> str | None:
    r"""`set` for \{1,2\}, `tuple` for (1,2); None for others."""
    around, inside = members(text)
    if around == "{}":
        return "set"
    return "tuple" if around == "()" and len(inside) > 1 else None


def brackets(answer: str, gold: str, same: Same) -> bool | None:
    r"""A tuple is no set: (1,2) is not \{1,2\}. A list without brackets may be either.

    Members with a base or a colon are read as they are alone: (52_9,1) is not (52_8,1).
    """
    if {bracket(answer), bracket(gold)} == {"set", "tuple"}:
        return False
    (around, given), (gold_around, wanted) = members(answer), members(gold)
    if not around or around != gold_around or len(given) != len(wanted):
        return None
    if not any(numeral(part) or colons(part) for part in given + wanted):
        return None
    if around != "{}":
        return all(map(same, given, wanted))
    return all(any(same(part, other) for other in wanted) for part in given) and all(
        any(same(part, other) for part in given) for other in wanted
    )


def sequence(text: str) -> list[str] | None:
    r"""Members of a list with an ellipsis, which is a member of its own; None for others.

    A decimal with more digits to come, 0.142857\ldots, is no list.
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
    given, wanted = sequence(answer), sequence(gold)
    if given is None and wanted is None:
        return None
    if brackets(answer, gold, same) is False:
        return False
    given, wanted = given or members(answer)[1], wanted or members(gold)[1]
    one, other = _progression(given), _progression(wanted)
    if one and other:
        return one == other
    return len(given) == len(wanted) and all(
        part == gold_part if "…" in part + gold_part else same(part, gold_part)
        for part, gold_part in zip(given, wanted, strict=True)
    )


def _progression(shown: list[str]) -> tuple[int, int, int | None] | None:
    """(first, step, last; None without an end) of 1, 3, 5, …, 99 or of all its members."""
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
    """(name, value) of x=3, y=4 or (x,y)=(3,4), at least two, or of f(1)=3 alone; None for others.

    math-verify reads no more than the f of f(1)=3.
    """
    if tuples := re.fullmatch(r"(\(.*\))=(\(.*\))", letters(text)):
        left, right = members(tuples[1])[1], members(tuples[2])[1]
        found = [*zip(left, right, strict=False)] if len(left) == len(right) else []
    else:
        listed = parts(re.sub(r"\\q?quad(?![a-z])|\\\\", ",", text))
        found = [(one[0], one[2]) for one in (letters(part).partition("=") for part in listed)]
    plain = all(
        (re.fullmatch(NAME, name) or _LONG.fullmatch(name)) and value and "=" not in value
        for name, value in found
    )
    if not plain or not found:
        return None
    if len(found) == 1 and (not _AT.fullmatch(found[0][0]) or _AT.search(found[0][1])):
        return None
    return [(re.sub(rf"{FONT}(?=\{{)|[{{}}]", "", name), value) for name, value in found]


def names(answer: str, gold: str, same: Same) -> bool | None:
    """Values agree name by name; a tuple or a list without names has the order of the names.

    One name with several values, x=1 or x=2, is a set of values.
    """
    given, wanted = named(answer), named(gold)
    if given and wanted:
        return len(given) == len(wanted) and all(
            matched([v for n, v in given if n == name], [v for n, v in wanted if n == name], same)
            for name in {name for name, _ in given}
        )
    one, text = (given, gold) if given else (wanted, answer)
    if one is None:
        return None
    kind, (_, others) = bracket(text), members(text)
    if len(one) == 1:
        value = one[0][1]
        return None if "=" in text else same(value, text) if given else same(text, value)
    if len(others) < 2 or any("=" in other for other in others):
        return None
    several = len({name for name, _ in one}) > 1
    if several and (kind == "tuple" or (wanted and kind is None)):
        values = [value for _, value in _in_order(one)]
        pair = (values, others) if given else (others, values)
        return len(values) == len(others) and all(map(same, *pair))
    if kind == "tuple" or (several and wanted):
        return False  # a tuple is no set of solutions; a set does not say which value is whose
    values = [value for _, value in one]
    return matched(values, others, same) if given else matched(others, values, same)


def _in_order(named: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """In alphabetical order where the names are a run of the alphabet (x, y, z), else as written."""
    ordered = sorted(named)
    run = "".join(name for name, _ in ordered)
    in_alphabet = (
        len(run) == len(named) and run.isalpha() and ord(run[-1]) - ord(run[0]) + 1 == len(run)
    )
    return ordered if in_alphabet else named
