"""The low-KL cut by hand, its threshold from the past, and a run that resumes with it."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import opd
from opd_jax import train
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError
from opd_jax.losses.low_kl import least_window_mean, low_kl_cut, window_means
from opd_jax.training import low_kl
from opd_jax.types import Outcome, Rollout, Scores
from tests.support.small_run import lines, small, without_times

KL = np.array([[1, 1, 0.1, 0.1, 0.1, 0.1]], np.float32)
ALL = np.ones((1, 6), bool)


def test_the_cut_by_hand():
    np.testing.assert_allclose(window_means(KL[0], 2), [1, 0.55, 0.1, 0.1, 0.1], rtol=1e-6)
    kept_B = low_kl_cut(KL, ALL, 2, 2, 0.2)
    assert kept_B.dtype == np.int32
    assert kept_B.tolist() == [2]
    assert low_kl_cut(KL, ALL, 2, 3, 0.2).tolist() == [2]
    assert low_kl_cut(KL, ALL, 2, 4, 0.2).tolist() == [6]  # only three windows are low
    assert low_kl_cut(KL, ALL, 2, 2, 0.6).tolist() == [1]
    assert low_kl_cut(KL, ALL, 2, 2, 2.0).tolist() == [0]
    assert low_kl_cut(KL, ALL, 7, 1, 2.0).tolist() == [6]  # shorter than a window


def test_tokens_outside_the_mask_are_not_there():
    kl_BT = np.array([[9, 1, 1, 9, 0.1, 0.1, 0.1, 0.1, 0.0], np.zeros(9)], np.float32)
    mask_BT = np.array([[0, 1, 1, 0, 1, 1, 1, 1, 0], np.zeros(9)], bool)
    assert low_kl_cut(kl_BT, mask_BT, 2, 2, 0.2).tolist() == [2, 0]
    least_B = least_window_mean(kl_BT, mask_BT, 2)
    assert least_B[0] == pytest.approx(0.1)
    assert np.isnan(least_B[1])


def rules(**changes) -> low_kl.Rules:
    return dataclasses.replace(
        low_kl.Rules(window=2, run=2, share=0.3, history=4, rollouts=2, steps=3), **changes
    )


def test_the_threshold_waits_for_steps_and_rollouts_and_is_a_quantile():
    least = (0.0, 0.1, 0.2, 0.3)
    assert low_kl.threshold(low_kl.State(least, 2), rules()) is None
    assert low_kl.threshold(low_kl.State(least[:1], 3), rules()) is None
    # of four values the .7 quantile is .1 of the way from the third to the fourth
    assert low_kl.threshold(low_kl.State(least, 3), rules()) == pytest.approx(0.21)


def experience() -> tuple[Rollout, Scores, np.ndarray]:
    """Three rows: one that ended, one out of budget, one without a window."""
    kl_BT = np.concatenate([KL, KL / 2, KL / 4])
    mask_BT = np.array([[1] * 6, [1] * 6, [1] + [0] * 5], bool)
    outcome_B = np.array([Outcome.EOS, Outcome.BUDGET, Outcome.EOS])
    zeros = np.zeros((3, 6), np.float32)
    rollout = Rollout(zeros, np.full(3, 6), np.zeros(3), zeros, outcome_B)
    return rollout, Scores(zeros, zeros, reverse_kl_BT=kl_BT), mask_BT


def test_the_past_holds_rollouts_that_ended_by_themselves_the_latest_ones():
    state = low_kl.observe(low_kl.State((5.0, 6.0, 7.0, 8.0), 2), *experience(), rules())
    assert state.least[:3] == (6.0, 7.0, 8.0)
    assert state.least[3] == pytest.approx(0.1)
    assert (len(state.least), state.steps) == (4, 3)
    assert low_kl.from_json(low_kl.to_json(state)) == state
    assert low_kl.from_json(None) == low_kl.State()


def test_what_follows_a_cut_is_left_out_and_a_masked_row_changes_nothing():
    _, scores, mask_BT = experience()
    assert low_kl.kept(low_kl.State(), scores, mask_BT, rules()) == (None, {})
    kept_BT, news = low_kl.kept(low_kl.State((0.2, 0.2), 3), scores, mask_BT, rules())
    assert kept_BT.astype(int).tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
    ]
    assert news == {"loss/low_kl_threshold": 0.2, "loss/low_kl_cut": pytest.approx(8 / 13)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_kl_run": 3}, r"loss.low_kl_run=3 has no effect: loss.low_kl_window=0"),
        (
            {"low_kl_window": 8, "low_kl_history": 9},
            r"low_kl_rollouts=512 is more than .*history=9",
        ),
        (
            {"low_kl_window": 8, "teacher_coef": 0.0, "group_coef": 1.0},
            r"loss.low_kl_window=8 has no effect: no term of this loss asks a teacher",
        ),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    config = opd.get_config()
    config.loss.update(changes)
    with pytest.raises(ConfigError, match=message):
        validate(config)


@pytest.mark.slow
def test_a_run_cuts_as_its_past_says_also_after_a_resume(folders, tmp_path):
    config = small(folders, "opd")
    config.eval.data = ""
    config.loss.update(low_kl_window=3, low_kl_run=2, low_kl_rollouts=1, low_kl_steps=1)
    config.steps = 4
    whole = train.run(config, str(tmp_path / "whole"), command=[])
    rows = lines(tmp_path / "whole", "metrics.jsonl")
    assert "loss/low_kl_cut" not in rows[1]
    assert any(row.get("loss/low_kl_cut", 0) > 0 for row in rows)
    config.steps = 2
    train.run(config, str(tmp_path / "parts"), command=[])
    config.steps = 4
    parts = train.run(config, str(tmp_path / "parts"), command=[])
    jax.tree.map(np.testing.assert_array_equal, parts.state, whole.state)
    assert without_times(rows) == without_times(lines(tmp_path / "parts", "metrics.jsonl"))
