"""The harness: prompts hold what the student writes, runs resume to the same bits, and what is refused."""

import json

import jax
import numpy as np
import pytest

from opd_jax import train
from opd_jax.config.validate import validate
from opd_jax.data import Problem
from opd_jax.errors import ConfigError, DataError
from opd_jax.memory_plan import memory, step_time
from opd_jax.metrics.timing import Clock
from opd_jax.training.harness import Harness, filled, without_thoughts
from opd_jax.training.make_setup import make_setup
from opd_jax.training.step_functions import make_step_functions
from opd_jax.training.weights import load_weights
from tests.memory_plan.test_step_time import DEVICE
from tests.support.plan_small import workload
from tests.support.small_run import lines, small, without_times

PROMPT, SHOWS = "Plan: {problem}", "{problem} {plan}"
# The embedded tokenizer has a token for each letter and word of its problems.
FIELDS = {
    "harness.prompt": PROMPT, "harness.max_tokens": 12, "harness.max_prompt_tokens": 60,
    "data.teacher_prompt_template": SHOWS, "eval.teacher": False, "data.bad_rows": "skip",
    "rollout.max_response_tokens": 60, "rollout.max_prompt_tokens": 48,
}  # fmt: skip


def with_harness(folders, **changes):
    config = small(folders, "opd")
    config.steps, config.log.gradients, config.log.rollouts = 3, 0, 8
    for name, value in (FIELDS | {k.replace("__", "."): v for k, v in changes.items()}).items():
        section, _, field = name.partition(".")
        config[section][field] = value
    return config


@pytest.mark.short
def test_closed_thoughts_are_removed_and_open_ones_stay():
    assert without_thoughts("<think>a\nb</think>\n\nAdd. ") == "Add."
    assert without_thoughts("<think>a</think>") == ""
    assert without_thoughts(" <think>a") == "<think>a"
    assert without_thoughts("<think>a</think>b<think>c</think>d") == "bd"


@pytest.mark.short
def test_the_text_is_a_column_of_the_problem():
    problem = Problem("p", "x", "", "", columns=(("plan", "old"), ("of", "a")))
    assert dict(filled(problem, "plan", "new").columns) == {"of": "a", "plan": "new"}
    assert dict(problem.columns)["plan"] == "old"


def stage_of(config):
    setup = make_setup(config)
    functions = make_step_functions(setup.spec)
    weights = load_weights(setup, student=True)
    return setup, Harness(setup, functions), functions.compute_weights(weights.student)


def test_the_teachers_prompt_holds_the_text_and_the_students_does_not(folders):
    setup, harness, student = stage_of(with_harness(folders))
    batch = setup.read([setup.train[i] for i in range(4)])
    written, metrics = harness(3, student, batch, Clock())
    assert written.prompts == batch.prompts
    texts = written.harness_texts
    assert len(texts) == 4
    assert any(texts)
    for problem, text, prompt in zip(batch.problems, texts, written.teacher_prompts, strict=True):
        wanted = setup.teacher_tokenizer.chat(f"{problem.prompt} {text}")
        assert prompt == wanted
        assert len(prompt) <= setup.teacher_width - setup.teacher_response
    assert metrics.keys() == {
        "harness/length_mean", "harness/truncation_rate", "harness/empty", "harness/shortened",
    }  # fmt: skip
    again, _ = harness(3, student, batch, Clock())
    other, _ = harness(4, student, batch, Clock())
    assert again.harness_texts == texts  # the key derives from the step
    assert other.harness_texts != texts
    shown = harness.lines([{"step": 1}] * 3, written)  # two rollouts a problem
    assert [line["plan"] for line in shown] == [texts[0], texts[0], texts[1]]


def test_a_text_that_is_too_long_for_the_teacher_is_shortened(folders):
    setup, harness, _ = stage_of(with_harness(folders))
    problem = setup.train[0]
    room = setup.teacher_width - setup.teacher_response
    prompt, text = harness._prompt(problem, "add 2 and " * 40)
    assert len(prompt) <= room
    assert 0 < len(text) < 400
    assert ("add 2 and " * 40).startswith(text)
    prompt, text = harness._prompt(problem, "")
    assert text == ""
    assert len(prompt) <= room


def test_without_a_harness_the_batch_is_the_same_object(folders):
    config = small(folders, "opd")
    setup = make_setup(config)
    batch = setup.read([setup.train[0]])
    same, metrics = Harness(setup, None)(1, None, batch, Clock())  # type: ignore[arg-type]
    assert same is batch
    assert metrics == {}


