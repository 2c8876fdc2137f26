"""Errors for the user: one line, whatever value they quote."""

import inspect

import pytest

from opd_jax import errors
from opd_jax.config import default
from opd_jax.config.validate import validate

ERRORS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.OpdError)
]


@pytest.mark.short
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("data.train='a\r\n\x0bb\x85c\u2028d'", r"data.train='a\r\n\x0bb\x85c\u2028d'"),
        ("what absl quotes ends a line\n", "what absl quotes ends a line"),
        ("clear \x1b[2J the screen", r"clear \x1b[2J the screen"),
        ("half \ud83d of a character", r"half \ud83d of a character"),
        ("Größe 「3」 🙂 is as it is", "Größe 「3」 🙂 is as it is"),
    ],
)
def test_an_error_is_one_printable_line(kind, text, printed):
    assert str(kind(text)) == printed
    printed.encode()


@pytest.mark.short
def test_a_value_with_a_line_break_in_a_refusal():
    config = default()
    config.student.path, config.teacher.path = "a", "b"
    config.reward.column = "score\n has a second line"
    with pytest.raises(errors.ConfigError) as caught:
        validate(config)
    assert str(caught.value).startswith(r"reward.column=score\n has a second line")
