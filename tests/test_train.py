"""Whole runs on random models that a test can afford: files, keys, resume, outcomes of methods."""

import html
import json
import re

import jax
import numpy as np
import pytest

from configs import recipes
from opd_jax import data, train, workdir
from opd_jax.errors import ConfigError, NonFiniteError, WorkdirError
from opd_jax.grading import Grade
from opd_jax.report import run as report
from opd_jax.report.text import clean
from opd_jax.training.make_setup import make_setup
from tests.support import bench_metrics
from tests.support.small_run import lines, lines_of, questions, small, without_times
from tests.workdir.test_trackers import scalars


@pytest.fixture(scope="module")
def straight(folders, tmp_path_factory):
    """Four steps of Stable-OPD in one go."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    config = small(folders)
    config.log.tensorboard = True
    return train.run(config, str(workdir), command=["test"]), workdir


@pytest.mark.short
def test_run_writes_what_the_design_promises(straight):
    result, workdir = straight
    assert json.loads((workdir / "config.json").read_text())["steps"] == 4
    run = json.loads((workdir / "run.json").read_text())
    assert run["command"] == ["test"]
    assert run["packages"]["jax"] == jax.__version__
    rows = lines(workdir, "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    promised = {
        "loss": "total opd sft reference_kl", "optim": "grad_norm learning_rate updates",
        "rollout": "truncation_rate repetition_rate length_mean length_max tokens "
                   "sampler_logprob_gap_max sampler_logprob_gap_mean",
        "score": "advantage_mean student_logprob_mean teacher_logprob_mean reverse_kl "
                 "student_entropy teacher_entropy entropy_gap overlap_ratio overlap_advantage "
                 "student_overlap_mass teacher_overlap_mass repeated_token_fraction "
                 "regular_token_advantage hedging_rate extreme_probability_difference",
        "score/first_16": "advantage_mean reverse_kl student_entropy teacher_entropy "
                          "overlap_ratio",
        "score/first_64": "reverse_kl",
        "rollout/first_16": "tokens",
        "time": "rollout_s score_s update_s step_s",
        "speed": "rollout_tokens_per_s score_tokens_per_s update_tokens_per_s",
        "memory": "peak_gib",
    }  # fmt: skip
    keys = {f"{room}/{name}" for room, names in promised.items() for name in names.split()}
    assert keys <= rows[1].keys()
    assert not [key for key in rows[1] if "first_1000" in key]  # more than the budget
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert rows[1]["rollout/sampler_logprob_gap_max"] < 1e-4
    evaluated = "accuracy stderr truncation_rate repetition_rate length_mean unparsed timeouts"
    for row in (rows[0], rows[4]):
        assert {f"eval/tiny/{name}" for name in evaluated.split()} <= row.keys()
    sample = lines(workdir, "rollouts.jsonl")[0]
    tokens = len(sample["response_ids"])
    assert tokens == len(sample["advantage"]) == len(sample["sampler_logprob"])
    assert len(lines(workdir / "eval" / "4", "tiny.jsonl")) == 4
    assert set(result.table) == {"student before", "student after", "teacher"}


@pytest.mark.short
def test_tensorboard_has_every_figure_of_the_log(straight):
    _, workdir = straight
    found = scalars(workdir / "tensorboard")
    for row in lines(workdir, "metrics.jsonl"):
        for key in row.keys() - {"step"}:
            assert found[key][row["step"]] == pytest.approx(row[key], rel=1e-6), key


@pytest.mark.slow
@pytest.mark.short
def test_a_real_run_is_reported(straight, tmp_path, capsys):
    _, workdir = straight
    report.run([str(workdir)], out=str(tmp_path / "report.html"), text=True)
    assert "Too short to judge: 4 steps with rollouts." in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    for text in ("TruncRate of rollouts", "Accuracy, tiny", "Student&#x27;s log-prob", "Overlap of the top-k",
                 "A: overlap by position", "A: seconds of a step by stage", "before (step 0)",
                 "after (step 4)", "teacher", "step 4, "):  # fmt: skip
        assert text in page, text
    shown = re.sub("<[^>]+>", "", page[page.index('<pre class="tokens"') :].partition("</pre>")[0])
    response = lines(workdir, "rollouts.jsonl")[0]["response"]
    assert html.unescape(shown).removesuffix("⟨end⟩").replace("▫", "") == clean(response)


@pytest.mark.short
@pytest.mark.parametrize("rule", ["tail", "ngram"])
def test_what_is_not_correct_counts_as_wrong(rule):
    collector, rollout, scores, _ = bench_metrics.prepare(
        "tiny", data.Tokenizer(recipes.recipe("tiny").student.path), rows=4, tokens=120
    )
    collector.config.metrics.repeated_tokens = rule
    grades = [Grade.CORRECT, Grade.WRONG, Grade.UNPARSED, Grade.TIMEOUT]
    row = bench_metrics.measure(collector, rollout, scores, grades)
    mask_BT = rollout.response_mask_BT
    advantage_BT = scores.teacher_logprob_BT - scores.student_logprob_BT
    reward_B = [advantage_BT[i][mask_BT[i]].mean() for i in range(4)]
    assert (row["rollout/graded"], row["rollout/grading_timeouts"]) == (3.0, 1.0)
    assert row["rollout/accuracy"] == pytest.approx(1 / 3)  # a time-out is neither right nor wrong
    assert row["score/reward_right"] == pytest.approx(reward_B[0], rel=1e-5)
    assert row["score/reward_wrong"] == pytest.approx(np.mean(reward_B[1:3]), rel=1e-5)
    assert 0 < row["score/repeated_token_fraction"] < 1
    ungraded = bench_metrics.measure(collector, rollout, scores, None)
    new = {"rollout/accuracy", "rollout/graded", "rollout/grading_timeouts"}
    new |= {"score/reward_right", "score/reward_wrong", "score/reward_auroc"}
    assert row.keys() - ungraded.keys() == new


def test_four_steps_equal_two_and_a_resume_and_two_bit_for_bit(straight, folders, tmp_path):
    result, workdir = straight
    config = small(folders)
    config.steps = 2
    train.run(config, str(tmp_path / "run"), command=[])
    config.steps = 4
    resumed = train.run(config, str(tmp_path / "run"), command=[])
    jax.tree.map(np.testing.assert_array_equal, resumed.state, result.state)
    again = without_times(lines(tmp_path / "run", "metrics.jsonl"))
    for row in again:  # the run of two steps was evaluated at its own end
        if row["step"] == 2:
            for key in [key for key in row if key.startswith("eval/")]:
                del row[key]
    assert again == without_times(lines(workdir, "metrics.jsonl"))
    assert lines(tmp_path / "run", "rollouts.jsonl") == lines(workdir, "rollouts.jsonl")


@pytest.mark.slow
def test_lines_after_the_checkpoint_and_torn_ones_are_cut_on_resume(folders, tmp_path, capsys):
    config = small(folders, "sft")
    config.steps, config.optim.schedule = 2, "linear"
    train.run(config, str(tmp_path / "run"), command=[])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss/total": 1.0}\n{"step": 4, "lo')
    config.steps = 3
    train.run(config, str(tmp_path / "run"), command=[])
    assert [row["step"] for row in lines(tmp_path / "run", "metrics.jsonl")] == [0, 1, 2, 3]
    assert "note: steps was 2 and is 3; the learning rate" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_on_the_way_changes_nothing(straight, folders, tmp_path):
    result, _ = straight
    config = small(folders)
    config.eval.every = 1
    config.eval.problems = 2
    other = train.run(config, str(tmp_path / "run"), command=[])
    jax.tree.map(np.testing.assert_array_equal, other.state, result.state)


@pytest.mark.slow
def test_answers_to_held_out_problems_have_a_budget_of_their_own(folders, tmp_path):
    config = small(folders, "opd")
    config.steps, config.rollout.max_response_tokens = 1, 40
    short = train.run(config, str(tmp_path / "short"), command=[])
    config.eval.max_response_tokens, config.eval.slots = 100, 3
    long = train.run(config, str(tmp_path / "long"), command=[])
    jax.tree.map(np.testing.assert_array_equal, long.state, short.state)
    longest = [
        max(row["length"] for row in lines(tmp_path / run / "eval" / "0", "tiny.jsonl"))
        for run in ("short", "long")
    ]
    assert longest[0] <= 40 < longest[1] <= 100
    assert max(len(row["response_ids"]) for row in lines(tmp_path / "long", "rollouts.jsonl")) <= 40
    config.eval.max_response_tokens = 125
    with pytest.raises(ConfigError, match=r"student's 160 positions; .*max_response_tokens=124"):
        make_setup(config)


@pytest.mark.slow
def test_a_closing_table_has_one_protocol(folders, tmp_path, capsys):
    """Resumed with other settings of eval: the row of before is left out, that of after measured anew."""
    config = small(folders, "opd")
    config.steps, config.eval.teacher, config.eval.best = 2, False, "length_mean"
    train.run(config, str(tmp_path / "run"), command=[])
    assert "is left out of the table" not in capsys.readouterr().out
    config.eval.max_response_tokens = 30
    resumed = train.run(config, str(tmp_path / "run"), command=[])  # nothing is left but the table
    assert list(resumed.table) == ["student after"]
    assert resumed.table["student after"]["length_mean"] <= 30
    assert "the student before training is left out of the table" in capsys.readouterr().out
    again = train.run(config, str(tmp_path / "run"), command=[])
    assert again.table == resumed.table
    config.eval.every = 1  # says when, not how
    assert train.run(config, str(tmp_path / "run"), command=[]).table == resumed.table
    config.grading.grader = "math_verify"
    train.run(config, str(tmp_path / "run"), command=[], accept_changes=True)
    said = capsys.readouterr().out
    assert "the student before training is left out of the table" in said


@pytest.mark.slow
def test_a_run_without_held_out_data_measures_none(folders, tmp_path, capsys):
    config = small(folders, "sft")
    config.eval.data = ""
    config.steps = 1
    assert train.run(config, str(tmp_path / "run"), command=[]).table == {}
    assert not (tmp_path / "run" / "eval").exists()
    assert "accuracy" not in capsys.readouterr().out


@pytest.mark.slow
def test_epochs_set_the_steps(folders, tmp_path):
    config = small(folders, "sft")
    config.data.train = questions(tmp_path, count=10, solution="1+2=3.\n\\boxed{3}")
    config.data.epochs, config.eval.data = 0.8, ""
    result = train.run(config, str(tmp_path / "run"), command=[])  # 8 problems, 4 a step
    assert int(result.state.step) == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 2


def test_a_line_may_hold_any_character(folders, tmp_path):
    file = tmp_path / "lines.jsonl"
    log = workdir.Lines(file, resume_step=-1)
    rows = [{"step": 1, "text": "a\u2028b\u0085c"}, {"step": 2, "text": "d"}]
    for row in rows:
        log.write(row)
    log.close()
    workdir.Lines(file, resume_step=2).close()
    assert lines_of(file) == rows


@pytest.mark.slow
def test_non_finite_numbers_stop_the_run(folders, tmp_path):
    config = small(folders, "sft")
    config.optim.learning_rate = 1e30
    with pytest.raises(NonFiniteError, match=r"step \d.*learning_rate"):
        train.run(config, str(tmp_path / "run"), command=[])


def test_fewer_steps_than_are_done_is_refused(straight, folders):
    _, workdir = straight
    config = small(folders)
    config.steps = 3
    with pytest.raises(ConfigError, match=r"steps=3, but .* is at step 4; set --config.steps=4"):
        train.run(config, str(workdir), command=["test"])
    config.steps = 4  # the refused command has changed nothing that the run needs
    assert set(train.run(config, str(workdir), command=["test"]).table) >= {"student after"}


def test_another_config_in_the_workdir_is_refused(straight, folders):
    _, workdir = straight
    config = small(folders)
    config.loss.beta_kl = 0.5
    with pytest.raises(WorkdirError, match=r"loss.beta_kl: 0.05 there, 0.5 now"):
        train.run(config, str(workdir), command=[])
