"""Rewards from outside in the loss: the group's advantage, the gates, metrics, and what is refused."""

import json
import pathlib

import numpy as np
import pytest

from configs import grpo, opd
from opd_jax import losses, train
from opd_jax.config.validate import validate
from opd_jax.data.problem import Problem
from opd_jax.errors import ConfigError, DataError, RewardError
from opd_jax.grading.grader import Grade
from opd_jax.training import rewards
from opd_jax.training.advantages import Reward, advantages
from opd_jax.training.make_setup import make_setup
from opd_jax.training.rewards import Rewards
from opd_jax.training.terms import default_terms
from opd_jax.training.token_factor import token_factor
from tests.support.small_run import lines, questions, small, without_times
from tests.training.test_token_factor import MASK, experience, scores, weigh
from tests.training.test_topk_objective import SAMPLED

FUNCTIONS = "tests.support.reward_functions"
GRADES = [Grade.CORRECT, Grade.WRONG, Grade.TIMEOUT, None, Grade.UNPARSED]


def problem(**fields) -> Problem:
    return Problem("p", "Add 1.", "", "", fields=fields)


def test_verdicts_are_rewards_of_one_and_zero():
    verdicts = rewards.of_verdicts(GRADES)
    assert verdicts.reward_B.dtype == np.float32
    assert verdicts.reward_B.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert verdicts.known_B.tolist() == [True, True, False, False, True]
    assert verdicts.metrics() == {}


def test_the_groups_advantage_of_rewards_by_hand():
    """(1, .5, 0): mean .5, deviation .5; the fourth rollout has no reward and gets 0."""
    external = rewards.of_answers(
        {"rewards": [1.0, 0.5, 0.0, None], "line": "", "timeouts": 1, "faults": 0}, on_error="stop"
    )
    got = losses.group_advantage(
        reward_B=external.reward_B, group=4, normalise=True, counted_B=external.known_B
    )
    np.testing.assert_allclose(got, [1.0, 0.0, -1.0, 0.0], atol=1e-5)
    assert external.metrics() == {
        "rollout/rewarded": 3.0, "rollout/reward_timeouts": 1.0, "rollout/reward_faults": 0.0,
        "rollout/reward": 0.5,
    }  # fmt: skip
    assert [external.shown(i) for i in range(4)] == [1.0, 0.5, 0.0, None]


def test_without_any_reward_there_is_no_mean():
    answers = {"rewards": [None, None], "line": "bad", "timeouts": 0, "faults": 2}
    none = rewards.of_answers(answers, on_error="leave_out")
    assert "rollout/reward" not in none.metrics()
    assert none.metrics()["rollout/reward_faults"] == 2.0
    with pytest.raises(RewardError, match=r"^bad$"):
        rewards.of_answers(answers, on_error="stop")


def opened(external: Rewards, **numbers) -> list[bool]:
    """Which rollouts the gate lets pass."""
    made = experience(scores())
    made = type(made)(**{**made.__dict__, "external": external})
    factor = token_factor(
        made, MASK, default_terms(**numbers), weigh=weigh, group=2, decode=lambda ids: "x"
    )
    assert factor is not None
    return (factor > 0).any(axis=1).tolist()


def test_the_gate_of_correct_rollouts_opens_from_a_reward_on():
    external = Rewards(np.array([0.7, 0.5, 0.9, 0.3], np.float32), np.array([1, 1, 0, 1], bool))
    assert opened(external, rollout_gate="correct") == [True, True, False, False]
    high = opened(external, rollout_gate="correct", rollout_gate_reward=0.7)
    assert high == [True, False, False, False]


@pytest.mark.parametrize("rule", [{"outcome": "margin", "outcome_value": 9.0},
                                  {"outcome": "route", "outcome_value": 1.0}])  # fmt: skip
@pytest.mark.parametrize(
    ("least", "correct"), [(0.5, [1, 1, 0, 0]), (0.6, [1, 0, 0, 0]), (0.8, [0, 0, 0, 0])]
)
def test_outcomes_take_as_correct_what_the_gate_lets_pass(rule, least, correct):
    """Rewards (.7, .5), (unknown, .3): advantages are those of the verdicts `correct`, bit for bit."""
    known_B = np.array([True, True, False, True])
    reward = Reward(np.array([0.7, 0.5, 0.9, 0.3], np.float32), 2, known_B)
    verdict = Reward(np.array(correct, np.float32), 2, known_B)
    assert reward.correct_B(least).tolist() == [bool(x) for x in correct]
    own = default_terms(**rule, rollout_gate_reward=least)
    got = advantages(SAMPLED, scores(), MASK, own, reward=reward)
    wanted = advantages(SAMPLED, scores(), MASK, default_terms(**rule), reward=verdict)
    np.testing.assert_array_equal(got, wanted)
    other = Reward(np.array([0.0, 1.0, 0.0, 1.0], np.float32), 2, known_B)
    assert not np.array_equal(got, advantages(SAMPLED, scores(), MASK, own, reward=other))


