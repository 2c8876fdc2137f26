"""Problems by name: tiny:SPLIT and files, refused or counted rows, and the real files."""

import collections
import json
import pathlib

import pytest

from opd_jax import data
from opd_jax.data.columns import Columns
from opd_jax.errors import ConfigError, DataError
from tests.support.real_data import FOLDER, needs_data


def rows(path: pathlib.Path, *items: object) -> str:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in items))
    return str(path)


def opened(name: str, **changes: object) -> data.Problems:
    return data.open_problems(name, **({"field": "data.train"} | changes))


@pytest.fixture
def mixed(tmp_path) -> str:
    return rows(
        tmp_path / "mixed.jsonl",
        {"problem": "a", "answer": 1, "solution": "s"},
        "",
        {"problem": "b", "answer": 2},
        "{broken",
        {"problem": "c", "final_answer": [3]},
        {"problem": "d"},
        [1],
    )


def test_tiny_is_the_generated_data():
    problems = opened("tiny:sft", size=5, need_solution=True, need_answer=True)
    assert list(problems) == [data.problem("sft", i) for i in range(5)]
    assert problems.describe() == "tiny:sft: 5 problems of 5 rows"
    assert problems.skipped == {}


@pytest.mark.parametrize("name", ["tiny:nosuch", "tiny", "train", "other:train", "tiny:a.json", ""])
def test_a_name_that_is_neither(name):
    with pytest.raises(ConfigError, match=r"^eval\.data='.*', wanted one of tiny:train, .*\.json"):
        opened(name, field="eval.data", size=5)


def test_a_path_that_is_not_there_is_a_path():
    with pytest.raises(DataError, match=r"^none\.jsonl does not exist"):
        opened("none.jsonl")
    with pytest.raises(DataError, match=r"^a/b: the name ends in 'no extension', wanted one of"):
        opened("a/b")


def test_the_first_bad_row_is_reported(mixed):
    with pytest.raises(DataError) as error:
        opened(mixed, need_answer=True)
    assert str(error.value).startswith(f"{mixed}, line 4, column 2: not JSON")
    assert str(error.value).endswith("or leave such rows out: --config.data.bad_rows=skip")
    assert "\n" not in str(error.value)


def test_bad_rows_are_counted_by_reason(mixed):
    problems = opened(mixed, need_answer=True, bad_rows="skip")
    assert [(p.id, p.prompt, p.answer) for p in problems] == [
        ("mixed-1", "a", "1"), ("mixed-3", "b", "2"), ("mixed-5", "c", "3"),
    ]  # fmt: skip
    assert problems.skipped == {"not JSON": 1, "no answer": 1, "not an object": 1}
    assert problems.describe() == (
        f"{mixed}: 3 problems of 6 rows; problem from problem, solution from none (2) | "
        "solution (1), answer from answer (2) | final_answer (1); "
        "left out: no answer 1, not JSON 1, not an object 1"
    )


