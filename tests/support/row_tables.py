"""Rows as strangers publish them: what was read of each before it was mended, and what is read now.

python -m tests.support.row_tables prints the tables; test_row_tables.py checks their last column.
"""

import json
import pathlib
import re

from opd_jax.data.columns import Columns, count, describe, read_problem
from opd_jax.data.files import RowError
from opd_jax.grading.worker import grade

# By kind: {"row", "response" (the content of a box, "" for none), "before", "now"}.
TABLES = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def verdict(row: dict, response: str) -> str:
    """What is read of a row: every part that there is, the grade of a response, columns left aside."""
    try:
        problem, taken = read_problem(row, path="r.jsonl", number=1, columns=Columns())
    except RowError as error:
        said = str(error).removeprefix("r.jsonl, line 1: ")
        return "refused: " + re.sub(r"; it has .*", "", said)
    parts = problem.row()
    words = [f"{name}={json.dumps(part)}" for name, part in parts.items() if part and name != "id"]
    if response and problem.answer:
        words.append(f"{response} is " + grade(f"\\boxed{{{response}}}", problem.answer))
    count(counts := {}, row, problem, taken)
    if counts["not read"]:
        words.append(describe({"not read": counts["not read"]}))
    return "; ".join(words)


if __name__ == "__main__":
    for kind, cases in TABLES.items():
        print(f"\n## {kind}\n")
        for case in cases:
            now = verdict(case["row"], case["response"])
            print(f"{json.dumps(case['row'])}\n  before  {case['before']}\n  now     {now}")
