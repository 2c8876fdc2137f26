"""The table of benchmarks, and files that are or are not what it says."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_jax.data.columns import Columns
from opd_jax.errors import ConfigError, DataError
from opd_jax.evaluation import protocols
from opd_jax.evaluation.benchmarks import BENCHMARKS, PAPER, Benchmark, load, parse
from opd_jax.grading.extract import FALLBACKS, RULES
from tests.support.real_data import FILES, LUFFY, needs_data

pytestmark = pytest.mark.short


def write(folder, name, rows):
    file = folder / name
    if name.endswith(".jsonl"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith(".json"):
        file.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return str(file)


def test_the_table():
    sizes = {name: entry.size for name, entry in BENCHMARKS.items()}
    assert sizes == {
        "aime24": 30, "aime25": 30, "amc": 83, "minerva": 272, "olympiad": 675, "math500": 500,
        "gsm8k": 1319, "tiny": 200,
    }  # fmt: skip
    for entry in BENCHMARKS.values():
        assert entry.rule in RULES
        assert entry.protocol in protocols.PROTOCOLS
        small = entry.name in ("aime24", "aime25", "amc")
        assert (entry.metric, entry.samples) == (("avg@32", 32) if small else ("pass@1", 1))
    assert set(PAPER) == BENCHMARKS.keys() - {"gsm8k", "tiny"}
    for entry in protocols.PROTOCOLS.values():
        assert set(entry.fallbacks) <= set(FALLBACKS)
        assert "{problem}" in entry.prompt_template


def test_names_and_files():
    found = parse("aime24=a.json, mine=/x/y.jsonl,/x/other.set.parquet,tiny")
    assert [(b.name, f) for b, f in found] == [
        ("aime24", "a.json"), ("mine", "/x/y.jsonl"), ("other", "/x/other.set.parquet"),
        ("tiny", "tiny:test"),
    ]  # fmt: skip
    assert found[0][0] is BENCHMARKS["aime24"]
    assert (found[1][0].size, found[1][0].samples) == (0, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no benchmark"),
        (" , ", "names no benchmark"),
        ("aime24", "without a file .*; set --config.eval.benchmarks=aime24=FILE"),
        ("mine=", "without a file .*; set --config.eval.benchmarks=mine=FILE"),
        ("tiny,tiny=tiny:test", "'tiny' twice"),
        ("../x=y.json", "letters, digits"),
        ("..=y.json", "letters, digits"),
    ],
)
def test_names_that_cannot_be(text, says):
    with pytest.raises(ConfigError, match=says) as error:
        parse(text)
    assert "\n" not in str(error.value)


def amc(n=83):
    return [
        {"id": i, "question": f"What is {i}?", "answer": float(i), "url": "", "solution": None}
        for i in range(n)
    ]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet"])
def test_a_file_of_a_benchmark(tmp_path, name):
    loaded = load(BENCHMARKS["amc"], write(tmp_path, name, amc()))
    assert len(loaded.problems) == 83
    assert (loaded.problems[7].id, loaded.problems[7].prompt) == ("7", "What is 7?")
    assert loaded.problems[7].answer == "7"  # 7.0 in the file
    assert loaded.skipped == {}


def test_lists_of_answers_and_boxes(tmp_path):
    olympiad = [{"id": 1, "question": "?", "final_answer": ["$1$,$2$"], "solution": ["So."]}]
    file = write(tmp_path, "o.jsonl", olympiad)
    problem = load(BENCHMARKS["olympiad"], file, any_size=True).problems[0]
    assert (problem.answer, problem.solution) == ("$1$,$2$", "So.")
    minerva = [{"problem": "?", "solution": r"\boxed{4.5e33} erg", "type": "x", "idx": 0}]
    file = write(tmp_path, "m.jsonl", minerva)
    assert load(BENCHMARKS["minerva"], file, any_size=True).problems[0].answer == "4.5e33"
    gsm = [{"question": "?", "answer": "3 * 6 = <<3*6=18>>18\n#### 1,018"}]
    file = write(tmp_path, "g.jsonl", gsm)
    assert load(BENCHMARKS["gsm8k"], file, any_size=True).problems[0].answer == "1018"


def test_a_file_of_another_size(tmp_path):
    file = write(tmp_path, "x.jsonl", amc(40))
    with pytest.raises(DataError, match=r"has 40 problems, but AMC has 83 .*any_size=true"):
        load(BENCHMARKS["amc"], file)
    assert len(load(BENCHMARKS["amc"], file, any_size=True).problems) == 40


def test_rows_that_cannot_be_used(tmp_path):
    rows = amc()
    rows[3]["answer"] = ""
    file = write(tmp_path, "x.jsonl", rows)
    with pytest.raises(DataError, match=r"line 4: no answer .*empty.*bad_rows=skip"):
        load(BENCHMARKS["amc"], file)
    loaded = load(BENCHMARKS["amc"], file, bad_rows="skip")  # the size is that of the file's rows
    assert (len(loaded.problems), loaded.skipped) == (82, {"no answer": 1})
    with pytest.raises(
        DataError, match=r"column 'solution_text' is not there.*data.columns.answer"
    ):
        load(BENCHMARKS["amc"], file, columns=Columns(answer="solution_text"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "?", "answer": "1"}\n{"question": \n')
    with pytest.raises(DataError, match=r"broken.jsonl, line 2.*not JSON"):
        load(BENCHMARKS["amc"], str(broken), any_size=True)
    loaded = load(BENCHMARKS["amc"], str(broken), any_size=True, bad_rows="skip")
    assert (len(loaded.problems), loaded.skipped) == (1, {"not JSON": 1})


def mixed(n=83):
    def row(source, i):
        turns = [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": f"{source} {i}?"},
        ]
        return {"data_source": source, "prompt": turns, "reward_model": {"ground_truth": f"{i}.0"}}

    return [row("amc", i) for _ in range(3) for i in range(n)] + [row("math", i) for i in range(9)]


def test_a_file_of_several_benchmarks(tmp_path):
    file = write(tmp_path, "valid.parquet", mixed())
    loaded = load(BENCHMARKS["amc"], file)
    assert [p.prompt for p in loaded.problems] == [
        f"amc {i}?" for i in range(83)
    ]  # each once, in order
    assert loaded.problems[4].system == "Think."
    with pytest.raises(DataError, match="has 9 problems, but MATH-500 has 500"):
        load(BENCHMARKS["math500"], file)
    assert len(load(Benchmark("mine", "mine"), file).problems) == 3 * 83 + 9  # every row of it
    with pytest.raises(DataError, match=r"has the benchmarks amc, math, but not 'aime25'"):
        load(BENCHMARKS["aime25"], file)


def test_questions_that_differ_in_earlier_turns_are_two(tmp_path):
    rows = mixed(1)
    for i, row in enumerate(rows[:2]):
        said = (("user", f"{i}+1?"), ("assistant", f"{i + 1}"), ("user", "And 3?"))
        row["prompt"] = [{"role": role, "content": text} for role, text in said]
    loaded = load(BENCHMARKS["amc"], write(tmp_path, "x.jsonl", rows), any_size=True)
    assert [(p.question.split("\n")[0], p.prompt) for p in loaded.problems] == [
        ("0+1?", "And 3?"), ("1+1?", "And 3?"), ("amc 0?", "amc 0?"),
    ]  # fmt: skip


def test_a_column_that_a_benchmark_does_not_show_is_named(tmp_path):
    row = {"id": 1, "question": "?", "final_answer": ["1"], "context": "A ball falls."}
    file = write(tmp_path, "o.jsonl", [row])
    loaded = load(BENCHMARKS["olympiad"], file, any_size=True)
    assert loaded.problems[0].prompt == "?"  # as the papers ask it
    assert loaded.columns.endswith("; not read: context")


@needs_data
@pytest.mark.parametrize("name", FILES)
def test_published_files(name):
    """Each has the size and the columns of the table; LUFFY's file holds the same six."""
    loaded = load(BENCHMARKS[name], str(FILES[name]))
    assert len(loaded.problems) == BENCHMARKS[name].size
    assert all(problem.prompt.strip() and problem.answer for problem in loaded.problems)
    assert not loaded.skipped
    if name in PAPER:
        assert len(load(BENCHMARKS[name], str(LUFFY)).problems) == BENCHMARKS[name].size


@needs_data
def test_luffys_system_prompt_is_that_of_its_file():
    problem = load(BENCHMARKS["aime24"], str(LUFFY)).problems[0]
    assert problem.system == protocols.LUFFY_SYSTEM
