"""Whole runs at the seam between prompt and response: golden rows, cold start, evaluation, probes.

Also what is checked of every id that a model reads, and the day that prompts print.
"""

import datetime
import json
import pathlib
import shutil
import types

import numpy as np
import pytest

from launch.make_tiny import make_tokenizer
from opd_jax import data, models, train, workdir
from opd_jax.errors import ConfigError, DataError, WorkdirError
from opd_jax.evaluation import in_training
from opd_jax.evaluation import run as runner
from opd_jax.evaluation import subject as subjects
from opd_jax.grading import Grader
from opd_jax.tools import probe
from opd_jax.tools.cold_start import run as sample
from opd_jax.tools.probe import workload, writing
from opd_jax.training import setup
from opd_jax.training.setup import make_setup
from opd_jax.types import Outcome, Rollout
from tests.support.small_run import small
from tests.support.tokenizers import CHATML, LLAMA3, OPENS, TURNS

THOUGHTS = "<think>\n1+2=3.\n</think>\n\n\\boxed{3}"


def write(file: pathlib.Path, text: str) -> str:
    file.write_text(text)
    return str(file)


def problems(file: pathlib.Path, *solutions: str, **more: object) -> str:
    rows = [
        {"id": f"p{i}", "problem": "Start with 1, add 2.", "solution": text, "answer": "3", **more}
        for i, text in enumerate(solutions)
    ]
    return write(file, "".join(json.dumps(row) + "\n" for row in rows))


def trained_on(config) -> str:
    """The text of the first golden row, special tokens included."""
    made = make_setup(config)
    batch = made.read(made.train[:1])
    return made.tokenizer.hf.decode(batch.prompts[0] + batch.golden[0])


def sft(folders, tmp_path, template: str, *solutions: str):
    config = small(folders, "sft")
    config.student.chat_template = write(tmp_path / "student.jinja", template)
    config.rollout.max_prompt_tokens = 60
    config.rollout.max_response_tokens = 100
    config.data.train, config.eval.data = problems(tmp_path / "data.jsonl", *solutions), ""
    return config


# ---- golden solutions


@pytest.mark.parametrize("template", [OPENS, CHATML])
@pytest.mark.parametrize("solution", [THOUGHTS, "<think>1+2=3.</think>3"])
def test_a_golden_row_opens_its_thoughts_once(folders, tmp_path, template, solution):
    config = sft(folders, tmp_path, template, solution)
    text = trained_on(config)
    assert text.count("<think>") == text.count("</think>") == 1
    assert text.endswith("<|im_end|>")


@pytest.mark.parametrize(
    ("template", "solution", "says"),
    [
        (OPENS, "1+2=3. \\boxed{3}", "never closes these thoughts; give solutions with thoughts"),
        (CHATML, "1+2=3.\n</think>\n3", "closes </think>, which neither it nor the prompt opens"),
        (CHATML.replace("assistant\n", "assistant\n<think></think>"), THOUGHTS, "opens <think> again"),
    ],
)  # fmt: skip
def test_solutions_that_cannot_be_made_right_are_refused_or_counted(
    folders, tmp_path, template, solution, says
):
    good = {OPENS: THOUGHTS, CHATML: THOUGHTS}.get(template, "3")
    config = sft(folders, tmp_path, template, solution, good)
    with pytest.raises(DataError, match=says) as error:
        make_setup(config)
    assert str(error.value).startswith("data.train: problem p0: ")
    assert "\n" not in str(error.value)
    config.data.bad_rows = "skip"
    made = make_setup(config)
    assert [problem.id for problem in made.train] == ["p1"]
    assert "left out: golden solution " in "".join(made.notes)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (OPENS, r"student: prompts end in '<think>\\n'; golden solutions go on behind it"),
        (TURNS, "note: student: the chat template has no generation prompt"),
        (LLAMA3, "student: the chat template prints the date: that of data.date=20"),
    ],
)  # fmt: skip
def test_the_start_of_a_run_says_what_its_prompts_do(folders, tmp_path, template, says):
    config = sft(folders, tmp_path, template, THOUGHTS)
    config.rollout.max_prompt_tokens = 100
    config.rollout.max_response_tokens = 60
    assert says.replace("\\\\", "\\") in "\n".join(make_setup(config).notes)


# ---- responses


def rollout_of(prompts, responses, end: int) -> Rollout:
    made = [[*p, *r, end] for p, r in zip(prompts, responses, strict=True)]
    tokens = np.zeros((len(made), max(map(len, made))), np.int32)
    for i, ids in enumerate(made):
        tokens[i, : len(ids)] = ids
    return Rollout(
        tokens_BT=tokens, length_B=np.array(list(map(len, made))),
        prompt_length_B=np.array(list(map(len, prompts))),
        sampler_logprob_BT=np.zeros(tokens.shape, np.float32),
        outcome_B=np.full(len(made), Outcome.EOS),
    )  # fmt: skip


