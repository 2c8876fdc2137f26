"""Prompt templates: which columns of a row a text names in braces, and the text with them filled in.

`{problem}`, `{answer}` and `{solution}` are the parts of a problem, under whatever column they were found.
Any other `{name}`, or `{dotted.path}`, is a column of the problem's row. Other braces are text: `{}`,
`{ x }`, and what follows a TeX command, `_` or `^` (`\\boxed{x}`, `x_{i}`), in which only the three
parts are filled in.
"""

import re
from collections.abc import Mapping

PARTS = ("problem", "answer", "solution")
_NAME = re.compile(
    r"(?P<tex>\\[A-Za-z]+\*?(?:\{[^{}]*\})+|[_^]\{[^{}]*\})|\{(?P<name>[A-Za-z_][\w-]*(?:\.[\w-]+)*)\}"
)
_PART = re.compile(rf"\{{({'|'.join(PARTS)})\}}")


def columns_of(*templates: str) -> tuple[str, ...]:
    """Return the columns that the templates name beside the three parts, each once, in their order."""
    names = (match["name"] for text in templates for match in _NAME.finditer(text))
    return tuple(dict.fromkeys(name for name in names if name and name not in PARTS))


def shows_problem(template: str) -> bool:
    """Return whether a template shows the problem, or a column that may be one."""
    return "{problem}" in template or bool(columns_of(template))


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return the template with parts and columns replaced; a column without a value becomes empty."""

    def of_part(match: re.Match) -> str:
        return values[match[1]]

    def of_name(match: re.Match) -> str:
        return _PART.sub(of_part, match[0]) if match["tex"] else values.get(match["name"], "")

    return _NAME.sub(of_name, template)
