"""Cold-start data from the embedded teacher: what is kept, what is written, and resumption."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import opd, recipes, sft
from opd_jax import config as configuration
from opd_jax import data, models
from opd_jax.errors import ConfigError, DataError, ModelError, WorkdirError
from opd_jax.grading.grader import Grade, Grader
from opd_jax.metrics import make_repetition_rule, repetitive
from opd_jax.tools.cold_start import run as sample
from opd_jax.tools.cold_start import sample_file
from opd_jax.tools.cold_start.report import Fate
from opd_jax.training.make_setup import make_setup
from tests.support.lanes import slow


def small(**changes: object):
    """Eleven problems in batches of four: two whole ones and a rest."""
    config = opd.get_config()
    config.sample.problems = 11
    config.sample.batch = 4
    config.rollout.max_response_tokens = 100
    for field, value in changes.items():
        section, name = field.split("__")
        config[section][name] = value
    return config


def rows(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def header(config) -> dict:
    plan = sample.make_plan(config)
    return {"config": json.loads(configuration.to_json(plan.config)), "sha256": plan.sha256}


class Killed(Exception):
    """Stands for a kill: nothing in the project catches it."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> pathlib.Path:
    """The file of `small()`, sampled in one go."""
    file = tmp_path_factory.mktemp("straight") / "new" / "solutions.jsonl"
    sample.run(small(), str(file), command=["test"])
    return file


@pytest.mark.short
def test_rows_and_report(straight):
    written = rows(straight)
    problems = {p.id: p for p in (data.problem("train", i) for i in range(11))}
    ids = [row["id"] for row in written]
    assert ids == [i for i in problems if i in ids]  # in the problems' order
    assert len(ids) >= 8  # of 11; the teacher solves 92 %
    for row in written:
        problem = problems[row["id"]]
        assert set(row) == {"id", "problem", "solution", "answer"}
        assert (row["problem"], row["answer"]) == (problem.prompt, problem.answer)
        assert row["solution"].endswith(f"\\boxed{{{problem.answer}}}")  # no end token after it
    report = json.loads(straight.with_suffix(".report.json").read_text())
    assert report["solutions"] == sum(report["fates"].values()) == 11
    assert report["fates"]["kept"] == len(written) == report["problems_with_a_solution"]
    finished = 11 - report["fates"]["truncated"] - report["fates"]["empty"]
    assert sum(report["grades"].values()) == finished
    assert report["tokens"]["kept"]["max"] <= 100
    assert report["tokens_per_s"] == pytest.approx(
        report["tokens"]["all"]["sum"] / report["seconds"], rel=0.01
    )
    assert report["config"]["sample"]["problems"] == 11
    assert report["run"]["command"] == ["test"]
    assert report["run"]["packages"]["jax"] == jax.__version__
    assert sorted(f.name for f in straight.parent.iterdir()) == [
        "solutions.jsonl", "solutions.report.json",
    ]  # fmt: skip


@pytest.mark.parametrize("torn", [b"", b'{"batch": {"lengths": [1', b"\0\0\0\n"])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(straight, tmp_path, monkeypatch, torn):
    file, real = tmp_path / "solutions.jsonl", sample.sample_batch
    asked = []

    def dies_at(last):
        def one(plan, number, params, grader):
            asked.append(number)
            if number == last:
                raise Killed
            return real(plan, number, params, grader)

        return one

    monkeypatch.setattr(sample, "sample_batch", dies_at(1))
    with pytest.raises(Killed):
        sample.run(small(), str(file), command=[])
    partial = sample_file.partial_path(file)
    assert [f.name for f in tmp_path.iterdir()] == [partial.name]
    with partial.open("ab") as end:
        end.write(torn)
    monkeypatch.setattr(sample, "sample_batch", dies_at(None))
    sample.run(small(sample__slots=3), str(file), command=[])  # slots change no sample
    assert asked == [0, 1, 1, 2]
    assert file.read_bytes() == straight.read_bytes()
    assert not partial.exists()


def test_a_run_killed_while_it_wrote_its_first_line_starts_again(tmp_path):
    file, header = tmp_path / "x.jsonl", {"config": {"seed": 1}, "sha256": "a"}
    with sample_file.Partial(file, header):
        pass
    partial = sample_file.partial_path(file)
    whole = partial.read_bytes()
    partial.write_bytes(whole[:7])
    with sample_file.Partial(file, header) as again:
        assert again.done == []
        with pytest.raises(WorkdirError, match="written by another process"):
            sample_file.Partial(file, header)
    assert partial.read_bytes() == whole


