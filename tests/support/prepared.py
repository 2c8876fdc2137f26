"""Raw rows, and what prepare_data makes of them."""

import json
import pathlib

from configs import prepare_data
from opd_jax.tools.prepare_data import run as module
from tests.tools.prepare_data.test_decontaminate import LONG


def row(problem: str, **changes: object) -> dict:
    return {"problem": problem, "solution": "so \\boxed{4}", "answer": 4} | changes


ROWS: list = [
    row("a", id="first"),
    row("b", answer=None, solution="no box"),
    row("c", solution=None),
    row("d", generations=["x"], is_reasoning_complete=[False], correctness_math_verify=[True]),
    row("e", generations=["x"], is_reasoning_complete=[True], correctness_math_verify=[False]),
    row("Solve. " + LONG),
    row("a", answer=5, solution="another"),
    row(" a\n"),
    {"text": "no problem"},
    "{broken",
    row("2 + 3"),
    row("2 - 3", system="think"),
    row("f", generations=["no", "\\boxed{4}"], is_reasoning_complete=[True, True],
        correctness_math_verify=[False, True]),
]  # fmt: skip


def write(path: pathlib.Path, rows: list) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def config(train: str, **fields: object):
    made = prepare_data.get_config()
    made.data.train = train
    for field, value in fields.items():
        section, _, name = field.rpartition("__")
        (made[section] if section else made)[name] = value
    return made


def done(folder: pathlib.Path, made, **more) -> dict:
    return module.prepare(made, str(folder), say=lambda _: None, **more)


def read(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]
