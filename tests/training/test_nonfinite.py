"""Numbers that are not finite: what they are found in, what a run does; spikes of the gradient."""

import itertools
import json
import math
from collections.abc import Callable

import jax
import numpy as np
import pytest

from opd_jax import checkpoint, train
from opd_jax.errors import NonFiniteError
from opd_jax.training import batch, nonfinite, update
from opd_jax.training.nonfinite import Rules, State
from opd_jax.training.step_functions import StepFunctions
from opd_jax.types import Rollout, Scores
from tests.support.small_run import lines, small

WATCH = Rules(skip_nonfinite=0, spike=10.0, spike_action="warn")


def after(norms: list[float], rules: Rules = WATCH) -> tuple[State, list[dict[str, float]]]:
    state, told = State(), []
    for norm in norms:
        state, row = nonfinite.observe(state, norm, rules)
        told.append(row)
    return state, told


@pytest.mark.short
def test_a_spike_is_told_in_running_means():
    # Twenty norms of 2 and 8 have the geometric mean 4: a spike is above 40.
    state, told = after([2.0, 8.0] * 10)
    assert state.seen == 20
    assert math.exp(state.log_norm) == pytest.approx(4.0)
    assert not any(told)
    assert nonfinite.observe(state, 39.9, WATCH)[1] == {}
    state, row = nonfinite.observe(state, 80.0, WATCH)
    assert row["guard/spike"] == pytest.approx(20.0)
    assert state.spikes == 1
    # It counts as 40: the mean's logarithm rises by log(10)/21.
    assert state.log_norm == pytest.approx(math.log(4) + math.log(10) / 21)


@pytest.mark.short
def test_norms_that_stay_up_become_the_mean():
    state, _ = after([1.0] * 50)
    for _ in range(50 * 4):  # each lifts the logarithm of the mean by log(10)/50 at most
        state, row = nonfinite.observe(state, 90.0, WATCH)
    assert row == {}
    assert (
        state.spikes == 48
    )  # until the mean is 9, from where 90 is none: 50 log(9)/log(10) = 47.7


@pytest.mark.short
def test_nothing_is_a_spike_before_there_is_a_mean_or_where_none_is_asked_for():
    assert not any(after([1.0] * 19 + [1e9])[1])
    off = Rules(0, 0.0, "warn")
    assert after([1.0] * 30 + [1e9], off) == (State(), [{}] * 31)
    assert nonfinite.limit(after([1.0] * 30)[0], WATCH) == math.inf
    skipping = Rules(0, 10.0, "skip")
    assert nonfinite.limit(after([1.0] * 30, skipping)[0], skipping) == pytest.approx(10.0)


@pytest.mark.short
def test_the_state_survives_json():
    state, _ = after([3.0] * 21)
    assert nonfinite.from_json(json.loads(json.dumps(nonfinite.to_json(state)))) == state
    assert nonfinite.from_json(None) == State()


@pytest.mark.short
def test_rollouts_with_log_probs_that_are_not_finite_are_named():
    good_BT = np.zeros((3, 4), np.float32)
    teacher_BT, sampler_BT = good_BT.copy(), good_BT.copy()
    teacher_BT[1, 2], teacher_BT[2, 3], sampler_BT[1, 1] = np.nan, -np.inf, np.inf
    mask_BT = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]], bool)  # the -inf does not count
    length_B = np.full(3, 4)
    rollout = Rollout(good_BT.astype(int), length_B, length_B - 3, sampler_BT, length_B)
    (bad,) = nonfinite.bad_scores(rollout, Scores(good_BT, good_BT, teacher_BT), mask_BT)
    assert bad == nonfinite.Bad(
        "rollouts", 1, ("log-prob of the sampler", "log-prob of the teacher")
    )


def spoilt(monkeypatch, at: int) -> None:
    """The teacher's log-probs of the third rollout of one step are NaN."""
    original, calls = StepFunctions.score, []

    def score(self, *args):
        calls.append(1)
        scores = original(self, *args)
        if len(calls) != at:
            return scores
        logprob_BT = np.array(scores.teacher_logprob_BT)
        logprob_BT[2] = np.nan
        return scores.replace(teacher_logprob_BT=logprob_BT)

    monkeypatch.setattr(StepFunctions, "score", score)


