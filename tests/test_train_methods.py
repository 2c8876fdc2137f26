"""What the methods make of whole runs: terms, teachers, updates."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import opsd
from launch.make_tiny import make_tokenizer
from opd_jax import models, train
from opd_jax.errors import ConfigError, DataError
from opd_jax.grading import Grade
from opd_jax.grading.grader import Grader
from opd_jax.training.make_setup import make_setup
from tests.support.small_run import lines, questions, small


@pytest.mark.slow
def test_sft_makes_no_rollouts_and_learns(folders, tmp_path):
    config = small(folders, "sft")
    config.teacher.path = ""
    config.steps = 12
    result = train.run(config, str(tmp_path / "run"), command=[])
    rows = lines(tmp_path / "run", "metrics.jsonl")
    assert "rollout/tokens" not in rows[1]
    assert rows[-1]["loss/sft"] < 0.8 * rows[1]["loss/sft"]
    assert set(result.table) == {"student before", "student after"}


@pytest.mark.slow
def test_teacher_equal_to_student_leaves_the_student_where_it_is(folders, tmp_path):
    config = small(folders, "opd")
    config.teacher.path = config.student.path
    config.steps = 1
    result = train.run(config, str(tmp_path / "run"), command=[])
    row = lines(tmp_path / "run", "metrics.jsonl")[1]
    assert row["score/advantage_mean"] == 0.0
    assert row["score/reverse_kl"] == 0.0
    assert row["optim/grad_norm"] == 0.0
    _, before = models.load(config.student.path)
    jax.tree.map(np.testing.assert_array_equal, result.state.params, before)


def equal(one, other) -> bool:
    """Whether two trees hold the same numbers."""
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


def self_distillation(folders, tmp_path, follow: str):
    config = small(folders, "opd")
    config.teacher.path = "student"
    config.teacher.follow = follow
    config.teacher.decay = 0.5
    config.data.teacher_system_prompt = "Add."
    config.data.train = config.eval.data = questions(tmp_path)
    config.eval.match = "[0-9a-z]"
    config.rollout.max_response_tokens = 20
    config.steps = 2
    return config


@pytest.mark.slow
@pytest.mark.parametrize("follow", ["frozen", "average", "live", "every"])
def test_self_distillation_on_a_file_of_questions(folders, tmp_path, follow, capsys):
    config = self_distillation(folders, tmp_path, follow)
    config.teacher.every = 3 if follow == "every" else 10
    result = train.run(config, str(tmp_path / "run"), command=[])
    rows = lines(tmp_path / "run", "metrics.jsonl")
    assert rows[1]["score/advantage_mean"] != 0.0  # another prompt, another distribution
    assert {"eval/questions/matched", "eval/questions/length_mean"} <= rows[0].keys()
    assert "eval/questions/accuracy" not in rows[0]  # nothing to hold an answer against
    assert set(result.table) == {"student before", "student after", "teacher"}
    said = capsys.readouterr().out
    assert "12 problems of 12 rows" in said
    assert "answers that match" in said
    if follow in ("average", "every"):
        assert result.state.average is not None
        config.steps = 4
        resumed = train.run(config, str(tmp_path / "run"), command=[])
        straight = train.run(config, str(tmp_path / "straight"), command=[])
        jax.tree.map(np.testing.assert_array_equal, resumed.state, straight.state)
        assert not equal(
            resumed.state.average, result.state.average
        )  # that of step 3, or another mean
        assert not equal(resumed.state.average, resumed.state.params)
    else:
        assert result.state.average is None


@pytest.mark.slow
@pytest.mark.parametrize("follow", ["frozen", "live"])
def test_divergence_from_a_teacher_with_another_prompt(folders, tmp_path, follow):
    """Full-vocabulary JSD in place of the policy gradient, two updates a rollout."""
    config = self_distillation(folders, tmp_path, follow)
    config.loss.pg_weight, config.loss.divergence_weight = 0.0, 1.0
    config.loss.direction = "jsd"
    config.optim.updates_per_rollout = 2
    config.eval.teacher = False
    result = train.run(config, str(tmp_path / "run"), command=[])
    rows = lines(tmp_path / "run", "metrics.jsonl")
    assert int(result.state.step) == 4
    assert all(row["loss/divergence"] > 0 for row in rows[1:])
    assert rows[1]["loss/total"] == rows[1]["loss/divergence"]
    assert all(np.isfinite(value) for row in rows for value in row.values())


@pytest.mark.slow
def test_a_live_teacher_with_the_students_prompt_has_nothing_to_say(folders, tmp_path):
    config = self_distillation(folders, tmp_path, "live")
    config.data.teacher_system_prompt = "same"
    train.run(config, str(tmp_path / "run"), command=[])
    for row in lines(tmp_path / "run", "metrics.jsonl")[1:]:
        assert row["score/advantage_mean"] == row["optim/grad_norm"] == 0.0


@pytest.mark.slow
def test_a_divergence_over_a_support_in_two_updates_a_rollout(folders, tmp_path):
    config = small(folders, "opd")
    config.steps, config.eval.data = 2, ""
    config.loss.update({"pg_weight": 0.0, "divergence_weight": 1.0, "support": "union", "top_k": 4})
    config.loss.form = "tail"
    config.optim.updates_per_rollout = 2
    config.log.gradients = 1  # one term: nothing to compare it with
    train.run(config, str(tmp_path / "run"), command=[])
    rows = lines(tmp_path / "run", "metrics.jsonl")[1:]
    assert rows[0]["loss/total"] == rows[0]["loss/divergence"] > 0
    assert not any(key.startswith("optim/grad_cosine") for row in rows for key in row)
    # Of nearly uniform models 4 ids and the rest hold less than all of the divergence.
    assert rows[0]["loss/divergence"] < rows[0]["score/reverse_kl"]


@pytest.mark.slow
def test_grpo_has_no_teacher_and_learns_from_grades(folders, tmp_path, monkeypatch):
    config = small(folders, "opd")
    config.steps, config.eval.data, config.teacher.path = 2, "", ""
    config.loss.teacher_coef, config.loss.group_coef = 0.0, 1.0
    train.run(config, str(tmp_path / "wrong"), command=[])
    (row, _) = rows = lines(tmp_path / "wrong", "metrics.jsonl")[1:]
    assert row["rollout/accuracy"] == row["loss/opd"] == row["optim/grad_norm"] == 0.0  # all wrong
    assert not any("teacher" in key or "overlap" in key for row in rows for key in row)
    assert "score/student_entropy" in row
    sample = lines(tmp_path / "wrong", "rollouts.jsonl")[0]
    assert sample["correct"] is False
    assert "teacher_logprob" not in sample
    every_other = [Grade.CORRECT, Grade.WRONG] * 4
    monkeypatch.setattr(Grader, "grade", lambda self, pairs, **how: every_other)
    train.run(config, str(tmp_path / "half"), command=[])
    row = lines(tmp_path / "half", "metrics.jsonl")[1]
    assert row["rollout/accuracy"] == 0.5
    assert row["optim/grad_norm"] > 0
    # Ratio 1: the loss is minus the mean advantage, and each pair's (1, 0) gives +-0.707.
    np.testing.assert_allclose(row["loss/opd"], 0.0, atol=1e-5)
    signs = [np.sign(line["advantage"][0]) for line in lines(tmp_path / "half", "rollouts.jsonl")]
    assert signs == [1.0, 1.0]


def two_prompts(folders, tmp_path):
    """OPCT: the student reads a perturbed prompt, and itself at step 0, as its teacher, the clean one."""
    config = small(folders, "opd")
    rows = [
        {"problem": f"I say 9. {i}+1", "clean": f"{i}+1", "answer": str(i + 1)} for i in range(8)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.train, config.data.teacher_prompt_template = str(file), "{clean}"
    config.teacher.path = "student"
    config.loss.teacher_coef, config.loss.discount = 2.0, 0.9
    config.eval.data, config.eval.teacher, config.steps = "", False, 1
    return config


def test_student_and_teacher_read_two_columns_of_a_row(folders, tmp_path):
    config = two_prompts(folders, tmp_path)
    setup = make_setup(config)
    batch = setup.read([setup.train[3]])
    student, teacher = (
        setup.tokenizer.decode(ids[0]) for ids in (batch.prompts, batch.teacher_prompts)
    )
    assert "I say 9. 3+1" in student
    assert "3+1" in teacher
    assert "I say 9" not in teacher
    config.eval.data = (
        "tiny:test"  # whose problems have no such column: only a teacher would read it
    )
    make_setup(config)
    config.eval.teacher = True
    with pytest.raises(
        ConfigError, match=r"eval.data=tiny:test: the prompt template shows \{clean"
    ):
        make_setup(config)
    config.data.teacher_prompt_template = "{claen}"
    with pytest.raises(DataError, match=r"shows \{claen\}, and .* did you mean \{clean\}\?"):
        make_setup(config)


@pytest.mark.slow
def test_consistency_training_with_two_prompts(folders, tmp_path):
    train.run(two_prompts(folders, tmp_path), str(tmp_path / "run"), command=[])
    row = lines(tmp_path / "run", "metrics.jsonl")[1]
    assert row["score/advantage_mean"] != 0.0
    line = lines(tmp_path / "run", "rollouts.jsonl")[0]
    ratio = np.subtract(line["teacher_logprob"], line["student_logprob"])
    expected = 0.0
    for t in reversed(range(len(ratio))):
        expected = ratio[t] + 0.9 * expected
    np.testing.assert_allclose(line["advantage"][0], 2 * expected, atol=1e-3)


@pytest.mark.slow
def test_extrapolation_scores_with_the_student_at_step_0(folders, tmp_path):
    config = small(folders, "opd")
    config.steps, config.eval.data, config.loss.extrapolation = 2, "", 1.5
    train.run(config, str(tmp_path / "run"), command=[])
    first, later = (
        [line for line in lines(tmp_path / "run", "rollouts.jsonl") if line["step"] == step]
        for step in (1, 2)
    )
    for line in first:  # the reference is the student: 1.5 (log q - log p)
        ratio = np.subtract(line["teacher_logprob"], line["student_logprob"])
        np.testing.assert_allclose(line["advantage"], 1.5 * ratio, atol=1e-4)
    for line in later:  # and then the student has moved
        ratio = np.subtract(line["teacher_logprob"], line["student_logprob"])
        assert np.abs(line["advantage"] - 1.5 * ratio).max() > 1e-4
    config.loss.extrapolation = 1.0
    train.run(config, str(tmp_path / "plain"), command=[])
    rows = [lines(tmp_path / name, "metrics.jsonl")[1] for name in ("run", "plain")]
    assert rows[0]["optim/grad_norm"] != rows[1]["optim/grad_norm"]
    assert rows[0]["score/reverse_kl"] == rows[1]["score/reverse_kl"]


@pytest.mark.slow
def test_evidence_of_the_student_shown_the_solution(folders, tmp_path, monkeypatch):
    """RLSD: the reward gives every sign, the teacher moves the size by a tenth at most, then not at all."""
    config = small(folders, "opd")
    config.steps, config.eval.data, config.log.rollouts = 2, "", 8
    config.teacher.path, config.data.teacher_prompt_template = "student", "{problem}{answer}"
    config.loss.update({"teacher_coef": 0.0, "group_coef": 1.0, "group_normalise": False})
    config.loss.update({"evidence_share": 0.5, "evidence_steps": 1})
    every_other = [Grade.CORRECT, Grade.WRONG] * 4
    monkeypatch.setattr(Grader, "grade", lambda self, pairs, **how: every_other)
    train.run(config, str(tmp_path / "run"), command=[])
    found = lines(tmp_path / "run", "rollouts.jsonl")
    for line in found:
        size = np.array(line["advantage"]) * (2 if line["correct"] else -2)
        if line["step"] == 2:  # the share has fallen to 0
            np.testing.assert_array_equal(size, 1.0)
            continue
        ratio = np.subtract(line["teacher_logprob"], line["student_logprob"])
        ratio *= 1 if line["correct"] else -1
        expected = 0.5 + 0.5 * np.clip(np.exp(ratio), 0.8, 1.2)
        np.testing.assert_allclose(size, expected, atol=1e-4)
        assert np.abs(size - 1.0).max() > 1e-5


@pytest.mark.slow
def test_a_rollout_whose_grading_timed_out_is_not_compared_with_others(
    folders, tmp_path, monkeypatch
):
    """Its reward is unknown, not 0: the clock must not say what is learnt."""
    config = small(folders, "opd")
    config.steps, config.eval.data, config.teacher.path = 1, "", ""
    config.loss.teacher_coef, config.loss.group_coef, config.log.rollouts = 0.0, 1.0, 8
    timed_out = [Grade.CORRECT, Grade.TIMEOUT, Grade.WRONG, Grade.TIMEOUT] * 2
    monkeypatch.setattr(Grader, "grade", lambda self, pairs, **how: timed_out)
    train.run(config, str(tmp_path / "run"), command=[])
    row = lines(tmp_path / "run", "metrics.jsonl")[1]
    assert (row["rollout/graded"], row["rollout/grading_timeouts"]) == (4.0, 4.0)
    assert row["rollout/accuracy"] == 0.5
    assert row["optim/grad_norm"] == 0.0  # nobody is left to compare with: all advantages are 0
    samples = lines(tmp_path / "run", "rollouts.jsonl")
    assert [sample["correct"] for sample in samples] == [True, None, False, None] * 2
    assert {x for sample in samples for x in sample["advantage"]} == {0.0}


@pytest.mark.slow
def test_a_problem_without_an_answer_takes_no_grade_from_the_others(folders, tmp_path):
    config = small(folders, "opd")
    file = pathlib.Path(questions(tmp_path, 4, answer="7"))
    _, *others = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({"problem": "Which?", "id": "open"}), *others]) + "\n")
    config.data.train, config.data.shuffle, config.log.rollouts = str(file), False, 8
    config.steps = 1
    config.eval.data, config.eval.match = str(file), "[0-9]"
    table = train.run(config, str(tmp_path / "run"), command=[]).table
    row = lines(tmp_path / "run", "metrics.jsonl")[1]
    assert row["rollout/graded"] == 6.0
    assert row["rollout/accuracy"] == row["rollout/grading_timeouts"] == 0.0
    assert "score/reward_wrong" in row
    samples = lines(tmp_path / "run", "rollouts.jsonl")
    assert [sample["correct"] for sample in samples] == [None, None, *[False] * 6]
    assert [sample["sample"] for sample in samples] == [0, 1] * 4
    names = [sample["id"] for sample in samples]
    assert names[:2] == ["open", "open"]
    assert names[2::2] == names[3::2]
    assert len(set(names)) == 4
    assert table["student after"]["accuracy"] == 0.0  # of the three that have an answer


@pytest.mark.slow
def test_gradients_of_the_terms_are_logged_now_and_then(folders, tmp_path):
    config = small(folders)
    config.steps, config.eval.data, config.log.gradients = 2, "", 2
    train.run(config, str(tmp_path / "run"), command=[])
    _, first, second = lines(tmp_path / "run", "metrics.jsonl")
    names = {"opd", "reference_kl", "sft"}
    norms = {f"optim/grad_norm_{name}" for name in names}
    assert not norms & first.keys()
    assert norms <= second.keys()
    assert second["optim/grad_norm"] <= sum(second[key] for key in norms) + 1e-6
    cosines = [value for key, value in second.items() if key.startswith("optim/grad_cosine_")]
    assert len(cosines) == 3
    assert all(-1 <= value <= 1 for value in cosines)
    config.log.gradients = 0
    train.run(config, str(tmp_path / "plain"), command=[])
    plain = lines(tmp_path / "plain", "metrics.jsonl")[2]
    assert plain["loss/total"] == second["loss/total"]  # looking changes nothing
    assert plain["optim/grad_norm"] == second["optim/grad_norm"]


@pytest.mark.slow
def test_several_updates_a_rollout(folders, tmp_path):
    config = small(folders)
    config.optim.updates_per_rollout = 2
    config.optim.schedule = "linear"
    config.steps = 2
    result = train.run(config, str(tmp_path / "run"), command=[])
    assert int(result.state.step) == 4
    # 4 updates down to 0: rates 1, 3/4, 1/2, 1/4 of 0.01, of which the second and the last are logged
    rates = [row["optim/learning_rate"] for row in lines(tmp_path / "run", "metrics.jsonl")[1:]]
    assert rates == pytest.approx([0.0075, 0.0025])


@pytest.mark.slow
def test_a_teacher_with_fewer_rows_than_the_student_has_ids(folders, tmp_path):
    """The student's tokenizer has one token more, which the teacher cannot write or read."""
    student = tmp_path / "student"
    model, params = models.load(str(folders / "student"))
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
    wider = dataclasses.replace(model, vocab_size=model.vocab_size + 1)
    row = params["embed"]["embedding"][:1]
    params["embed"]["embedding"] = jnp.concatenate([params["embed"]["embedding"], row])
    models.save(str(student), wider, params, tokenizer)
    config = small(folders)
    config.student.path = str(student)
    config.steps = 1
    result = train.run(config, str(tmp_path / "run"), command=[])
    assert set(result.table) == {"student before", "student after", "teacher"}
    assert np.isfinite(lines(tmp_path / "run", "metrics.jsonl")[1]["score/reverse_kl"])


@pytest.mark.slow
def test_what_an_earlier_part_did_not_measure_is_measured_at_the_end(folders, tmp_path):
    config = small(folders, "sft")
    config.steps, config.eval.data = 2, ""
    train.run(config, str(tmp_path / "run"), command=[])
    config.eval.data, config.eval.match = "tiny:test", "[0-9]"
    table = train.run(config, str(tmp_path / "run"), command=[]).table
    assert table.keys() == {"student after"}
    assert "matched" in table["student after"]


@pytest.mark.slow
def test_the_default_self_distillation_starts():
    setup = make_setup(opsd.get_config())
    assert setup.separate_prompts
    assert setup.teacher_width > setup.width