def test_the_data_line_names_what_is_not_read_and_counts_earlier_turns(tmp_path):
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"))]
    file = rows(
        tmp_path / "rows.jsonl",
        {"question": "c", "context": "so", "body": "x", "level": 3, "year": None},
        {"question": "c", "history": turns},
        {"question": "c", "history": [], "images": []},
    )
    assert opened(file).describe() == (
        f"{file}: 3 problems of 3 rows; problem from context + question (1) | "
        "history + question (1) | question (1); 1 with earlier turns; not read: body, level"
    )
    file = rows(tmp_path / "wide.jsonl", {"question": "c"} | {f"c{i:02}": 0 for i in range(20)})
    assert opened(file).describe().endswith("c10, c11, ...")


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_numbers_of_json_keep_every_digit(tmp_path, kind):
    file = tmp_path / f"rows{kind}"
    numbers = ("1e-07", "6.02e23", "1e5", "12345678901234567891.0", "-2.50")
    lines = [f'{{"problem": "?", "answer": {number}}}' for number in numbers]
    file.write_text("\n".join(lines) if kind == ".jsonl" else f"[{', '.join(lines)}]")
    assert [p.answer for p in opened(str(file))] == [
        r"1 \times 10^{-7}", r"6.02 \times 10^{23}", "100000", "12345678901234567891",
        "-2.50",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_an_exponent_beyond_all_numbers_spoils_one_answer_and_no_file(tmp_path, kind):
    line = '{"problem": "?", "answer": 1e99999999999999999999, "score": -1e-99999999999999999999}'
    file = tmp_path / f"rows{kind}"
    file.write_text(line if kind == ".jsonl" else f"[{line}]")
    assert opened(str(file))[0].answer == ""
    with pytest.raises(DataError, match="column 'answer' is inf"):
        opened(str(file), need_answer=True)


def test_a_file_with_no_good_row_is_refused(mixed):
    with pytest.raises(
        DataError, match=r"mixed\.jsonl has no problem .*: no problem 4, not JSON 1"
    ):
        opened(mixed, columns=Columns(problem="nosuch"), bad_rows="skip")


def test_bad_rows_has_two_values(mixed):
    with pytest.raises(ConfigError, match="bad_rows='drop', wanted one of refuse, skip"):
        opened(mixed, bad_rows="drop")


def test_index_and_slice(mixed):
    problems = opened(mixed, bad_rows="skip")
    assert [p.prompt for p in problems[1:]] == ["b", "c", "d"]
    assert problems[-1].prompt == "d"
    assert len(problems) == 4
    with pytest.raises(IndexError):
        problems[4]


def test_without_counts_and_leaves_the_original_alone(mixed):
    problems = opened(mixed, bad_rows="skip")
    fewer = problems.without({"too long": [0], "odd": [2]}).without({"too long": {1}})
    assert [p.prompt for p in fewer] == ["b"]
    assert fewer.skipped == problems.skipped | {"too long": 2, "odd": 1}
    assert len(problems) == 4
    assert problems.without({}).skipped == problems.skipped
    with pytest.raises(DataError, match=r"has no problem that can be used: .*too long 4"):
        problems.without({"too long": range(4)})


# the real files

SIZES = {
    "aime24/thunlp_opd_AIME24_test.json": 30, "aime25/thunlp_opd_AIME25_test.json": 30,
    "amc/prime_aimo_validation_amc_83.jsonl": 83,
    "math500/simplerl_math500_test.jsonl": 500,
    "minerva/qwen25math_minerva_math_test.jsonl": 272,
    "olympiadbench/qwen25math_olympiadbench_test.jsonl": 675,
    "gsm8k/gsm8k_test.jsonl": 1319, "gsm8k/gsm8k_train.jsonl": 7473,
    "luffy_eval/luffy_valid.all.parquet": 6023,
    "dapo_math_17k/dapo-math-17k-processed.parquet": 17917,
    "deepmath/DeepMath_deduped.parquet": 14116,
    "numina_aops/rllm_aime_train.json": 975,
}  # fmt: skip


@needs_data
@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_real_files_open(name, size):
    problems = opened(str(FOLDER / name), need_answer=True)
    assert len(problems) == size
    assert problems.skipped == {}
    assert all(problems[i].prompt and problems[i].answer for i in range(0, size, 50))


@pytest.mark.slow
@needs_data
def test_real_answers_and_solutions():
    gsm8k = opened(str(FOLDER / "gsm8k/gsm8k_train.jsonl"), need_solution=True, need_answer=True)
    for problem in gsm8k:
        assert problem.solution.endswith(f"\n\\boxed{{{problem.answer}}}")
        assert "####" not in problem.solution
        assert "<<" not in problem.solution
        assert float(problem.answer) is not None
    amc = opened(str(FOLDER / "amc/prime_aimo_validation_amc_83.jsonl"))
    assert amc[0].answer == "142"
    minerva = opened(str(FOLDER / "minerva/qwen25math_minerva_math_test.jsonl"))
    assert minerva[0].answer == "1.6"
    dapo = opened(str(FOLDER / "dapo_math_17k/dapo-math-17k-processed.parquet"))
    assert dapo[0].prompt.startswith("In triangle $ABC$, $\\sin \\angle A")
    assert (dapo[0].answer, dapo[0].id) == ("34", "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079")
    luffy = opened(str(FOLDER / "luffy_eval/luffy_valid.all.parquet"))
    assert collections.Counter(p.system[:17] for p in luffy) == {"Your task is to f": 6023}


@needs_data
def test_a_real_file_without_solutions_says_so():
    with pytest.raises(DataError, match=r"dapo-math-17k-processed\.parquet, row 1: no solution"):
        opened(str(FOLDER / "dapo_math_17k/dapo-math-17k-processed.parquet"), need_solution=True)
