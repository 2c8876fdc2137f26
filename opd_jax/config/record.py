"""A config field as a record: its name, its default, the values it may have, and what it means.

The table of all fields is config/fields.py; the check of a value against its record is config/schema.py.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high` (both included), or strictly `above` and `below` two others.

    `also` lists single values outside the range, such as the 0 that turns something off.
    """

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    also: tuple[float, ...] = ()

    def holds(self, value: Any) -> bool:
        """Whether the number is allowed."""
        inside = self.low <= value <= self.high and self.above < value < self.below
        return value in self.also or (inside and math.isfinite(value))

    def wanted(self, default: Any) -> str:
        """What a field with this default and this range wants: `a whole number, at least 1`."""
        bounded = min(self.high, self.below) < math.inf
        kind = "a whole number" if isinstance(default, int) else "a number"
        kind = kind if bounded or isinstance(default, int) else "a finite number"
        also = "".join(f", or {_digits(value)}" for value in self.also)
        low, high, above, below = map(_digits, (self.low, self.high, self.above, self.below))
        if self.above > -math.inf:
            if self.below < math.inf:
                return f"{kind} between {above} and {below}{also}"
            end = f", above {above} to {high}" if self.high < math.inf else f" above {above}"
            return f"{kind}{end}{also}"
        if self.below < math.inf:
            return f"{kind} from {low} to below {below}{also}"
        end = f", {low} to {high}" if self.high < math.inf else f", at least {low}"
        return f"{kind}{end}{also}"


COUNT = Range(1)
FROM_ZERO = Range(0)
SHARE = Range(0, 1)
ABOVE_ZERO = Range(above=0)


@dataclasses.dataclass(frozen=True)
class Choices:
    """One of several names.

    Attributes:
      source: the names, or `MODULE:NAME` of the module that has them. That is imported when the names are
        first asked for: the command line is read before JAX is loaded (host_memory.py).
      without: names of the source that this field may not have.
      refused: names that people may expect, with the reason why they are none.
    """

    source: tuple[str, ...] | str
    without: tuple[str, ...] = ()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The names, the source's module imported."""
        return tuple(name for name in _names(self.source) if name not in self.without)

    def holds(self, value: Any) -> bool:
        """Whether the value is one of the names."""
        return value in self.names

    def wanted(self, default: Any) -> str:
        """`one of keep, mask`."""
        return f"one of {', '.join(name or 'nothing' for name in self.names)}"


@dataclasses.dataclass(frozen=True)
class Several:
    """A tuple of different names; `source` as in `Choices`."""

    source: tuple[str, ...] | str

    def holds(self, value: Any) -> bool:
        """Whether all are known, and none is there twice."""
        known = _names(self.source)
        return all(name in known for name in value) and len(set(value)) == len(value)

    def wanted(self, default: Any) -> str:
        """`names among answer_line, last_number, each once`."""
        return f"names among {', '.join(_names(self.source))}, each once"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Values for which `test` returns True; a ValueError that it raises says more about the fault."""

    text: str
    test: Callable[[Any], bool]

    def holds(self, value: Any) -> bool:
        """Whether the value is allowed."""
        return self.test(value)

    def wanted(self, default: Any) -> str:
        """The rule in words."""
        return self.text


@dataclasses.dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
      name: in its section; a dot stands between the names of nested sections.
      default: its type is the type of the field: bool, int, float, str or tuple.
      allowed: which values of that type the field may have; None = all.
      meaning: one or two sentences.
    """

    name: str
    default: Any
    allowed: Range | Choices | Several | Rule | None
    meaning: str

    def wanted(self) -> str:
        """Which values the field may have, in words."""
        if self.allowed is not None:
            return self.allowed.wanted(self.default)
        return KINDS[type(self.default)]


# What a field without a range, choices or a rule may hold, by the type of its default.
KINDS = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a tuple",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Section:
    """Fields that belong together; those of the section "" stand at the top of the tree."""

    name: str
    meaning: str
    fields: tuple[Field, ...]


def by_name(sections: Iterable[Section]) -> dict[str, Field]:
    """Return {"rollout.top_p": its record, ...} in the order of the table."""
    return {
        f"{section.name}.{field.name}".lstrip("."): field
        for section in sections
        for field in section.fields
    }


def make_config(fields: dict[str, Field]) -> ConfigDict:
    """The locked tree in which every one of the fields has its default."""
    config = ConfigDict()
    for name, field in fields.items():
        *sections, last = name.split(".")
        place = config
        for section in sections:
            if section not in place:
                place[section] = ConfigDict()
            place = place[section]
        place[last] = field.default
    return config.lock()


def _names(source: tuple[str, ...] | str) -> tuple[str, ...]:
    if isinstance(source, str):
        module, _, name = source.partition(":")
        return tuple(getattr(importlib.import_module(module), name))
    return source


def _digits(number: float) -> str:
    power = math.log2(number) if number > 2**20 and number < math.inf else 0.5
    return f"2**{int(power)}" if power.is_integer() else f"{number:g}"
