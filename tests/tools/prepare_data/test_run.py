"""Every count of a prepared file by hand: filters, duplicates, benchmarks, earlier turns."""

import shutil

import pytest

from opd_jax.data import open_problems
from opd_jax.errors import DataError
from opd_jax.tools.prepare_data import run as module
from tests.support.paths import ROOT
from tests.support.prepared import config, done, read, row, write
from tests.tools.prepare_data.test_decontaminate import LONG, angles


def test_every_count_by_hand(tmp_path, train, bench):
    made = config(train, split__opd=2)
    made.decontaminate.benchmarks.amc = bench
    report = done(tmp_path / "out", made)
    assert report["read"] == 13
    assert report["dropped"] == {
        "contaminated": 1, "duplicate": 2, "no answer": 1, "no problem": 1, "no solution": 1,
        "not JSON": 1, "unfinished": 1, "wrong": 1,
    }  # fmt: skip
    assert (report["kept"], report["sft"], report["opd"], report["left over"]) == (4, 2, 2, 0)
    assert report["contamination"] == {
        "amc": {
            "problems": 2,
            "too short": {"exact": 1, "ngram": 1},
            "found": {
                "exact": {"problems": 1, "rows": 1},
                "ngram": {"problems": 1, "rows": 1},
                "any": {"problems": 1, "rows": 1},
            },
        }
    }
    assert report["contaminated rows"] == {"exact": 1, "ngram": 1}
    text = module.table(report)
    assert "- unfinished                           1\n" in text
    assert "amc (2 problems): exact 1 problems in 1 rows, ngram 1 problems in 1 rows" in text
    assert "note: the length of solutions was not checked" in text


def test_kept_rows_can_be_read_back(tmp_path, train):
    out = tmp_path / "out"
    done(out, config(train))
    rows = read(out / "sft.jsonl") + read(out / "opd.jsonl")
    by_line = {r["line"]: r for r in rows}
    assert by_line[1] == {
        "id": "first", "problem": "a", "solution": "so \\boxed{4}", "answer": "4", "source": train,
        "line": 1,
    }  # fmt: skip
    assert sorted(by_line) == [1, 6, 11, 12, 13]
    assert by_line[13]["solution"] == "\\boxed{4}"
    for name in ("sft", "opd"):
        problems = open_problems(
            str(out / f"{name}.jsonl"), field="data.train", need_solution=True, need_answer=True
        )
        assert [p.id for p in problems] == [r["id"] for r in read(out / f"{name}.jsonl")]
        systems = {p.prompt: p.system for p in problems}
        assert systems.get("2 - 3", "think") == "think"
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "dropped.jsonl", "opd.jsonl", "report.json", "sft.jsonl",
    ]  # fmt: skip


def test_dropped_rows_say_why(tmp_path, train, bench):
    made = config(train)
    made.decontaminate.benchmarks.amc = bench
    done(tmp_path / "out", made)
    dropped = {r["line"]: r for r in read(tmp_path / "out" / "dropped.jsonl")}
    assert list(dropped) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert dropped[2]["detail"].startswith(f"{train}, line 2: no answer")
    assert dropped[7] == {"source": train, "line": 7, "id": "raw-7", "reason": "duplicate"}
    assert dropped[6]["reason"] == "contaminated"
    assert dropped[6]["problem"] == "Solve. " + LONG
    assert dropped[6]["matches"][0] == {
        "benchmark": "amc", "id": "rooks", "line": 2, "method": "exact", "score": 1.0,
        "problem": LONG,
    }  # fmt: skip


def test_what_the_filters_let_through(tmp_path, train):
    loose = config(train, filter__solution=False, filter__answer=False, filter__duplicates=True)
    report = done(tmp_path / "out", loose)
    assert report["dropped"] == {"no problem": 1, "not JSON": 1}
    with pytest.raises(DataError, match=r"raw\.jsonl, line 9: no problem"):
        done(tmp_path / "strict", config(train, data__bad_rows="refuse"))


def test_a_bad_copy_does_not_shadow_a_good_one(tmp_path):
    path = write(tmp_path / "raw.jsonl", [row("a", answer=None, solution="?"), row("a")])
    assert done(tmp_path / "out", config(path))["kept"] == 1


def test_grading_is_for_rows_nobody_vouches_for(tmp_path):
    rows = [
        row("a"), row("b", solution="so \\boxed{5}"), row("c", solution="four"),
        row("d", generations=["\\boxed{5}"], correctness_math_verify=[True]),
        row("e", generations=["\\boxed{5}"], correctness_math_verify=None),
    ]  # fmt: skip
    report = done(tmp_path / "out", config(write(tmp_path / "raw.jsonl", rows), filter__grade=True))
    assert report["dropped"] == {"wrong": 3}
    dropped = read(tmp_path / "out" / "dropped.jsonl")
    assert [(r["line"], r["detail"]) for r in dropped] == [
        (2, "math-verify: WRONG"), (3, "math-verify: UNPARSED"), (5, "math-verify: WRONG"),
    ]  # fmt: skip