def test_a_finished_file_is_left_alone_and_another_config_refused(straight, tmp_path):
    before = straight.read_bytes(), straight.with_suffix(".report.json").read_bytes()
    config = small()
    config.loss.beta_kl, config.steps = 0.5, 7  # nothing that samples depend on
    assert sample.run(config, str(straight), command=["again"])["run"]["command"] == ["test"]
    with pytest.raises(WorkdirError, match=r"config \(sample.temperature: 0.7 there, 1.0 now\)"):
        sample.run(small(sample__temperature=1.0), str(straight), command=[])
    with sample_file.Partial(tmp_path / "a.jsonl", header(small())):
        pass
    with pytest.raises(WorkdirError, match=r"\(sample.batch: 4 there, 5 now\); give a new --out"):
        sample.run(small(sample__batch=5), str(tmp_path / "a.jsonl"), command=[])
    assert before == (straight.read_bytes(), straight.with_suffix(".report.json").read_bytes())


def test_a_file_that_an_older_version_began(tmp_path):
    now, file = header(small()), tmp_path / "a.jsonl"

    def older(section, name, **changes):
        then = json.loads(json.dumps(now))
        del then["config"][section][name]
        sample_file.partial_path(file).write_text(json.dumps(then) + "\n")
        with sample_file.Partial(file, header(small(**changes))) as again:
            return again.done

    assert older("data", "date") == older("sample", "keep_repetitive") == []
    with pytest.raises(WorkdirError, match=r"\(sample.keep_repetitive: False there, True now\)"):
        older("sample", "keep_repetitive", sample__keep_repetitive=True)
    with pytest.raises(WorkdirError, match=r"\(grading.grader: 'that of an older version' there, "):
        older("grading", "grader")


def test_changed_problems_are_another_run(tmp_path):
    file = tmp_path / "problems.jsonl"
    texts = [{"problem": "Start with 2, add 3.", "answer": answer} for answer in ("5", "6")]
    config = small(data__train=str(file))
    file.write_text(json.dumps(texts[0]) + "\n")
    with sample_file.Partial(tmp_path / "out.jsonl", header(config)):
        pass
    file.write_text(json.dumps(texts[1]) + "\n")
    with pytest.raises(WorkdirError, match="the problems' sha256"):
        sample_file.Partial(tmp_path / "out.jsonl", header(config))


def test_files_in_the_way_are_not_touched(tmp_path):
    file = tmp_path / "thesis.jsonl"
    file.write_text("x\n")
    with pytest.raises(WorkdirError, match=r"report.json.* cannot be read; give a new --out"):
        sample.run(small(), str(file), command=[])
    partial = sample_file.partial_path(tmp_path / "b.jsonl")
    partial.write_text('{"id": 1}\n')
    with pytest.raises(WorkdirError, match="was not written by"):
        sample.run(small(), str(tmp_path / "b.jsonl"), command=[])
    assert (file.read_text(), partial.read_text()) == ("x\n", '{"id": 1}\n')


