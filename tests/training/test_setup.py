"""What a run's setup makes of golden solutions and of the templates of its prompts."""

import json

import pytest

from opd_jax.errors import DataError
from opd_jax.training.make_setup import make_setup
from tests.support.small_run import small
from tests.support.thoughts import THOUGHTS, sft
from tests.support.tokenizers import CHATML, LLAMA3, OPENS, TURNS


def trained_on(config) -> str:
    """The text of the first golden row, special tokens included."""
    made = make_setup(config)
    batch = made.read(made.train[:1])
    return made.tokenizer.hf.decode(batch.prompts[0] + batch.golden[0])


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
        (OPENS, r"student: prompts end in '<think>\\n'; golden solutions continue after it"),
        (TURNS, "note: student: the chat template has no generation prompt"),
        (LLAMA3, "student: the chat template prints the date: that of data.date=20"),
    ],
)  # fmt: skip
def test_the_start_of_a_run_says_what_its_prompts_do(folders, tmp_path, template, says):
    config = sft(folders, tmp_path, template, THOUGHTS)
    config.rollout.max_prompt_tokens = 100
    config.rollout.max_response_tokens = 60
    assert says.replace("\\\\", "\\") in "\n".join(make_setup(config).notes)


def test_a_teacher_with_its_own_prompt_has_room_for_the_budget_of_a_response(folders, tmp_path):
    """A solution may use what a short prompt leaves of a row, unless the teacher reads rows of its own."""
    file = tmp_path / "rows.jsonl"
    row = {"problem": "1+1?", "solution": "2" * 30, "answer": "2"}
    file.write_text(json.dumps(row) + "\n")
    config = small(folders, "opd")
    config.data.train, config.eval.data = str(file), ""
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 36, 25
    config.loss.golden_divergence = 1.0
    assert len(make_setup(config).train) == 1
    config.data.teacher_prompt_template = "Think. {problem}"
    with pytest.raises(DataError, match="golden solution has 31 tokens") as error:
        make_setup(config)
    assert "--config.rollout.max_response_tokens=31" in str(error.value)
    config.loss.update({"golden_divergence": 0.0, "lambda_gold": 1.0})
    assert len(make_setup(config).train) == 1  # the supervised term asks no teacher