def test_length_is_counted_in_tokens(tmp_path):
    tokenizer = str(ROOT / "opd_jax" / "tiny" / "student")
    path = write(tmp_path / "raw.jsonl", [row("a", solution="1" * n) for n in (9, 10, 11)])
    made = config(path, filter__tokenizer=tokenizer, filter__max_tokens=10, filter__duplicates=True)
    report = done(tmp_path / "out", made)
    assert report["dropped"] == {"too long": 1}
    assert not any("length" in note for note in report["notes"])
    assert read(tmp_path / "out" / "dropped.jsonl")[0]["detail"] == "11 tokens"


def test_turns_that_a_template_refuses_are_left_out_or_named(tmp_path):
    tokenizer = str(shutil.copytree(ROOT / "opd_jax" / "tiny" / "student", tmp_path / "student"))
    (tmp_path / "student" / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role != ('assistant' if loop.index0 % 2 else 'user') %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}{{ m.role }}:{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    earlier = [{"role": "user", "content": "Hello."}]
    path = write(tmp_path / "raw.jsonl", [row("a"), row("b", history=earlier, id="x"), row("c")])
    report = done(tmp_path / "out", config(path, filter__tokenizer=tokenizer))
    assert (report["kept"], report["dropped"]) == (2, {"template refuses the turns": 1})
    (dropped,) = read(tmp_path / "out" / "dropped.jsonl")
    assert (dropped["line"], dropped["id"]) == (2, "x")
    strict = config(path, filter__tokenizer=tokenizer, data__bad_rows="refuse")
    with pytest.raises(DataError, match=r"line 2: problem x: .*and earlier turns \(turns must alt"):
        done(tmp_path / "strict", strict)


def test_embeddings_by_a_given_encoder(tmp_path):
    path = write(tmp_path / "raw.jsonl", [row("10"), row("80"), row("170")])
    made = config(path)
    made.decontaminate.benchmarks.amc = write(tmp_path / "b.jsonl", [{"question": "0"}])
    report = done(tmp_path / "out", made, encoder=angles)
    assert report["contamination"]["amc"]["found"]["embedding"] == {"problems": 1, "rows": 1}
    assert report["kept"] == 2


def test_several_files_and_patterns(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        write(tmp_path / name, [row(name)])
    made = config(f"{tmp_path}/c.jsonl,{tmp_path}/[ab].jsonl", split__sft=3)
    done(tmp_path / "out", made)
    assert [r["problem"] for r in read(tmp_path / "out" / "sft.jsonl")] == [
        "c.jsonl", "a.jsonl", "b.jsonl",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"no file matches '/nowhere/\*\.json'"):
        done(tmp_path / "none", config("/nowhere/*.json"))
    with pytest.raises(DataError, match="does not exist"):
        done(tmp_path / "none", config("/nowhere/a.json"))


def test_earlier_turns_are_compared_and_kept(tmp_path, bench):
    def turns(*texts: str) -> list[dict]:
        roles = ("user", "assistant", "user")
        return [{"role": r, "content": text} for r, text in zip(roles, texts, strict=True)]

    rows = [
        row("x") | {"problem": turns("1+1?", "2", "And 3?")},
        row("x") | {"problem": turns("2+2?", "4", "And 3?")},  # another question of the same end
        row("x") | {"problem": turns("2+2?", "4", "And 3?")},
        row("x") | {"problem": turns(LONG, "4", "And 3?")},  # a benchmark's problem, asked before
        row("And 3?"),
    ]
    made = config(write(tmp_path / "raw.jsonl", rows), split__sft=3)
    made.decontaminate.benchmarks.amc = bench
    report = done(tmp_path / "out", made)
    assert report["dropped"] == {"contaminated": 1, "duplicate": 1}
    assert report["columns"] == (
        "problem from problem, solution from solution, answer from answer; 4 with earlier turns"
    )
    assert f"columns: {report['columns']}" in module.table(report)
    kept = open_problems(str(tmp_path / "out" / "sft.jsonl"), field="data.train")
    assert [(p.history[0][1] if p.history else "", p.prompt) for p in kept] == [
        ("1+1?", "And 3?"), ("2+2?", "And 3?"), ("", "And 3?"),
    ]  # fmt: skip
    assert "2 with earlier turns" in kept.describe()


def test_nothing_kept_is_an_error(tmp_path, train):
    made = config(train)
    made.data.columns.answer = "nosuch"
    with pytest.raises(DataError, match=r"no row is kept \(no answer 11, no .*dropped\.jsonl"):
        done(tmp_path / "out", made)
    assert "'nosuch' is not there" in read(tmp_path / "out" / "dropped.jsonl")[0]["detail"]