def test_a_column_is_one_reward_of_a_problem():
    found = rewards.of_column([problem(ok=1), problem(ok=0.25)], "ok", group=2)
    assert found.reward_B.tolist() == [1.0, 1.0, 0.25, 0.25]
    assert found.known_B.all()
    assert rewards.column_value(problem(extra={"ok": True}), "extra.ok") == 1.0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ok": 1.5}, "holds 1.5, wanted"), ({"ok": -1}, "holds -1,"), ({"ok": "1"}, "holds '1',"),
        ({"ok": float("nan")}, "holds nan"), ({"ok": None}, "no number"), ({}, "no number"),
        ({"ok": [1]}, "no number"),
    ],
)  # fmt: skip
def test_a_column_without_a_reward(fields, says):
    text = rewards.column_value(problem(**fields), "ok")
    assert isinstance(text, str)
    assert f"reward.column=ok {says}" in text or says in text


@pytest.mark.parametrize(
    ("reward", "loss", "says"),
    [
        ({"function": "m:f", "column": "x"}, {}, "wanted one source of the reward"),
        ({"function": "m.f"}, {}, "wanted a function as module:function"),
        ({"function": "os.system('x'):f"}, {}, "wanted a function as module:function"),
        ({"seconds": 5.0}, {}, "reward.seconds=5.0 has no effect: there is no reward.function"),
        ({"on_error": "leave_out"}, {}, "reward.on_error=leave_out has no effect"),
        ({"on_error": "zero"}, {}, "wanted one of stop, leave_out"),
        ({"column": "x"}, {"group_coef": 1.0}, "gives every rollout of a problem the same reward"),
        ({"column": "x"}, {"rollout_gate": "agreement"}, "gives every rollout of a problem the"),
        ({"column": "x"}, {"outcome": "margin", "outcome_value": 0.4}, "gives every rollout of a"),
        ({"column": "x"}, {}, "no term of this loss reads a reward"),
        ({"function": "m:f"}, {"pg_weight": 0.0, "lambda_gold": 1.0}, "this loss makes no rollouts"),
        ({}, {"rollout_gate": "correct", "rollout_gate_reward": 0.7},
         "loss.rollout_gate_reward=0.7 has no effect"),
        ({}, {"outcome": "route", "outcome_value": 1.0, "rollout_gate_reward": 0.7},
         "loss.rollout_gate_reward=0.7 has no effect"),
        ({"function": "m:f"}, {"rollout_gate_reward": 0.7}, "loss.rollout_gate_reward=0.7 has no"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(reward, loss, says):
    config = opd.get_config()
    config.reward.update(reward)
    config.loss.update(loss)
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_what_works_is_accepted():
    for reward, loss in (
        ({"function": "m.n:f", "seconds": 5.0, "processes": 3, "on_error": "leave_out"}, {}),
        ({"function": "m:f"}, {"rollout_gate": "correct", "rollout_gate_reward": 0.7}),
        ({"column": "x"}, {"rollout_gate": "correct", "rollout_gate_reward": 1.0}),
        ({"column": "x"}, {"outcome": "route", "outcome_value": 1.0, "rollout_gate_reward": 0.7}),
    ):
        config = grpo.get_config() if "column" not in reward else opd.get_config()
        config.reward.update(reward)
        config.loss.update(loss)
        validate(config)


def with_rewards(folders, tmp_path: pathlib.Path, function: str = "short", **more):
    """GRPO beside the teacher, on problems without answers."""
    config = small(folders, "opd")
    config.data.train, config.eval.data = questions(tmp_path, **more), ""
    config.loss.group_coef = 1.0
    config.reward.function = f"{FUNCTIONS}:{function}"
    return config


def test_answers_are_needed_only_for_verdicts(folders, tmp_path):
    config = with_rewards(folders, tmp_path)
    assert make_setup(config).terms.needs_reward
    config.reward.function = ""
    with pytest.raises(DataError, match="no answer"):
        make_setup(config)


def test_a_row_without_a_reward_in_its_column_is_refused_or_skipped(folders, tmp_path):
    config = small(folders, "opd")
    config.data.train, config.eval.data = questions(tmp_path, count=3, ok=1), ""
    with pathlib.Path(config.data.train).open("a") as out:
        out.write(json.dumps({"problem": "Add 1.", "id": "bad", "ok": 2}) + "\n")
    config.loss.rollout_gate, config.reward.column = "correct", "ok"
    with pytest.raises(DataError, match=r"problem bad: reward.column=ok holds 2, wanted"):
        make_setup(config)
    config.data.bad_rows = "skip"
    setup = make_setup(config)
    assert len(setup.train) == 3
    assert "no reward 1" in "".join(setup.notes)


@pytest.mark.slow
def test_a_run_with_a_function_and_its_column_counterpart(folders, tmp_path):
    config = with_rewards(folders, tmp_path, "by_column", good=0.5)
    config.steps, config.log.rollouts = 1, 2
    train.run(config, str(tmp_path / "run"), command=[])
    row = lines(tmp_path / "run", "metrics.jsonl")[1]
    assert row["rollout/reward"] == 0.375  # 0.5 and 0.25 to the two rollouts of each problem
    assert row["rollout/rewarded"] == 8.0
    assert row["rollout/reward_faults"] == row["rollout/reward_timeouts"] == 0.0
    assert [line["reward"] for line in lines(tmp_path / "run", "rollouts.jsonl")] == [0.5, 0.25]
    assert "rollout/accuracy" not in row
    config = small(folders, "opd")
    config.data.train, config.eval.data, config.steps = questions(tmp_path, ok=1), "", 1
    train.run(config, str(tmp_path / "plain"), command=[])
    config.loss.rollout_gate, config.reward.column = "correct", "ok"
    train.run(config, str(tmp_path / "gated"), command=[])
    plain, gated = (lines(tmp_path / name, "metrics.jsonl")[1] for name in ("plain", "gated"))
    assert gated["rollout/reward"] == 1.0
    assert gated["loss/total"] == plain["loss/total"]  # a gate that is open everywhere


@pytest.mark.slow
def test_a_function_that_fails_loses_nothing(folders, tmp_path, monkeypatch, capsys):
    """It stops with the state before the failed step; corrected, the run ends as one without the fault."""
    mark = tmp_path / "fault.json"
    monkeypatch.setenv("OPD_JAX_TEST_FAULT", str(mark))
    config = with_rewards(folders, tmp_path, "hangs_once")
    config.steps, config.checkpoint.every, config.log.rollouts = 4, 10, 8
    train.run(config, str(tmp_path / "whole"), command=[])
    whole = without_times(lines(tmp_path / "whole", "metrics.jsonl"))
    third = [x["id"] for x in lines(tmp_path / "whole", "rollouts.jsonl") if x["step"] == 3]
    seen = {x["id"] for x in lines(tmp_path / "whole", "rollouts.jsonl") if x["step"] < 3}
    mark.write_text(json.dumps(next(name for name in third if name not in seen)))
    with pytest.raises(RewardError, match=r"^step 3: .*ValueError.*step 2 is saved") as error:
        train.run(config, str(tmp_path / "run"), command=[])
    assert "\n" not in str(error.value)
    mark.unlink()
    train.run(config, str(tmp_path / "run"), command=[])
    assert without_times(lines(tmp_path / "run", "metrics.jsonl")) == whole
    mark.write_text(json.dumps(third[0]))
    config.reward.on_error = "leave_out"
    train.run(config, str(tmp_path / "left"), command=[])
    rows = lines(tmp_path / "left", "metrics.jsonl")[1:]
    assert sum(row["rollout/reward_faults"] for row in rows) >= 2.0
    assert all(row["rollout/rewarded"] + row["rollout/reward_faults"] == 8.0 for row in rows)
    assert "warning: reward.function=" in capsys.readouterr().out


@pytest.mark.slow
def test_a_function_that_is_not_there_stops_a_run_before_anything_is_written(folders, tmp_path):
    config = with_rewards(folders, tmp_path, "no_such_function")
    with pytest.raises(ConfigError, match=r"cannot be imported: AttributeError.*wanted module:f"):
        train.run(config, str(tmp_path / "run"), command=[])
    assert not (tmp_path / "run").exists()
