"""The rules that correct math-verify's verdict, in one table; docs/evaluation.md has an example of each.

`readable` rewrites numbers that math-verify reads as letters. `decide` applies the rules in order; a pair
to which none applies is left to math-verify. `refuted` rejects pairs that math-verify accepts wrongly. No
module of the rules imports sympy, so that processes that never evaluate an answer can use them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from opd_jax.grading import list_rules, number_rules, relation_rules
from opd_jax.grading.number_rules import Same


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule: its name, what it parses from a text (None: nothing), its verdict on a pair (None: none)."""

    name: str
    read: Callable[[str], Any]
    decide: Callable[[str, str, Same], bool | None]


RULES = (
    Rule("bases", number_rules.numeral, number_rules.bases),
    Rule("numbers", number_rules.exact, number_rules.numbers),
    Rule("ratios", number_rules.colons, number_rules.ratios),
    Rule("ellipses", list_rules.sequence, list_rules.ellipses),
    Rule("inequalities", relation_rules.ranges, relation_rules.inequalities),
    Rule("names", list_rules.named, list_rules.names),
    Rule("brackets", list_rules.bracket, list_rules.brackets),
    Rule("equations", relation_rules.sides, relation_rules.equations),
)
REWRITES = {"fonts": number_rules.without_fonts, "exponents": number_rules.without_exponents}
_LONGEST = 2_000  # characters of a pair that the rules read


def readable(text: str) -> str:
    r"""Rewrite \text{073} as 073 and 2.5e-05 as 2.5 \cdot 10^{-5}."""
    for rewrite in REWRITES.values():
        text = rewrite(text)
    return text


def decide(answer: str, gold: str, same: Same) -> bool | None:
    """Return the verdict of the first rule that has one; None leaves the pair to math-verify.

    `same(part, gold_part)` compares parts of the two, with these rules and math-verify.
    """
    if len(answer) + len(gold) > _LONGEST:
        return None
    verdicts = (rule.decide(answer, gold, same) for rule in RULES)
    return next((verdict for verdict in verdicts if verdict is not None), None)


def refuted(answer: str, gold: str, same: Same) -> bool:
    """Return whether a pair that math-verify calls equal is not: two identities with different sides."""
    return relation_rules.identities(answer, gold, same) is False


def touched(gold: str) -> list[str]:
    """Return the names of the rewrites and rules that apply to a gold answer (docs/evaluation.md)."""
    rewrites = [name for name, rewrite in REWRITES.items() if rewrite(gold) != gold]
    return rewrites + [rule.name for rule in RULES if rule.read(readable(gold)) is not None]
