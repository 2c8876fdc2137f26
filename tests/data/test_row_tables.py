"""Every row of the tables is read as their last column says, and the grade is that of the answer."""

import pytest

from tests.support.row_tables import TABLES, verdict


@pytest.mark.parametrize("kind", TABLES)
def test_rows_of_strangers(kind):
    cases = TABLES[kind]
    assert len(cases) >= 10
    now = [verdict(case["row"], case["response"]) for case in cases]
    assert now == [case["now"] for case in cases]
    assert sum(case["now"] != case["before"] for case in cases) >= 5
