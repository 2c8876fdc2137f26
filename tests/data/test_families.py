"""docs/end_tokens.md says of every pair of families what the code does."""

import pathlib

from tests.data import test_two_vocabularies
from tests.support import families


def test_the_table_is_that_of_the_command():
    page = pathlib.Path(__file__).parents[2] / "docs/end_tokens.md"
    table = [line for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert table == list(families.rows())  # python -m tests.support.families prints it again


def test_the_special_tokens_of_a_family_are_listed_once():
    assert test_two_vocabularies.QWEN is families.QWEN
    assert test_two_vocabularies.R1 is families.R1
