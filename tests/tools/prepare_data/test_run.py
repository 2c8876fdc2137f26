"""prepare_data: every count by hand, resumption to the byte, the command, and the real overlaps."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs import prepare_data
from opd_jax.data import open_problems
from opd_jax.errors import ConfigError, DataError, WorkdirError
from opd_jax.tools.prepare_data import config as prepare_config
from opd_jax.tools.prepare_data import run as module
from opd_jax.tools.prepare_data.filters import problem_key
from tests.support.make_rows import lines
from tests.support.paths import ROOT
from tests.support.real_data import FOLDER, needs_data
from tests.tools.prepare_data.test_decontaminate import LONG, angles


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


@pytest.fixture
def train(tmp_path) -> str:
    return write(tmp_path / "raw.jsonl", ROWS)


@pytest.fixture
def bench(tmp_path) -> str:
    return write(
        tmp_path / "bench.jsonl", [{"question": "other"}, {"question": LONG, "id": "rooks"}]
    )


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


# the split


def split(count: int, **sizes: object) -> tuple[list[bool], list[bool]]:
    keys = np.random.default_rng(0).integers(0, 2**64, count, np.uint64)
    section = prepare_config.default().split
    section.update(sizes)
    sft, opd = module._split(keys, section)
    assert not (sft & opd).any()
    return sft, opd


@pytest.mark.parametrize(
    ("sizes", "sft", "opd"),
    [
        ({"sft": 33, "opd": 13}, 33, 13),  # 54 are left over
        ({"sft": 33}, 33, 67),
        ({"opd": 13}, 87, 13),
        ({"sft": 90, "opd": 20}, 90, 10),
        ({"sft": 200, "opd": 20}, 100, 0),
        ({"opd": 200}, 0, 100),
    ],
)
def test_sizes_of_the_split(sizes, sft, opd):
    masks = split(100, **sizes)
    assert (sum(masks[0]), sum(masks[1])) == (sft, opd)


def test_share_of_the_split():
    sft, opd = split(10_000)
    assert np.all(sft != opd)
    assert sum(opd) == pytest.approx(10_000 * 13 / 46, abs=150)  # 3 sigma = 135
    assert sum(split(100, opd_share=0.0)[1]) == 0
    assert sum(split(100, opd_share=1.0)[1]) == 100


@pytest.mark.parametrize("sizes", [{}, {"split__sft": 30, "split__opd": 20}])
def test_the_split_does_not_depend_on_order(tmp_path, sizes):
    rows = [row(f"problem {i}") for i in range(100)]
    members = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        path = write(tmp_path / f"{name}.jsonl", order)
        done(tmp_path / name, config(path, block=7, **sizes))
        members.append({r["problem"] for r in read(tmp_path / name / "opd.jsonl")})
    assert members[0] == members[1]
    done(tmp_path / "c", config(str(tmp_path / "a.jsonl"), seed=1, **sizes))
    assert {r["problem"] for r in read(tmp_path / "c" / "opd.jsonl")} != members[0]


def test_a_shortage_is_noted(tmp_path, train):
    report = done(tmp_path / "out", config(train, split__sft=4, split__opd=13))
    assert (report["sft"], report["opd"]) == (4, 1)
    assert "split.opd=13 was asked for, 1 rows were left" in report["notes"]


def test_keys_see_signs_but_no_white_space():
    assert problem_key("a  b\n") == problem_key("a b")
    assert problem_key("2+3") != problem_key("2-3")
    assert problem_key("a", 0) != problem_key("a", 1) != problem_key("a")


# resumption


def outputs(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("killed_at", [1, 2, 5, 8, 12, 14, 15, 16, 17])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, killed_at, monkeypatch):
    """The run dies at its n-th written file, with half of it on the disk."""
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(lines(40)))
    made = config(str(path), block=10, split__opd=9)
    made.decontaminate.benchmarks.amc = write(
        tmp_path / "bench.jsonl", [{"question": json.loads(next(lines(1)))["problem"]}]
    )
    done(tmp_path / "straight", made)
    whole, count = module._write, 0

    def dying(file, text):
        nonlocal count
        count += 1
        if count == killed_at:
            file.with_name(file.name + ".tmp").write_text("".join(text)[:20])
            raise KeyboardInterrupt
        whole(file, text)

    monkeypatch.setattr(module, "_write", dying)
    with pytest.raises(KeyboardInterrupt):
        done(tmp_path / "killed", made)
    monkeypatch.setattr(module, "_write", whole)
    done(tmp_path / "killed", made)
    assert outputs(tmp_path / "killed").keys() >= outputs(tmp_path / "straight").keys()
    for name, content in outputs(tmp_path / "straight").items():
        assert (tmp_path / "killed" / name).read_bytes() == content, name


def test_finished_blocks_are_not_judged_again(tmp_path, monkeypatch):
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(lines(40)))
    judged = []
    real = module.judge

    def judge(block, **more):
        judged.append(len(block))
        if len(judged) == 3:
            raise KeyboardInterrupt
        return real(block, **more)

    monkeypatch.setattr(module, "judge", judge)
    with pytest.raises(KeyboardInterrupt):
        done(tmp_path / "out", config(str(path), block=15))
    done(tmp_path / "out", config(str(path), block=15))
    assert judged == [15, 15, 10, 10]
    done(tmp_path / "out", config(str(path), block=15))  # finished: the report is read
    assert judged == [15, 15, 10, 10]


def test_a_folder_of_something_else_is_refused(tmp_path, train):
    done(tmp_path / "out", config(train))
    with pytest.raises(WorkdirError, match=r"another config or other files \(different: seed\)"):
        done(tmp_path / "out", config(train, seed=1))
    write(pathlib.Path(train), ROWS[1:])
    with pytest.raises(WorkdirError, match=r"different: file .*raw\.jsonl"):
        done(tmp_path / "out", config(train))
    with pytest.raises(WorkdirError, match="is not empty and was not made by prepare_data"):
        done(tmp_path, config(train))
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="cannot be written"):
        done(tmp_path / "file" / "out", config(train))
    (tmp_path / "out" / "config.json").write_text("[1")
    with pytest.raises(WorkdirError, match=r"config\.json cannot be read"):
        done(tmp_path / "out", config(train))


def test_nothing_kept_is_an_error(tmp_path, train):
    made = config(train)
    made.data.columns.answer = "nosuch"
    with pytest.raises(DataError, match=r"no row is kept \(no answer 11, no .*dropped\.jsonl"):
        done(tmp_path / "out", made)
    assert "'nosuch' is not there" in read(tmp_path / "out" / "dropped.jsonl")[0]["detail"]


# config and command


def changed(field: str, value: object):
    made = config("x.jsonl")
    *sections, name = field.split(".")
    target = made
    for section in sections:
        target = target[section]
    with made.unlocked(), target.ignore_type():
        target[name] = value
    return made


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (
            "data.train",
            "",
            "data.train='', wanted the file to prepare; set --config.data.train=FILE",
        ),
        ("data.bad_rows", "drop", "one of refuse, skip"),
        ("data.trian", "x", "did you mean 'data.train'"),
        ("filter.max_tokens", 0, "filter.max_tokens=0, wanted a whole number, at least 1"),
        ("filter.max_tokens", 2.5, "a whole number"),
        ("filter.grade", 1, "True or False"),
        ("filter.answer", 0, "True or False"),
        ("decontaminate.ngram", -1, "at least 0"),
        ("decontaminate.ngram_share", 0.0, "above 0 to 1"),
        ("decontaminate.embedding_cosine", 1.5, "-1 to 1"),
        ("decontaminate.embedding_cosine", float("nan"), "-1 to 1"),
        (
            "decontaminate.benchmarks.mine",
            3,
            "decontaminate.benchmarks.mine=3, wanted a text",
        ),
        ("split.opd_share", 1.5, "0 to 1"),
        ("block", 0, "at least 1"),
        ("seed", -1, "at least 0"),
    ],
)
def test_impossible_values_are_refused_in_one_line(field, value, says):
    with pytest.raises(ConfigError) as error:
        prepare_config.validate(changed(field, value))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_valid_configs():
    for recipe in prepare_data.RECIPES:
        made = prepare_data.get_config(recipe)
        made.data.train = "x.jsonl"
        prepare_config.validate(made)
    prepare_config.validate(changed("decontaminate.benchmarks.mine", "m.jsonl"))
    with pytest.raises(ConfigError, match="did you mean 'openr1-math'"):
        prepare_data.get_config("openr1math")
    with pytest.raises(ConfigError, match=r"filter\.grade=True needs solutions and answers"):
        prepare_config.validate(config("x", filter__grade=True, filter__answer=False))
    made = config("x")
    with made.unlocked():
        del made.filter.grade
    with pytest.raises(ConfigError, match=r"config\.filter\.grade is missing"):
        prepare_config.validate(made)


def test_openr1_recipe_takes_generations():
    made = prepare_data.get_config("openr1-math")
    assert (made.split.sft, made.split.opd, made.filter.max_tokens) == (33_000, 0, 8192)
    assert made.data.columns.solution == "generations"


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "prepare_data.py"), *arguments],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--config.filter.max_tokns=5"], 1, "did you mean 'filter.max_tokens'"),
        (["--config.filter.max_tokens=many"], 1, "type int"),
        (["--config=configs/prepare_data.py:openr1"], 1, "did you mean 'openr1-math'"),
        (["--config.data.train=none.jsonl"], 1, "none.jsonl does not exist"),
        (["--config.seed=0"], 1, "data.train='', wanted the file to prepare"),
        (["--config.steps=5"], 1, "config.steps is not a field"),  # it is one of train.py's
        (["--uot=x"], 2, "uot"),
    ],
)
def test_mistakes_are_one_line(arguments, status, says, tmp_path):
    completed = command(*arguments, f"--out={tmp_path}/out")
    assert completed.returncode == status, completed.stderr
    (line,) = completed.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, train):
    out = tmp_path / "out"
    completed = command(f"--config.data.train={train}", f"--out={out}")
    assert completed.returncode == 0, completed.stderr
    assert "kept                                   5\n" in completed.stdout
    assert json.loads((out / "report.json").read_text())["kept"] == 5
    missing = command(f"--config.data.train={train}")
    assert missing.returncode == 1
    assert (
        missing.stderr
        == "error: --out is missing, wanted a folder for the result; give --out=DIR\n"
    )


# the real files: data/SOURCES.md has these figures, measured independently

BENCHMARKS = {
    "aime24": "aime24/thunlp_opd_AIME24_test.json", "aime25": "aime25/thunlp_opd_AIME25_test.json",
    "amc": "amc/prime_aimo_validation_amc_83.jsonl", "gsm8k": "gsm8k/gsm8k_test.jsonl",
    "math500": "math500/simplerl_math500_test.jsonl",
    "minerva": "minerva/qwen25math_minerva_math_test.jsonl",
    "olympiad": "olympiadbench/qwen25math_olympiadbench_test.jsonl",
}  # fmt: skip


@needs_data
@pytest.mark.parametrize(
    ("name", "exact", "rows"),
    [
        ("dapo_math_17k/dapo-math-17k-processed.parquet",
         {"amc": 29, "math500": 9, "olympiad": 39}, {"amc": 43, "math500": 11, "olympiad": 43}),
        ("numina_aops/rllm_aime_train.json", {"math500": 6}, {"math500": 6}),
        ("gsm8k/gsm8k_train.jsonl", {}, {}),
        ("deepmath/DeepMath_deduped.parquet", {}, {}),
    ],
)  # fmt: skip
def test_real_overlaps(tmp_path, name, exact, rows):
    made = config(str(FOLDER / name), filter__solution=False)
    for benchmark, file in BENCHMARKS.items():
        made.decontaminate.benchmarks[benchmark] = str(FOLDER / file)
    found = done(tmp_path / "out", made)["contamination"]
    hits = {name: counts["found"]["exact"] for name, counts in found.items()}
    assert {name: h["problems"] for name, h in hits.items() if h["problems"]} == exact
    assert {name: h["rows"] for name, h in hits.items() if h["rows"]} == rows