def run_of(config, folder) -> tuple[list[dict], list[dict], object]:
    result = train.run(config, str(folder), command=[])
    rows = without_times(lines(folder, "metrics.jsonl"))
    return rows, lines(folder, "rollouts.jsonl"), result.state


@pytest.mark.slow
def test_a_run_resumes_to_the_same_bits(folders, tmp_path):
    config = with_harness(folders, eval__data="", checkpoint__every=1)
    config.eval.teacher = True  # nothing is evaluated
    rows, texts, state = run_of(config, tmp_path / "whole")
    assert all("plan" in line for line in texts)
    assert "harness/length_mean" in rows[1]
    assert "time/harness_s" in lines(tmp_path / "whole", "metrics.jsonl")[1]
    config.steps = 2
    run_of(config, tmp_path / "parts")
    config.steps = 3
    again, more, resumed = run_of(config, tmp_path / "parts")
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert again == rows
    assert more == texts


@pytest.mark.short
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"harness__prompt": "Plan."}, "a text that holds {problem}"),
        ({"harness__prompt": "same"}, "a text that holds {problem}"),
        (
            {"harness__prompt": "", "eval__teacher": True},
            "harness.max_prompt_tokens=60 has no effect",
        ),
        ({"data__teacher_prompt_template": "{problem}"}, "does not show {plan}"),
        ({"data__teacher_prompt_template": "same"}, "does not show {plan}"),
        ({"data__teacher_prompt_template": r"{problem} x_{plan}"}, "does not show {plan}"),  # TeX
        ({"data__prompt_template": "{problem}{plan}"}, "data.prompt_template shows {plan}"),
        ({"harness__prompt": "{problem}{plan}"}, "harness.prompt shows {plan}"),
        ({"harness__field": "hint"}, "does not show {hint}"),
        ({"harness__field": "answer"}, "a name of letters"),
        ({"harness__field": "a b"}, "a name of letters"),
        ({"eval__teacher": True}, "have no {plan}"),
        ({"loss__pg_weight": 0.0, "loss__lambda_gold": 1.0}, "no term of this loss on rollouts"),
        ({"replay__path": "X"}, "that the current student writes"),
    ],
)
def test_what_is_refused_before_anything_is_read(folders, fields, says):
    with pytest.raises(ConfigError, match=says.replace("{", r"\{")) as raised:
        validate(with_harness(folders, **fields))
    assert "\n" not in str(raised.value)


def test_a_template_that_shows_a_plan_without_the_stage(folders, tmp_path):
    config = small(folders, "opd")
    config.data.teacher_prompt_template = SHOWS
    with pytest.raises(
        ConfigError, match=r"shows \{plan\}, but generated problems have only"
    ) as no:
        make_setup(config)
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"problem": "Start with 1, add 2.", "answer": "3"}) + "\n")
    config.data.train = str(file)
    with pytest.raises(DataError, match=r"shows \{plan\}, and there is no such column") as none:
        make_setup(config)
    assert "\n" not in str(no.value) + str(none.value)


def test_texts_and_prompts_that_do_not_fit(folders):
    config = with_harness(folders, data__bad_rows="refuse", harness__max_tokens=200)
    with pytest.raises(DataError, match=r"or a smaller --config\.harness\.max_tokens") as raised:
        make_setup(config)
    assert "\n" not in str(raised.value)
    config = with_harness(folders, data__bad_rows="refuse", harness__max_prompt_tokens=5)
    with pytest.raises(DataError, match=r"set --config\.harness\.max_prompt_tokens=\d+"):
        make_setup(config)


def test_the_programs_of_the_stage_are_listed(folders):
    setup = make_setup(with_harness(folders))
    functions = make_step_functions(setup.spec)
    weights = load_weights(setup, student=False)
    listed = functions.programs(weights.scorer, None, setup.terms.weights)
    names = [program.name for program in listed]
    assert "harness decode 4 x 72" in names
    assert len(names) == len(set(names))


@pytest.mark.short
def test_the_stage_in_the_plan_by_hand():
    """2 texts of 4 tokens after prompts of 6: slots of 10 positions, 24 bytes a position."""
    given = workload(written=2, written_prompt=6, written_tokens=4)
    stages = {stage.name: stage.held for stage in memory.stages(given)}
    assert stages["rollout harness"]["caches"] == 2 * 10 * 24
    assert stages["rollout"]["caches"] == 4 * 8 * 24
    names = [stage.name for stage in step_time.step_time(given, DEVICE).stages]
    assert names == ["rollout harness", "rollout", "score", "update"]
    assert "rollout harness" not in {stage.name for stage in memory.stages(workload())}