@pytest.mark.slow
def test_a_log_prob_that_is_not_finite_stops_the_run_and_its_text_is_kept(
    folders,
    tmp_path,
    monkeypatch,
):
    spoilt(monkeypatch, at=2)
    config = small(folders, "opd")
    config.eval.data, config.checkpoint.every = "", 1
    with pytest.raises(NonFiniteError) as raised:
        train.run(config, str(tmp_path / "run"), command=[])
    file = tmp_path / "run" / "nonfinite" / "2.json"
    says = f"step 2: log-prob of the teacher not finite in rollouts 2 (texts in {file}); the parameters"
    assert str(raised.value).startswith(says)
    (row,) = json.loads(file.read_text())
    assert (row["kind"], row["row"]) == ("rollouts", 2)
    assert row["text"]
    # One may be left out: the step changes nothing, the next ones go on, and a resume remembers.
    spoilt(monkeypatch, at=2)
    config.guard.skip_nonfinite = 1
    train.run(config, str(tmp_path / "skips"), command=[])
    metrics = {row["step"]: row for row in lines(tmp_path / "skips", "metrics.jsonl")}
    assert metrics[2]["guard/skipped"] == 1.0
    assert "loss/total" not in metrics[2]
    assert "optim/grad_norm" in metrics[3]
    with checkpoint.Checkpoints(tmp_path / "skips", keep=2) as saved:
        assert nonfinite.from_json(saved.extras(4)["numerics"]).skipped == 1


def at_call(number: int, change: Callable, original: Callable) -> Callable:
    """`original`, whose result goes through `change` at that call."""
    calls = itertools.count(1)

    def changed(*args, **kwargs):
        made = original(*args, **kwargs)
        return change(made) if next(calls) == number else made

    return changed


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["unusable rollouts", "a loss that is not finite", "a spike"])
def test_the_rate_that_is_logged_is_the_rate_that_was_applied(
    folders, tmp_path, monkeypatch, cause
):
    """Whatever the second step is left out for, the schedule waits, also over a resume at step 2."""
    if cause == "unusable rollouts":
        spoilt(monkeypatch, at=2)
    elif cause == "a spike":
        monkeypatch.setattr(nonfinite, "limit", at_call(2, lambda most: 0.0, nonfinite.limit))
    else:

        def overflowing(made):
            return made.replace(weight_BT=np.full_like(made.weight_BT, np.inf))

        monkeypatch.setattr(batch, "rollout_rows", at_call(2, overflowing, batch.rollout_rows))
    config = small(folders, "opd")
    config.eval.data, config.optim.warmup_steps, config.optim.learning_rate = "", 4, 0.4
    config.guard.update({"skip_nonfinite": 1, "spike": 10.0, "spike_action": "skip"})
    config.steps = 2
    train.run(config, str(tmp_path / "run"), command=[])
    config.steps = 4
    result = train.run(config, str(tmp_path / "run"), command=[])
    logged = lines(tmp_path / "run", "metrics.jsonl")[1:]
    # The warm-up goes from 0.1 to 0.4 in steps of 0.075. The second step applied no update: no rate.
    rates = [row.get("optim/learning_rate", 0.0) for row in logged]
    assert rates == pytest.approx([0.1, 0.0, 0.175, 0.25])
    assert [row["optim/updates"] for row in logged] == [1, 1, 2, 3]
    assert int(result.state.step) == update.applied(result.state) == 3


@pytest.mark.slow
def test_the_row_of_a_gradient_that_is_not_finite_is_found(folders, tmp_path, monkeypatch):
    original = batch.golden_rows

    def golden_rows(*args, **kwargs):
        made = original(*args, **kwargs)
        weight_BT = made.weight_BT.copy()
        weight_BT[3, made.length_B[3] - 1] = np.inf
        return made.replace(weight_BT=weight_BT)

    plain = small(folders, "sft")
    plain.eval.data, plain.steps = "", 1
    before = train.run(plain, str(tmp_path / "plain"), command=[]).state.params
    with monkeypatch.context() as patch:
        patch.setattr(batch, "golden_rows", golden_rows)
        with pytest.raises(NonFiniteError, match=r"step 1: .*loss/sft.* in golden 3 \(texts in"):
            train.run(plain, str(tmp_path / "run"), command=[])
        plain.guard.skip_nonfinite = 1
        state = train.run(plain, str(tmp_path / "skips"), command=[]).state
    assert int(state.step) == 0
    changed = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, state.params))
    assert any(changed)  # the step that was left out is not the one that was taken


@pytest.mark.slow
def test_a_spike_is_left_out_where_that_is_asked_for(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "WARMUP", 1)
    config = small(folders, "sft")
    config.eval.data, config.checkpoint.every = "", 1
    config.steps, config.checkpoint.keep = 2, 2
    config.guard.spike, config.guard.spike_action = 1.0001, "skip"
    original = nonfinite.limit
    monkeypatch.setattr(nonfinite, "limit", lambda state, rules: original(state, rules) / 1e6)
    result = train.run(config, str(tmp_path / "run"), command=[])
    from opd_jax.models import decoder, load_config

    like = decoder.abstract_params(load_config(config.student.path))
    _, params = checkpoint.restore_params(tmp_path / "run", like, step=1)
    jax.tree.map(np.testing.assert_array_equal, result.state.params, params)
