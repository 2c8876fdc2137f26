"""Whole runs with token weights and gates: what is logged, resumed and refused."""

import jax
import numpy as np
import pytest

from opd_jax import losses, train
from opd_jax.errors import DataError
from opd_jax.grading.grader import Grade, Grader
from opd_jax.training.make_setup import make_setup
from tests.support.small_run import lines, questions, small, without_times

FORWARD = {"divergence_weight": 1.0, "direction": "forward", "support": "teacher", "top_k": 4}
GATES = {
    "EOPD": {"form": "teacher_renormalised", "gate": "entropy", "gate_threshold": 0.8},
    "AOPD": {"gate": "advantage"},
    "TrOPD": {"gate": "acceptance"},
    "TrOPD, full": {"gate": "acceptance", "support": "full", "top_k": 16},
}
RULES = [rule for rule in losses.TOKEN_WEIGHTS if rule != "none"]


def config_of(folders, **loss):
    config = small(folders, "opd")
    config.steps, config.eval.data = 2, ""
    config.loss.update(loss)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", GATES)
def test_a_gated_run_logs_its_gate_and_resumes_exactly(folders, tmp_path, name):
    """In two updates a rollout; the draws of a resumed run are those of one that was never interrupted."""
    config = config_of(folders, **FORWARD | GATES[name])
    config.optim.updates_per_rollout = 2
    train.run(config, str(tmp_path / "run"), command=[])
    config.steps = 4
    resumed = train.run(config, str(tmp_path / "run"), command=[])
    straight = train.run(config, str(tmp_path / "straight"), command=[])
    jax.tree.map(np.testing.assert_array_equal, resumed.state, straight.state)
    one, other = (lines(tmp_path / name, "metrics.jsonl") for name in ("run", "straight"))
    assert without_times(one) == without_times(other)
    for row in one[1:]:
        assert 0.0 < row["loss/gate_open"] <= 1.0
        assert np.isfinite(row["loss/divergence"])


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "value"), [("margin", 5.0), ("route", 1.0)])
def test_a_run_by_outcomes(folders, tmp_path, monkeypatch, rule, value):
    """Every other rollout is correct: a margin is reached exactly; correct rollouts have one advantage."""
    config = config_of(folders, outcome=rule, outcome_value=value)
    config.log.rollouts = 8
    every_other = [Grade.CORRECT, Grade.WRONG] * 4
    monkeypatch.setattr(Grader, "grade", lambda self, pairs, **how: every_other)
    train.run(config, str(tmp_path / "run"), command=[])
    found = lines(tmp_path / "run", "rollouts.jsonl")
    assert len(found) == 16
    for right, wrong in zip(found[::2], found[1::2], strict=True):
        if rule == "margin":
            gap = np.mean(right["advantage"]) - np.mean(wrong["advantage"])
            np.testing.assert_allclose(gap, 5.0, atol=1e-3)
        else:  # one rollout of each outcome: both have the weight 2
            np.testing.assert_array_equal(right["advantage"], 2.0)
            ratio = np.subtract(wrong["teacher_logprob"], wrong["student_logprob"])
            np.testing.assert_allclose(wrong["advantage"], 2.0 * ratio, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("on", losses.WEIGHTED)
@pytest.mark.parametrize("rule", RULES)
def test_a_run_with_a_token_weight(folders, tmp_path, rule, on):
    config = config_of(folders, token_weight=rule, token_weight_on=on)
    config.loss.repeated = "mask"
    train.run(config, str(tmp_path / "run"), command=[])
    rows = lines(tmp_path / "run", "metrics.jsonl")[1:]
    assert all(np.isfinite(row["loss/opd"]) and row["optim/grad_norm"] > 0 for row in rows)
    assert all(("loss/unweighted_tokens" in row) == (on == "all") for row in rows)
    if rule == "tip" and on == "all":
        assert all(0.4 < row["loss/unweighted_tokens"] <= 0.5 for row in rows)


@pytest.mark.parametrize(
    "numbers",
    [
        {"rollout_gate": "correct"}, {"rollout_gate": "agreement"},
        {"outcome": "margin", "outcome_value": 0.4}, {"outcome": "route", "outcome_value": 1.0},
        {"group_coef": 1.0, "evidence_share": 0.5},
    ],
)  # fmt: skip
def test_what_reads_rewards_needs_answers(folders, tmp_path, numbers):
    config = config_of(folders, **numbers)
    config.data.train = questions(tmp_path)
    with pytest.raises(DataError) as error:
        make_setup(config)
    assert "no answer" in str(error.value)
    assert "\n" not in str(error.value)
    config.data.train = questions(tmp_path, answer="7")
    assert make_setup(config).terms.needs_reward