RESPONSE = THOUGHTS.removeprefix("<think>\n")


def writes(tokenizer: data.Tokenizer):
    """In place of `generate`: every response is RESPONSE and the end token."""

    def generate(params, model, prompts, **_):
        ids = [tokenizer.encode(RESPONSE)] * len(prompts)
        return rollout_of(prompts, ids, tokenizer.end_of_turn())

    return generate


def test_a_cold_start_round_trips_its_thoughts(folders, tmp_path, monkeypatch):
    """What the teacher wrote behind `<think>` is, as golden data, these ids behind that prompt."""
    config = small(folders)
    config.teacher.chat_template = write(tmp_path / "teacher.jinja", OPENS)
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 60, 100
    config.data.train = problems(tmp_path / "asked.jsonl", "", "")
    planned = sample.make_plan(config)
    monkeypatch.setattr(sample, "generate", writes(planned.tokenizer))
    report = sample.run(config, str(tmp_path / "out.jsonl"), command=[])
    assert report["grades"]["CORRECT"] == 2
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["solution"] for row in rows] == [THOUGHTS] * 2
    for template in (OPENS, CHATML):
        config = sft(folders, tmp_path, template)
        config.data.train = str(tmp_path / "out.jsonl")
        made = make_setup(config)
        golden = made.read(made.train[:1]).golden[0][:-1]
        begun = "" if template == OPENS else "<think>\n"
        assert golden == made.tokenizer.encode(begun + RESPONSE)


def test_held_out_answers_are_written_with_their_thoughts_and_graded_as_before(
    folders, tmp_path, monkeypatch
):
    config = sft(folders, tmp_path, OPENS, THOUGHTS)
    made = make_setup(config)
    asked = made.train[:1]
    graded = []

    class Watching(Grader):
        def grade(self, pairs, **more):
            graded.extend(pairs := list(pairs))
            return super().grade(pairs, **more)

    monkeypatch.setattr(in_training, "generate", writes(made.tokenizer))
    out = tmp_path / "eval" / "x.jsonl"
    with Watching() as grader:
        summary = in_training.evaluate(
            {}, made.student, made.tokenizer, asked,
            made.student_style.prompts(asked, made.tokenizer),
            max_prompt_tokens=60, key=None, section=config.eval, rollout=config.rollout,
            repetition=config.metrics, stop_ids=(), vocabulary=1, grader=grader, out=out,
        )  # fmt: skip
    row = json.loads(out.read_text())
    assert (row["answer"], row["grade"]) == (THOUGHTS, "CORRECT")
    assert graded == [(RESPONSE, "3")]  # the graders' text is what it was
    assert summary["length_mean"] == len(made.tokenizer.encode(RESPONSE)) + 1


@pytest.mark.parametrize("fallbacks", [(), ("after_think",), ("answer_line", "last_number")])
@pytest.mark.parametrize("response", [RESPONSE, "1+2\n</think>\nAnswer: 3", "so</think>3", "3", ""])
def test_no_grade_depends_on_the_opening(fallbacks, response):
    with Grader() as grader:
        pairs = [(response, "3"), ("<think>\n" + response, "3")]
        first, second = grader.grade(pairs, fallbacks=fallbacks)
    assert first == second


