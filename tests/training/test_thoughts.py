"""Responses behind an opened thought: cold start, held-out answers, benchmarks, a teacher of its own."""

import json

import jax
import pytest

from opd_jax import data, models
from opd_jax.evaluation import in_training
from opd_jax.evaluation import run as runner
from opd_jax.grading import Grader
from opd_jax.metrics import make_repetition_rule
from opd_jax.rollout import Batching, SamplingParams
from opd_jax.tools.cold_start import run as sample
from opd_jax.tools.probe import workload, writing
from opd_jax.training.make_setup import make_setup
from tests.support.lanes import slow
from tests.support.small_run import small
from tests.support.thoughts import (
    RESPONSE,
    THOUGHTS,
    evaluation,
    problems,
    rollout_of,
    sft,
    write,
    writes,
)
from tests.support.tokenizers import CHATML, OPENS


def test_a_cold_start_round_trips_its_thoughts(folders, tmp_path, monkeypatch):
    """What the teacher wrote behind `<think>` is, as golden data, these ids behind that prompt."""
    config = small(folders)
    config.teacher.chat_template = write(tmp_path / "teacher.jinja", OPENS)
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 60, 100
    config.data.train = problems(tmp_path / "asked.jsonl", "", "")
    planned = sample.make_plan(config)
    monkeypatch.setattr(sample, "sample_responses", writes(planned.tokenizer))
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

    monkeypatch.setattr(in_training, "sample_responses", writes(made.tokenizer))
    out = tmp_path / "eval" / "x.jsonl"
    with Watching() as grader:
        summary = in_training.evaluate(
            models.Model(made.student, {}),
            in_training.Exam(
                made.tokenizer, asked, made.student_style.prompts(asked, made.tokenizer),
                samples=config.eval.samples, repetition=make_repetition_rule(config.metrics),
            ),
            SamplingParams(1), key=jax.random.key(0), batching=Batching(), grader=grader, out=out,
        )  # fmt: skip
    row = json.loads(out.read_text())
    assert (row["answer"], row["grade"]) == (THOUGHTS, "CORRECT")
    assert graded == [(RESPONSE, "3")]  # the graders' text is what it was
    assert summary["length_mean"] == len(made.tokenizer.encode(RESPONSE)) + 1


@pytest.mark.parametrize(
    "fallbacks", [(), *slow((("after_think",),), (("answer_line", "last_number"),))]
)
@pytest.mark.parametrize("response", [RESPONSE, "1+2\n</think>\nAnswer: 3", "so</think>3", "3", ""])
def test_no_grade_depends_on_the_opening(fallbacks, response):
    with Grader() as grader:
        pairs = [(response, "3"), ("<think>\n" + response, "3")]
        first, second = grader.grade(pairs, fallbacks=fallbacks)
    assert first == second


def test_answers_to_benchmarks_are_written_with_their_thoughts(folders, tmp_path, monkeypatch):
    config = evaluation()
    config.student.chat_template = write(tmp_path / "opens.jinja", OPENS)
    monkeypatch.setattr(
        runner, "sample_responses", writes(data.Tokenizer(str(folders / "student")))
    )
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
