"""Figures of an answer file, the papers' figures, and the table that has both."""

import re

import pytest

from opd_jax.evaluation import table as results
from opd_jax.evaluation.benchmarks import BENCHMARKS, PAPER
from tests.support.paths import ROOT

pytestmark = pytest.mark.short


def answers(*grades, length=10):
    return [
        {"grade": grade, "extracted": "5" if grade == "WRONG" else "7", "outcome": "eos",
         "repetitive": False, "length": length}
        for grade in grades
    ]  # fmt: skip


def test_summary():
    rows = answers("CORRECT", "CORRECT", "WRONG", "WRONG", "UNPARSED", "TIMEOUT", length=10)
    rows[0]["outcome"], rows[5]["repetitive"], rows[5]["length"] = "budget", True, 40
    found = results.summary(rows, 2)
    assert (found["problems"], found["samples"], found["metric"]) == (3, 2, "avg@2")
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["stderr"] == pytest.approx((1 / 3) ** 0.5 / 3**0.5)  # of 1, 0, 0: variance 1/3
    assert found["pass_at"] == {"1": pytest.approx(1 / 3), "2": pytest.approx(1 / 3)}
    assert found["maj_at_k"] == pytest.approx(1 / 3)
    assert found["grades"] == {"CORRECT": 2, "WRONG": 2, "UNPARSED": 1, "TIMEOUT": 1}
    assert found["truncation_rate"] == found["repetition_rate"] == pytest.approx(1 / 6)
    assert (found["length_mean"], found["tokens"]) == (15.0, 90)
    assert results.summary(answers("CORRECT", "WRONG", "WRONG"), 3)["pass_at"].keys() == {
        "1",
        "2",
        "3",
    }


def test_baselines_have_the_right_form():
    seen = set()
    for row in results.baselines():
        assert row.keys() == {"method", "backbone", "teacher", "benchmark", "value", "source"}
        assert row["benchmark"] in (*PAPER, "avg")
        assert isinstance(row["value"], float)
        assert 0 < row["value"] < 100
        assert row["backbone"] in ("Qwen2.5-Math-1.5B", "Qwen2.5-Math-7B")
        assert re.fullmatch(r"arXiv \d{4}\.\d{5}, (Table \d|appendix [A-Z]\.\d)", row["source"])
        key = tuple(row[name] for name in row if name != "value")
        assert key not in seen
        seen.add(key)


def test_averages_of_the_papers_are_those_of_their_six():
    """Within the rounding of the six."""
    groups: dict[tuple, dict[str, float]] = {}
    for row in results.baselines():
        key = row["method"], row["backbone"], row["teacher"], row["source"]
        groups.setdefault(key, {})[row["benchmark"]] = row["value"]
    for key, found in groups.items():
        if len(found) == 7:
            mean = sum(found[name] for name in PAPER) / 6
            assert found["avg"] == pytest.approx(mean, abs=0.11), key


def test_backbones():
    assert results.backbone_of("/models/Qwen2.5-Math-7B-OPD") == "Qwen2.5-Math-7B"
    assert results.backbone_of("Qwen/qwen2.5-math-1.5b") == "Qwen2.5-Math-1.5B"
    assert results.backbone_of("SmolLM2-135M") == ""


def one(accuracy, stderr):
    return {"accuracy": accuracy, "stderr": stderr}


def test_comparison():
    found = {"math500": one(0.5, 0.02), "gsm8k": one(0.25, 0.01)}
    table = results.comparison("mine", found, "Qwen2.5-Math-7B")
    assert table[0]["math500"] == {"value": 50.0, "stderr": 2.0}
    assert "avg" not in table[0]
    stable = next(row for row in table if row["method"] == "Stable-OPD")
    assert stable["math500"] == {"value": 84.6}
    assert len(table) == 11
    assert results.comparison("mine", found, "")[1:] == []
    six = {name: one(0.1 * i, 0.06) for i, name in enumerate(PAPER)}
    table = results.comparison("mine", six, "Qwen2.5-Math-1.5B")
    assert table[0]["avg"]["value"] == pytest.approx(25.0)
    assert table[0]["avg"]["stderr"] == pytest.approx(6 * 6**0.5 / 6)
    assert sum(row["method"].startswith("Stable-OPD") for row in table) == 2  # two teachers


def test_tables():
    found = {"math500": one(0.5, 0.02), "my|set": one(0.25, 0.01)}
    table = results.comparison("mine", found, "Qwen2.5-Math-7B")
    text = results.as_text(table)
    assert "50.0 ± 2.0" in text
    assert "my|set" in text
    assert all(method in text for method in ("Oat-Zero", "Stable-OPD"))
    marked = results.as_text(table, markdown=True).split("\n")
    assert marked[0] == "|  | MATH-500 | my\\|set | source |"
    assert marked[2] == "| mine | 50.0 ± 2.0 | 25.0 ± 1.0 | this evaluation |"
    assert {line.count("|") - line.count("\\|") for line in marked} == {5}
    whole = {"aime24": results.summary(answers("CORRECT", "WRONG"), 2)}
    assert "avg@2" in results.details(whole)
    assert BENCHMARKS["aime24"].title in results.details(whole, markdown=True)


def test_the_page_of_the_papers_tables_has_the_figures_of_the_data_file():
    table = (ROOT / "docs" / "paper_tables.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (Qwen\S+) \| ([^|]+) \| (\d.*) \|$", table, re.MULTILINE)
    assert len(rows) == 10
    for backbone, method, cells in rows:
        found = {
            row["benchmark"]: row["value"]
            for row in results.baselines()
            if row["backbone"] == backbone
            and row["method"] == (backbone if method == "as it is" else method)
            and row["teacher"] in ("", "OpenThinker3-7B")
        }
        assert [float(cell) for cell in cells.split(" | ")] == [
            found[name] for name in ("avg", *PAPER)
        ]
