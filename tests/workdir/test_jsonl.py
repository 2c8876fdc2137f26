"""Files that grow line by line: what a kill has torn is cut off, and what was undone is set aside."""

import json

import pytest

from opd_jax.errors import WorkdirError
from opd_jax.workdir.jsonl import JsonlFile, Lines

pytestmark = pytest.mark.short


def rows_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_lines_of_a_file_with_ends_and_without_what_is_torn(tmp_path):
    path = tmp_path / "a" / "b.jsonl"
    with JsonlFile(path) as file:
        file.append([{"x": "a\u2028b"}, {"x": "\ud800"}])
        file.write({"x": 1})
    path.write_bytes(path.read_bytes() + b"\0\0\n" + b'{"x": 2')
    size = path.stat().st_size
    with JsonlFile(path) as file:
        found = list(file.lines())
        assert [value for _, value in found] == [{"x": "a\u2028b"}, {"x": "?"}, {"x": 1}, None]
        assert found[-1][0] == size - len(b'{"x": 2')
        file.cut(found[-2][0])
        file.write({"x": 3})
        assert [value for _, value in file.lines()][-2:] == [{"x": 1}, {"x": 3}]
    assert rows_of(path)[-2:] == [{"x": 1}, {"x": 3}]


def test_a_file_that_names_another_place_is_locked(tmp_path):
    path = tmp_path / "x.jsonl"
    with JsonlFile(path, elsewhere="--out"):
        says = r"x\.jsonl is being written by another process; wait for it, or give a new --out"
        with pytest.raises(WorkdirError, match=says):
            JsonlFile(path, elsewhere="--out")
    JsonlFile(path, elsewhere="--out").close()


def test_the_last_line_is_amended_where_it_is_of_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Lines(path, resume_step=-1)
    log.amend({"step": 1, "a": 1})
    log.write({"step": 2, "a": 2})
    log.amend({"step": 2, "b": 3})
    log.amend({"step": 3})
    log.close()
    assert rows_of(path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2, "b": 3}, {"step": 3}]


def test_going_back_sets_later_lines_aside_and_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Lines(path, resume_step=-1)
    for round_ in (1, 2):
        for step in (1, 2, 3):
            log.write({"step": step, "round": round_})
        log.go_back(1 if round_ == 1 else 2)
    log.write({"step": 3, "round": 3})
    log.close()
    kept = [(row["step"], row["round"]) for row in rows_of(path)]
    aside = [(row["step"], row["round"]) for row in rows_of(tmp_path / "metrics.rolled_back.jsonl")]
    assert kept == [(1, 1), (1, 2), (2, 2), (3, 3)]
    assert aside == [(2, 1), (3, 1), (3, 2)]


def test_a_resumed_file_holds_no_later_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole + b'{"step": 3}\n{"step": 1}\n')
    log = Lines(path, resume_step=2)
    log.write({"step": 3})
    log.close()
    assert path.read_bytes() == whole + b'{"step": 3}\n'
