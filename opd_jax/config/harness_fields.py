"""The config section `harness`: what the student writes into the teacher's prompt before its rollouts."""

import re

from opd_jax.config.record import COUNT, Field, Rule, Section
from opd_jax.config.rules import shows_problem

_PARTS = ("problem", "answer", "solution")  # of a problem: no names for something else


def _is_prompt(text: str) -> bool:
    return not text or (text != "same" and shows_problem(text))


def _is_field(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][\w-]*", text) is not None and text not in _PARTS


# fmt: off
HARNESS = Section("harness", "A text that the student writes for the teacher's prompt (docs/harness.md).", (
    Field("prompt", "", Rule("a text that holds {problem} or a {column} of its row, or nothing", _is_prompt),
          "The user's turn to which the student writes that text, before the rollouts of every step "
          "(2605.08741); empty = no such stage. {problem}, {answer}, {solution} and columns are filled in."),
    Field("system_prompt", "same", None,
          "The system's turn of that prompt; same = the student's; empty = the row's own; none = no turn."),
    Field("field", "plan", Rule("a name of letters, digits, _ and -, but no part of a problem", _is_field),
          "Name of the text in data.teacher_prompt_template: {plan}."),
    Field("max_prompt_tokens", 256, COUNT, "Longest such prompt, in tokens."),
    Field("max_tokens", 256, COUNT, "Longest such text, in tokens (2605.08741: 4096)."),
))
# fmt: on
