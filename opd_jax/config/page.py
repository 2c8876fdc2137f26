"""The table of fields as text: for `--fields` of the entry points, and as docs/config.md."""

import json
import textwrap
from typing import Any

from opd_jax.config.fields import BENCHMARKS, SECTIONS
from opd_jax.config.record import Field, Section
from opd_jax.config.trees import EVALUATION, PROBING, SAMPLING, TRAINING, Tree

_HEAD = """\
# Config fields

Written by `python -m opd_jax.config > docs/config.md` from the table in `opd_jax/config/fields.py`; a test
holds the two equal. `python launch/train.py --fields` prints the same for one entry point.

A config file (`configs/`) starts from these defaults and sets some; the command line sets any field that
the entry point reads: `--config.rollout.temperature=0.8`. The last column has who reads a field: **t**
`launch/train.py` (and plan.py, profile.py, record.py), **e** `launch/evaluate.py`, **s** `launch/sample.py`,
**p** `launch/probe.py`. A field means the same to all of them. What must hold between fields is checked
before anything is loaded (`opd_jax/config/validate.py`)."""
_READERS = {"t": TRAINING, "e": EVALUATION, "s": SAMPLING, "p": PROBING}


def as_text(tree: Tree) -> str:
    """The fields of an entry point, a paragraph each."""
    lines = [f"Fields that {tree.program} reads, set by --config.FIELD=VALUE:"]
    for section in tree.sections:
        lines += ["", section.meaning]
        for field in section.fields:
            lines.append(f"  {_name(section, field)} = {_value(field.default)}")
            allowed = f" ({field.wanted()})" if field.allowed is not None else ""
            lines += textwrap.wrap(
                field.meaning + allowed, 100, initial_indent="      ", subsequent_indent="      ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join(lines)


def as_markdown() -> str:
    """The text of docs/config.md."""
    parts = [_HEAD]
    for section in (*SECTIONS, BENCHMARKS):
        title = f"## `{section.name}`" if section.name else "## The run"
        rows = ["| field | default | allowed | meaning | read by |", "|---|---|---|---|---|"]
        for field in section.fields:
            name = _name(section, field)
            readers = "".join(letter for letter, tree in _READERS.items() if name in tree.fields)
            cells = (
                f"`{name}`",
                f"`{_value(field.default)}`",
                field.wanted(),
                field.meaning,
                readers,
            )
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append("\n".join([title, "", section.meaning, "", *rows]))
    return "\n\n".join(parts) + "\n"


def _name(section: Section, field: Field) -> str:
    return f"{section.name}.{field.name}".lstrip(".")


def _value(default: Any) -> str:
    """A default as the command line takes it."""
    return json.dumps(default) if isinstance(default, str) else repr(default)