def test_answers_to_benchmarks_are_written_with_their_thoughts(folders, tmp_path, monkeypatch):
    config = evaluation()
    config.student.chat_template = write(tmp_path / "opens.jinja", OPENS)
    monkeypatch.setattr(runner, "generate", writes(data.Tokenizer(str(folders / "student"))))
    runner.run(config, str(folders / "student"), str(tmp_path / "out"), command=[])
    rows = [json.loads(x) for x in (tmp_path / "out/eval/tiny.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [THOUGHTS] * 2
    assert rows[0]["prompt"].endswith("<think>\n")


@pytest.mark.parametrize(
    ("student", "teacher", "ends"),
    [(OPENS, CHATML, "<think>\n"), (CHATML, OPENS, "assistant\n"), (OPENS, OPENS, "<think>\n")],
)
def test_a_teacher_goes_on_where_the_students_thoughts_are_open(
    folders, tmp_path, student, teacher, ends
):
    config = small(folders)
    for role, template in (("student", student), ("teacher", teacher)):
        config[role].chat_template = write(tmp_path / f"{role}.jinja", template)
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 60, 40
    config.data.train, config.probe.problems = problems(tmp_path / "data.jsonl", ""), 1
    made = workload.make_plan(config)
    writer = writing.student_writer(made)
    other = writing.teacher_writer(made.setups[0], made.problems).behind(writer)
    (text,) = [other.tokenizer.hf.decode(ids) for ids in other.prompts]
    assert text == other.texts[0]
    assert text.endswith("<|im_start|>assistant\n" + "<think>\n" * ("think" in ends))
    begun = "<think>\n" * (student == OPENS)
    response = other.tokenizer.encode(RESPONSE)
    with Grader() as grader:
        (answer,) = writing.read(made, rollout_of(other.prompts, [response], 2), other, [0], grader)
    assert answer.text == begun + RESPONSE
    assert answer.right


# ---- ids without a row of the embedding


@pytest.fixture(scope="module")
def larger(folders, tmp_path_factory) -> pathlib.Path:
    """Models whose tokenizer knows one id more (<think>) than their embeddings have rows."""
    root = tmp_path_factory.mktemp("larger")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    for name in ("student", "teacher"):
        shutil.copytree(folders / name, root / name)
        tokenizer.save_pretrained(root / name)
    assert models.load_config(str(root / "student")).vocab_size == tokenizer.vocab_size
    return root


def unknown(config, **changes):
    for field, value in changes.items():
        *sections, name = field.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return config


SAYS = r"'<think>', id 308, wanted ids below 308, the rows of the {}'s embedding; take"


@pytest.mark.parametrize(
    ("where", "method", "says"),
    [
        ("golden", "sft", "golden solution holds " + SAYS.format("student")),
        ("golden", "stable_opd", "golden solution holds " + SAYS.format("student")),
        ("student's prompt", "opd", "prompt holds " + SAYS.format("student")),
        ("student's template", "opd", "prompt holds " + SAYS.format("student")),
        ("system prompt", "sft", "prompt holds " + SAYS.format("student")),
        ("teacher's prompt", "opd", "teacher's prompt holds " + SAYS.format("teacher")),
        ("teacher's template", "opd", "teacher's prompt holds " + SAYS.format("teacher")),
        ("privileged prompt", "opd", "teacher's prompt holds " + SAYS.format("teacher")),
        ("held-out prompt", "opd", "eval.data: .*prompt holds " + SAYS.format("student")),
        ("held-out privileged prompt", "opd", "eval.data: .*prompt holds " + SAYS.format("teacher")),
    ],
)  # fmt: skip
def test_every_id_that_a_model_reads_is_checked_first(larger, tmp_path, where, method, says):
    config = small(larger, method)
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 60, 100
    config.data.train = problems(tmp_path / "data.jsonl", "3", "3")
    config.eval.data = problems(tmp_path / "held.jsonl", "3")
    make_setup(config)  # a special token that no text holds may lie beyond
    thought = problems(tmp_path / "thought.jsonl", THOUGHTS)
    opens = write(tmp_path / "opens.jinja", OPENS)
    change = {
        "golden": {"data__train": thought},
        "student's prompt": {"data__prompt_template": "{problem} <think>"},
        "student's template": {"student__chat_template": opens},
        "system prompt": {"data__system_prompt": "Use <think>."},
        "teacher's prompt": {"data__teacher_prompt_template": "{problem} <think>"},
        "teacher's template": {"teacher__chat_template": opens},
        "privileged prompt": {
            "data__train": thought, "data__teacher_prompt_template": "{problem} {solution}",
        },
        "held-out prompt": {
            "eval__data": write(
                tmp_path / "asks.jsonl", json.dumps({"problem": "<think> 1+2?", "answer": "3"}) + "\n"
            ),
        },
        "held-out privileged prompt": {
            "eval__data": thought, "data__teacher_prompt_template": "{problem} {solution}",
        },
    }[where]  # fmt: skip
    with pytest.raises(DataError, match=says) as error:
        train.run(unknown(config, **change), str(tmp_path / "run"), command=[])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_fewer_rows_that_reads_the_students_prompts(larger, folders, tmp_path):
    config = small(larger, "opd")
    config.student.path = str(tmp_path / "student")
    shutil.copytree(larger / "student", tmp_path / "student")
    _, params = models.load(str(folders / "student"))
    wide = models.load_config(str(folders / "student"))
    table = np.asarray(params["embed"]["embedding"])
    params["embed"]["embedding"] = np.concatenate([table, table[:1]])
    shutil.rmtree(tmp_path / "student")
    tokenizer = data.Tokenizer(str(larger / "student")).hf
    models.save(
        str(tmp_path / "student"),
        type(wide)(**{**vars(wide), "vocab_size": 309}),
        params,
        tokenizer,
    )
    config.data.prompt_template = "{problem} <think>"
    with pytest.raises(DataError, match=SAYS.format("teacher")):
        make_setup(config)


def test_cold_start_evaluation_and_probes_check_their_prompts(larger, tmp_path):
    config = small(larger, "opd")
    config.data.prompt_template = "{problem} <think>"
    with pytest.raises(DataError, match="prompt holds " + SAYS.format("teacher")):
        sample.run(config, str(tmp_path / "out.jsonl"), command=[])
    with pytest.raises(DataError, match="prompt holds " + SAYS.format("student")):
        probe.run("pair", config, command=[])
    config = evaluation()
    config.data.prompt_template = "{problem} <think>"
    with pytest.raises(DataError, match="prompt holds " + SAYS.format("student")):
        runner.run(config, str(larger / "student"), str(tmp_path / "eval"), command=[])
    assert not list(tmp_path.iterdir())


# ---- the day that a template prints


def evaluation():
    from configs import evaluate as evaluate_config

    config = evaluate_config.get_config()
    config.eval.problems, config.eval.samples, config.eval.batch = 2, 1, 2
    config.eval.max_response_tokens = 40
    return config


@pytest.fixture
def clock(monkeypatch):
    """Sets the day that programs see."""

    def set_day(day: str) -> None:
        fixed = datetime.date.fromisoformat(day)

        class Day(datetime.date):
            @classmethod
            def today(cls):
                return fixed

        for module in (setup, data.tokenizer):
            monkeypatch.setattr(module, "datetime", types.SimpleNamespace(date=Day))

    return set_day


def dated(folders, tmp_path):
    config = small(folders, "opd")
    template = write(tmp_path / "dated.jinja", LLAMA3)
    config.student.chat_template = config.teacher.chat_template = template
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 90, 40
    config.steps, config.eval.problems, config.log.rollouts = 2, 1, 1
    return config


@pytest.mark.slow
def test_a_run_that_goes_on_tomorrow_has_the_prompts_of_today(folders, tmp_path, clock, capsys):
    config, folder = dated(folders, tmp_path), tmp_path / "run"
    clock("2026-01-31")
    train.run(config, str(folder), command=[])
    assert workdir.read_config(folder)["data"]["date"] == "2026-01-31"
    clock("2026-02-01")
    capsys.readouterr()
    config.steps = 3
    train.run(config, str(folder), command=[])
    assert "prints the date: that of data.date=2026-01-31" in capsys.readouterr().out
    prompts = [
        json.loads(x)["prompt"] for x in (folder / "rollouts.jsonl").read_text().splitlines()
    ]
    assert len(prompts) == 3
    assert all("Today Date: 31 Jan 2026" in prompt for prompt in prompts)
    subject = subjects.open_subject(str(folder), evaluation(), step=None)
    assert "31 Jan 2026" in subject.tokenizer.render("?")
    probed = workload.make_plan(dated(folders, tmp_path), folder=str(folder))
    assert "31 Jan 2026" in probed.setups[0].tokenizer.render("?")
    config.data.date = "2026-02-01"
    with pytest.raises(WorkdirError, match=r"data\.date: '2026-01-31' there, '2026-02-01' now"):
        train.run(config, str(folder), command=[])


def test_a_template_without_a_date_leaves_the_config_alone(folders):
    assert make_setup(small(folders)).config.data.date == ""


def test_evaluations_and_cold_starts_keep_their_day(folders, tmp_path, clock, monkeypatch):
    student = str(folders / "student")
    config = evaluation()
    config.student.chat_template = write(tmp_path / "dated.jinja", LLAMA3)
    cold = dated(folders, tmp_path)
    cold.data.train = problems(tmp_path / "asked.jsonl", "")
    tokenizer = data.Tokenizer(student)
    monkeypatch.setattr(runner, "generate", writes(tokenizer))
    monkeypatch.setattr(sample, "generate", writes(tokenizer))
    cold.rollout.max_response_tokens = 60
    for day in ("2026-01-31", "2026-02-01"):
        clock(day)
        runner.run(config, student, str(tmp_path / "eval"), command=[])
        sample.run(cold, str(tmp_path / "out.jsonl"), command=[])
    header = json.loads((tmp_path / "eval/evaluation.json").read_text())
    assert "31 Jan 2026" in header["benchmarks"]["tiny"]["first_prompt"]
    assert header["fields"]["data.date"] == "2026-01-31"
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["config"]["data"]["date"] == "2026-01-31"


@pytest.mark.parametrize("date", ["today", "2026-13-01", "31.01.2026", "20260131", 5])
def test_a_day_is_a_day(folders, date):
    config = small(folders)
    with config.ignore_type():
        config.data.date = date
    with pytest.raises(ConfigError, match=r"data\.date=") as error:
        make_setup(config)
    assert "\n" not in str(error.value)
