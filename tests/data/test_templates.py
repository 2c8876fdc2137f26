"""Prompt templates: parts of a problem and columns of its row filled in, other braces left alone."""

import json

import pytest

from opd_jax import data
from opd_jax.data import templates
from opd_jax.errors import ConfigError, DataError

pytestmark = pytest.mark.short
VALUES = {"problem": "2+2?", "answer": "4", "solution": "It is 4.", "clean": "Add.", "a.b-c": "x"}


@pytest.mark.parametrize(
    ("template", "columns", "expected"),
    [
        ("{problem}", (), "2+2?"),
        ("{clean} {problem}{clean}", ("clean",), "Add. 2+2?Add."),
        ("{a.b-c}: {answer}", ("a.b-c",), "x: 4"),
        ("Q:{clean}", ("clean",), "Q:Add."),  # no space is needed before a brace
        ("{{problem}}", (), "{2+2?}"),
        # Braces that are text.
        (r"put it within \boxed{}.", (), r"put it within \boxed{}."),
        (r"\boxed{x} \frac{a}{b} \text*{clean}", (), r"\boxed{x} \frac{a}{b} \text*{clean}"),
        ("x_{i} y^{n}", (), "x_{i} y^{n}"),
        ("{ x } {} {1} {a b} { {", (), "{ x } {} {1} {a b} { {"),
        ('{"problem": 1}', (), '{"problem": 1}'),
        # In them the parts are filled in, as everywhere.
        (r"\boxed{answer} x_{answer}", (), r"\boxed4 x_4"),
        (r"\boxed{{answer}} \boxed{{clean}}", ("clean",), r"\boxed{4} \boxed{Add.}"),
    ],
)
def test_fill_by_hand(template, columns, expected):
    assert templates.columns_of(template) == columns
    assert templates.fill(template, VALUES) == expected


def test_a_value_is_not_a_template():
    assert (
        templates.fill("{problem}", VALUES | {"problem": "{answer} {clean}"}) == "{answer} {clean}"
    )


def rows(tmp_path, *lines: dict) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def opened(file: str, template: str, **how) -> tuple[data.Problems, data.PromptStyle]:
    style = data.PromptStyle(template)
    shown = style.columns
    return data.open_problems(
        file, field="data.train", columns=NO_COLUMNS, shown=shown, **how
    ), style


NO_COLUMNS = data.dataset.Columns()
ROW = {
    "problem": "What is 2+2? I think 5.",
    "clean": "What is 2+2?",
    "level": 3,
    "extra": {"k": "v"},
}


def test_columns_of_a_row_are_shown_and_survive_a_file(tmp_path):
    problems, style = opened(rows(tmp_path, ROW), "{clean} ({level}, {extra.k})")
    assert style.turns(problems[0])[0] == "What is 2+2? (3, v)"
    assert "not read" not in problems.columns
    first = problems[0]
    again, _ = opened(rows(tmp_path, first.row()), "{clean} ({level}, {extra.k})")
    assert again[0].columns == first.columns


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{clene}",
            "shows {clene}, and there is no such column; did you mean {clean}? it has clean,",
        ),
        ("{problems}", "did you mean {problem}?"),
        ("{zzz}", "there is no such column; it has clean, extra, level, problem; correct"),
        ("{extra.key}", "shows {extra.key}, and there is no such column"),
        ("{extra}", "shows {extra}, but this column is an object"),
    ],
)
def test_an_unknown_column_is_refused_in_one_line(tmp_path, template, expected):
    with pytest.raises(DataError) as caught:
        opened(rows(tmp_path, ROW), template)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "line 1" in str(caught.value) or ":1" in str(caught.value)
    assert "--config.data.prompt_template" in str(caught.value)


def test_rows_without_the_column_may_be_skipped(tmp_path):
    bare = {"problem": "3+3?"}
    problems, _ = opened(rows(tmp_path, ROW, bare), "{clean}", bad_rows="skip")
    assert len(problems) == 1
    assert problems.skipped == {"no column 'clean'": 1}
    with pytest.raises(DataError, match="no column 'clean' 1"):
        opened(rows(tmp_path, bare), "{clean}", bad_rows="skip")


def test_generated_problems_have_no_columns():
    with pytest.raises(ConfigError, match=r"shows \{clean\}, but generated problems have only"):
        opened("tiny:train", "{clean}", size=4)