@pytest.mark.parametrize(
    ("out", "changes", "error", "says"),
    [
        (
            "a.jsonl",
            {"teacher__path": "", "loss__pg_weight": 0.0, "loss__beta_kl": 1.0},
            ConfigError,
            "set --config.teacher.path=DIR",
        ),
        ("a.jsonl", {"teacher__path": "nowhere"}, ModelError, "nowhere"),
        ("a.jsonl", {"data__train": "none.jsonl"}, DataError, "none.jsonl does not exist"),
        ("a.jsonl", {"rollout__max_prompt_tokens": 5}, DataError, "max_prompt_tokens="),
        ("a.jsonl", {"sample__max_response_tokens": 500}, ConfigError, "512 positions"),
        ("a.jsonl", {"sample__samples": 2, "sample__temperature": 0.0}, ConfigError, "same"),
        ("a.json", {}, WorkdirError, "ends in .jsonl"),
        ("file/a.jsonl", {}, WorkdirError, "not a folder"),
        ("folder.jsonl", {}, WorkdirError, "is a folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, out, changes, error, says):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(error, match=says) as raised:
        sample.run(small(**changes), str(tmp_path / out), command=[])
    assert "\n" not in str(raised.value)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder.jsonl"]


@pytest.mark.slow
def test_nothing_kept_is_told_with_its_reasons(tmp_path):
    config = small(sample__max_response_tokens=8, sample__problems=4)
    with pytest.raises(DataError, match=r"none of 4 .*truncated 4.*sample.max_response_tokens"):
        sample.run(config, str(tmp_path / "a.jsonl"), command=[])
    assert [f.name for f in tmp_path.iterdir()] == ["a.report.json"]  # free for the next try


def test_fates_come_in_order():
    section, rule = small().sample, make_repetition_rule(small().metrics)
    loop = "7+5=12; " * 40

    def of(text, *, truncated=False, grade=None):
        return sample.fate(
            text, truncated=truncated, grade=grade, repetitive=repetitive(text, rule),
            section=section,
        )  # fmt: skip

    assert of(loop, truncated=True, grade=Grade.WRONG) is Fate.TRUNCATED
    assert of(" \n") is Fate.EMPTY
    for grade in (Grade.WRONG, Grade.UNPARSED, Grade.TIMEOUT):
        assert of(loop, grade=grade).name == grade.name
    assert of(loop) is of(loop, grade=Grade.CORRECT) is Fate.REPETITIVE
    assert of("short") is of("short", grade=Grade.CORRECT) is Fate.KEPT
    section.keep_wrong = section.keep_repetitive = True
    assert of(loop, grade=Grade.WRONG) is Fate.KEPT
    assert of(loop, truncated=True) is Fate.TRUNCATED


def test_answers_that_miss_are_dropped_and_problems_without_one_are_kept(tmp_path):
    """The same problem with its answer, with a wrong one, and with none; two samples each."""
    problem = data.problem("train", 0)
    given = [problem.answer, str(int(problem.answer) + 1), ""]
    source = tmp_path / "problems.jsonl"
    lines = [
        {"id": f"p{i}", "problem": problem.prompt, "answer": answer}
        for i, answer in enumerate(given)
    ]
    system = {"role": "system", "content": "Solve it."}
    earlier = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    lines[2]["problem"] = [system, *earlier, {"role": "user", "content": problem.prompt}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = small(data__train=str(source), sample__samples=2, sample__problems=0)
    config.rollout.max_prompt_tokens = 60
    plan = sample.make_plan(config)
    ends = plan.stop_ids[0]
    texts = {True: f"so \\boxed{{{problem.answer}}}", False: "so \u2028 \\boxed{x}"}
    answers = [plan.tokenizer.encode(texts[True])] * 4 + [plan.tokenizer.encode(texts[False])] * 2

    def written(model, prompts, sampling, **_):
        total = max(map(len, prompts)) + 30
        made = [[*prompt, *answer, ends] for prompt, answer in zip(prompts, answers, strict=True)]
        lengths = np.array([len(ids) for ids in made])
        return sample_rollout(made, lengths, np.array([len(p) for p in prompts]), total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "sample_responses", written)
        report = sample.run(config, str(tmp_path / "out.jsonl"), command=[])
        config.sample.keep_wrong = True
        all_of_them = sample.run(config, str(tmp_path / "all.jsonl"), command=[])
    assert report["fates"] | {"kept": 4, "wrong": 2} == report["fates"]
    assert report["grades"] == {
        "CORRECT": 2, "WRONG": 2, "UNPARSED": 0, "TIMEOUT": 0, "ungraded": 2,
    }  # fmt: skip
    assert report["problems_with_a_solution"] == 2
    assert (all_of_them["fates"]["kept"], all_of_them["grades"]["WRONG"]) == (6, 2)
    assert "2 wrong solutions are not dropped" in sample.table(all_of_them)
    assert "2 solutions are ungraded" in sample.table(report)
    read = data.open_problems(str(tmp_path / "out.jsonl"), field="data.train", need_solution=True)
    assert [p.id for p in read] == ["p0#0", "p0#1", "p2#0", "p2#1"]
    assert [p.system for p in read] == ["", "", "Solve it.", "Solve it."]
    assert [p.solution for p in read] == [texts[True]] * 2 + [texts[False]] * 2
    assert {p.prompt for p in read} == {problem.prompt}
    assert [p.history for p in read] == [()] * 2 + [(("user", "?"), ("assistant", "!"))] * 2


@pytest.mark.short
def test_turns_that_a_template_refuses_are_left_out_or_named(tmp_path):
    """As in training: of a block the one row is counted, and the others stay."""
    source, template = tmp_path / "problems.jsonl", tmp_path / "one_turn.jinja"
    rows = [{"id": f"p{i}", "problem": data.problem("train", i).prompt} for i in range(3)]
    rows[1]["history"] = [["?", "!"]]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small(data__train=str(source), sample__problems=0)
    config.rollout.max_prompt_tokens = 60
    own = data.Tokenizer(config.teacher.path).hf.chat_template
    template.write_text("{% if messages|length > 2 %}{{ raise_exception('one') }}{% endif %}" + own)
    config.teacher.chat_template = str(template)
    with pytest.raises(DataError, match=r"problem p1: .* and earlier turns \(one\).*bad_rows=skip"):
        sample.make_plan(config)
    config.data.bad_rows = "skip"
    plan = sample.make_plan(config)
    assert [problem.id for problem in plan.problems] == ["p0", "p2"]
    assert plan.problems.skipped == {"template refuses the turns": 1}


@pytest.mark.short
def test_only_what_ended_can_be_kept():
    """One outcome each: ended, out of budget, stopped on repetition."""
    config = small(sample__batch=3, sample__keep_wrong=True, sample__keep_repetitive=True)
    config.sample.problems = 3
    plan = sample.make_plan(config)

    def written(model, prompts, sampling, **_):
        made = [[*prompt, *plan.tokenizer.encode("so \\boxed{1}")] for prompt in prompts]
        lengths = np.array([len(ids) for ids in made])
        rollout = sample_rollout(made, lengths, np.array([len(p) for p in prompts]), lengths.max())
        return rollout.replace(outcome_B=np.arange(3))

    with pytest.MonkeyPatch.context() as patch, Grader() as grader:
        patch.setattr(sample, "sample_responses", written)
        batch, kept = sample.sample_batch(plan, 0, sample.Weights({}), grader)
    assert batch.fates == ["kept", "truncated", "truncated"]
    assert len(kept) == 1


def sample_rollout(made, lengths, prompt_lengths, total):
    from opd_jax.types import Outcome, Rollout

    tokens = np.zeros((len(made), total), np.int32)
    for i, ids in enumerate(made):
        tokens[i, : len(ids)] = ids
    return Rollout(
        tokens_BT=tokens, length_B=lengths, prompt_length_B=prompt_lengths,
        sampler_logprob_BT=np.zeros(tokens.shape, np.float32),
        outcome_B=np.full(len(made), Outcome.EOS),
    )  # fmt: skip


@pytest.mark.slow
def test_no_id_beyond_the_tokenizer_is_drawn(straight, tmp_path):
    """A model whose output matrix has rows that no token belongs to, and that it loves most."""
    config = small()
    plan = sample.make_plan(config)
    model, params = models.load(config.teacher.path)
    padded = dataclasses.replace(model, vocab_size=model.vocab_size + 64)
    params = jax.tree.map(np.asarray, params)
    table = params["embed"]["embedding"]
    # A multiple of a row has a larger logit wherever that row's is positive: of some row, always.
    params["embed"]["embedding"] = np.concatenate([table, 50 * table[-64:]])
    models.save(str(tmp_path / "padded"), padded, params, plan.tokenizer.hf)
    config.teacher.path = str(tmp_path / "padded")
    config.sample.problems = 4
    assert sample.make_plan(config).vocabulary == plan.vocabulary == plan.tokenizer.size
    sample.run(config, str(tmp_path / "a.jsonl"), command=[])
    firsts = [row for row in rows(straight) if row["id"] in {f"tiny-train-{i}" for i in range(4)}]
    assert rows(tmp_path / "a.jsonl") == firsts


def test_the_teacher_may_be_the_student_with_a_prompt_of_its_own():
    config = small(data__teacher_prompt_template="{problem} Solution: {solution}")
    config.teacher.path = "student"
    plan = sample.make_plan(config)
    assert plan.config.teacher.path == config.student.path
    assert "Solution: " in plan.style.template
    assert plan.width > config.rollout.max_prompt_tokens  # which speaks of the student's prompt


def test_the_file_is_what_sft_trains_on(straight):
    config = sft.get_config()
    config.data.train = str(straight)
    ready = make_setup(config)  # also looks whether every solution fits
    assert [p.solution for p in ready.train] == [row["solution"] for row in rows(straight)]
    assert "solution from solution, answer from answer, id from id" in "".join(ready.notes)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--out=a.jsonl"], 1, "--config.teacher.path=DIR"),
        *slow(
            (["--out=a.jsonl", "--config.n=4"], 1, "did you mean 'sample.samples'?"),
            (["--out=a.jsonl", "--batch_size=4"], 2, "did you mean 'sample.batch'?"),
            ([], 2, "--out"),
        ),
    ],
)
def test_command(arguments, status, says, tmp_path):
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, str(root / "launch" / "sample.py"), f"--config={root}/configs/sft.py", *arguments],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == status
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_sampling_of_the_paper():
    """2604.13016, C.1."""
    section = recipes.recipe("qwen3-1.7b").sample
    assert (section.temperature, section.top_p) == (0.7, 0.95)
    assert section.max_response_tokens == 12_288
