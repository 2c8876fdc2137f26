"""Timings, rows, the table and the file; a failing case leaves its error."""

import json
import math

import numpy as np
import pytest

from opd_jax.errors import ConfigError
from opd_jax.models.flops import Work
from opd_jax.tools.bench import cases, report
from opd_jax.tools.bench.measure import (
    Row,
    Timing,
    difference,
    make_check,
    make_row,
    time_call,
    watch_memory,
)
from opd_jax.tools.bench.run import Case, Options, run_cases, verdict

pytestmark = pytest.mark.short


def test_the_first_call_is_apart():
    calls = []
    timing = time_call(lambda: calls.append(1), repeats=3)
    assert len(calls) == 4
    assert len(timing.seconds) == 3


def test_no_repeat_begins_after_its_time():
    assert len(time_call(lambda: None, repeats=9, most_s=0.0).seconds) == 1


def test_warm_counts_the_first_call():
    calls = []
    assert len(time_call(lambda: calls.append(1), repeats=2, warm=True).seconds) == len(calls) == 2


def test_median_and_difference():
    long, short = Timing(5.0, (3.0, 9.0, 4.0)), Timing(1.0, (1.0, 2.0, 1.5))
    assert long.median_s == 4.0
    assert difference(long, short) == Timing(6.0, (1.5, 7.5, 2.5))


def test_row_has_the_fraction_of_the_roofline():
    # 8 bytes at 2 a second take 4 s at least; measured are 5.
    row = make_row(
        "x", "1", Timing(9.0, (4.0, 5.0, 6.0)), tokens=10, works=[Work(1.0, 8.0)],
        flops_per_s=1.0, bytes_per_s=2.0,
    )  # fmt: skip
    assert (row.fraction, row.bound, row.tokens_per_s) == (0.8, "memory", 2.0)
    assert (row.min_s, row.median_s, row.max_s, row.first_s, row.repeats) == (4, 5, 6, 9, 3)


def test_a_check_fails_beyond_its_limit_and_on_nan():
    assert make_check("c", "", 0.1, 0.1).status == "ok"
    assert make_check("c", "", 0.11, 0.1).status == "failed"
    assert make_check("c", "", math.nan, 0.1).status == "failed"


def test_peak_memory_sees_an_array():
    with watch_memory() as peak:
        before = peak()
        array = np.ones(50_000_000)  # 0.37 GiB, touched
        after = peak()
    assert array[0] == 1
    if after.of == "row":
        assert 0.3 < after.gib - before.gib < 0.5
    else:
        assert after.gib > 0.3


def test_decode_seconds_follow_a_line():
    # 1 s at 10 positions, 2 s at 20: 4 steps from 10 on take 1.0 + 1.1 + 1.2 + 1.3.
    assert cases.decode_seconds((10, 1.0), (20, 2.0), first=10, steps=4) == pytest.approx(4.6)


def test_cases_go_on_after_an_error_and_stop_when_time_is_up(tmp_path):
    def broken():
        raise ValueError("no\nluck")

    out = tmp_path / "deep" / "b.json"
    listed = [
        Case("a", "1", lambda: [Row("a", "1", median_s=0.5)]),
        Case("b", "2", broken),
        Case("c", "3", lambda: [Row("c")], needs_s=lambda: 1e9),
        Case("d", "4", lambda: [Row("d", "4")]),
    ]
    rows = run_cases("cpu", listed, Options(out=out, budget_s=60.0))
    assert [row.status for row in rows] == ["ok", "error", "not run", "ok"]
    assert rows[1].note == "ValueError: no luck"
    assert report.read(out) == rows
    given = json.loads(out.read_text())
    assert given["suite"] == "cpu"
    assert {"date", "commit", "device", "versions"} <= set(given["environment"])
    assert run_cases("cpu", listed[:1], Options(budget_s=0.0))[0].status == "not run"


def test_a_call_that_resumes_measures_what_is_missing(tmp_path):
    """Cases that raised or had no time run again, and those that others need."""
    out, ran, kept = tmp_path / "b.json", [], []

    def case(name, *, right=True, always=False):
        def run():
            ran.append(name)
            if not right and len(ran) < 4:
                raise ValueError("no luck")
            return [Row(f"{name} 1"), Row(f"{name} 2")]

        return Case(name, "", run, always=always)

    cases = [case("limits", always=True), case("a"), case("b", right=False)]
    first = run_cases("cpu", cases, Options(out=out))
    assert [row.status for row in first] == ["ok"] * 4 + ["error"]
    assert verdict(first) == "1 of 5 rows are wrong: b  (error)"
    ran.clear()
    ran += ["-"] * 3
    second = run_cases("cpu", cases, Options(out=out, resume=True), keep=kept.append)
    assert ran[3:] == ["limits", "b"]
    assert [row.name for row in second] == [
        f"{n} {i}" for n in ("limits", "a", "b") for i in (1, 2)
    ]
    assert [row.name for row in kept] == ["a 1", "a 2"]
    assert not verdict(second)
    assert report.read(out) == second
    with pytest.raises(
        ConfigError, match="was measured with suite 'cpu', this is 'h200'; give another"
    ):
        run_cases("h200", cases, Options(out=out, resume=True))
    assert run_cases("cpu", [], Options(out=tmp_path / "none.json", resume=True)) == []


def test_table_is_aligned_and_fits_100_columns():
    rows = [
        Row("a long name of a row " * 3, "shape " * 12, median_s=0.0123, tokens_per_s=123456.7,
            fraction=0.5, bound="memory", peak_gib=1.5, first_s=12.0, note="words " * 60),
        Row("b", "2", status="not run"),
    ]  # fmt: skip
    lines = report.table(rows).splitlines()
    assert max(map(len, lines)) <= 100
    assert "123,457" in lines[1]
    assert "50%" in lines[1]
    assert lines[-1].split() == ["b", "2", "not", "run"]
    at = lines[0].index("median s") + len("median s")
    assert lines[1][:at].endswith("0.012")
    assert lines[-1].endswith("not run")
