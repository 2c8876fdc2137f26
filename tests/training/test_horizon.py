"""The horizon: its lengths by hand, runs with stairs, and what a kill and a rollback leave of it."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from configs import opd
from opd_jax import checkpoint, train
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError
from opd_jax.training import collapse_detector, horizon
from opd_jax.training.horizon import Rules, State
from tests.support import guard_traces
from tests.support.small_run import lines, small, without_times

LADDER = (128, 256)


@pytest.mark.parametrize(
    ("length", "entropy", "want"),
    [(128, 0.4, 128), (128, 0.6, 256), (128, 0.5, 256), (256, 0.6, 256), (128, math.nan, 128)],
)
def test_next_length_by_hand(length, entropy, want):
    assert horizon.next_length(length, entropy, LADDER, 0.5) == want


def test_a_length_outside_the_ladder_rises_to_the_next_one_in_it():
    assert horizon.next_length(200, 1.0, LADDER, 0.0) == 256
    assert horizon.next_length(300, 1.0, LADDER, 0.0) == 300


def lengths(rules: Rules, entropies: list[float]) -> list[int]:
    """Return the budget of each step of a run with these entropies."""
    state, found = horizon.start(rules), []
    for step, entropy in enumerate(entropies, start=1):
        found.append(state.length)
        state = horizon.observe(state, step, {"score/student_entropy": entropy}, rules)
    return found


@pytest.mark.parametrize("entropy", [0.0, 3.0, math.nan])
def test_without_a_least_entropy_the_length_is_a_function_of_the_step_alone(entropy):
    rules = Rules((16, 32, 64), every=3, least_entropy=0.0)
    want = [rules.ladder[min((step - 1) // 3, 2)] for step in range(1, 13)]
    assert lengths(rules, [entropy] * 12) == want == [16] * 3 + [32] * 3 + [64] * 6


def test_the_mean_entropy_since_the_last_check_decides():
    rules = Rules((16, 32, 64), every=2, least_entropy=0.5)
    entropies = [0.2, 0.6, 0.3, 0.8, math.nan, 0.6, 9.0, 9.0]
    # means .4 (stays), .55 (rises), .6 of the one that is known (rises), and 64 is the last
    assert lengths(rules, entropies) == [16] * 4 + [32] * 2 + [64] * 2
    assert lengths(rules, [math.nan] * 4) == [16] * 4


def test_a_state_survives_json_and_its_ladder_may_change():
    rules = Rules((16, 32, 64), every=2, least_entropy=0.5)
    state = State(32, 0.1 + 0.2, 2)
    assert horizon.from_json(horizon.to_json(state), rules) == state
    assert horizon.from_json(None, rules) == State(16)
    assert horizon.from_json(horizon.to_json(State(64)), Rules((16, 48), 2, 0.0)).length == 48
    fixed = Rules((192,), 2, 0.0)
    assert horizon.from_json(horizon.to_json(state), fixed) == horizon.start(fixed) == State(192)
    assert horizon.keys(State(192), fixed) == {}
    assert horizon.keys(state, rules) == {"rollout/horizon": 32.0}


@pytest.mark.parametrize("ladder", [(192,), (16, 32, 64)], ids=["fixed", "stairs"])
def test_a_run_that_goes_on_from_any_step_has_the_state_of_one_without_a_break(ladder):
    """A fixed budget too: its checkpoint once summed up entropies that a resume began anew."""
    rules = Rules(ladder, every=3, least_entropy=0.5)
    state = resumed = horizon.start(rules)
    for step in range(1, 12):
        row = {horizon.ENTROPY: 0.1 * step}
        state = horizon.observe(state, step, row, rules)
        resumed = horizon.observe(resumed, step, row, rules)
        resumed = horizon.from_json(horizon.to_json(resumed), rules)
        assert resumed == state, step


def test_the_start_of_a_run_names_the_stairs_and_whether_the_last_is_reached():
    rules = Rules((16, 32, 64), every=3, least_entropy=0.0)
    (line,) = horizon.describe(rules, 100)
    assert line == (
        "horizon: responses of at most 16, 32, then 64 tokens, for 3 steps each; the plan is that of 64"
    )
    _, note = horizon.describe(rules, 6)
    assert note == "note: 6 steps end before the horizon reaches 64 tokens, which takes 6 steps"
    assert len(horizon.describe(rules, 7)) == 1
    assert horizon.describe(Rules((64,), 3, 0.0), 100) == []
    gated = dataclasses.replace(rules, least_entropy=0.5)
    assert "raised where the mean entropy of 3 steps is at least 0.5 nats" in "".join(
        horizon.describe(gated, 100)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.horizon": (64, 400)}, r"goes beyond rollout.max_response_tokens=160"),
        (
            {"rollout.horizon": (64, 32)},
            r"rollout.horizon=\(64, 32\), wanted whole numbers above 0",
        ),
        (
            {"rollout.horizon_steps": 3},
            r"rollout.horizon_steps=3 has no effect: rollout.horizon is",
        ),
        ({"rollout.horizon_entropy": 0.1}, r"horizon_entropy=0.1 has no effect"),
        (
            {"rollout.horizon": (64,), "loss.truncated": "mask"},
            "every rollout that the horizon cuts",
        ),
        (
            {"rollout.horizon": (64,), "loss.pg_weight": 0.0, "loss.lambda_gold": 1.0},
            "bounds rollouts, and this loss makes none",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(changes, message):
    config = opd.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message) as error:
        validate(config)
    assert "\n" not in str(error.value)
    assert "--config." in str(error.value)


# ---------------------------------------------------------------------------- the collapse guard


def stairs(*shares: tuple[float, float, float], steps: int = 30) -> list[dict[str, float]]:
    """Return rows of so many steps each of (horizon, share truncated, share repetitive)."""
    return [
        guard_traces.row(truncated, repetitive) | {"rollout/horizon": length}
        for length, truncated, repetitive in shares
        for _ in range(steps)
    ]


def rules_of(budget: int):
    return dataclasses.replace(guard_traces.rules(), budget=budget)


def test_rollouts_that_a_horizon_cuts_are_no_collapse():
    """Few are cut, then a shorter horizon by config, then all: without the budget it is an alarm."""
    cut = stairs((32, 0.1, 0.0), (64, 0.9, 0.0), (192, 0.1, 0.0))
    _, alarms = guard_traces.observed(cut, rules_of(192))
    assert alarms == []
    fixed = [{k: v for k, v in row.items() if k != "rollout/horizon"} for row in cut]
    _, alarms = guard_traces.observed(fixed, guard_traces.rules())
    assert alarms


def test_within_a_stair_growing_responses_are_no_signal_and_loops_are():
    grown = stairs((64, 0.3, 0.0)) + stairs((64, 0.95, 0.0))
    _, alarms = guard_traces.observed(grown, rules_of(192))
    assert alarms == []
    _, alarms = guard_traces.observed(grown, rules_of(64))  # the last stair: judged as ever
    assert alarms
    looping = stairs((64, 0.3, 0.0)) + stairs((64, 0.95, 0.5))
    _, alarms = guard_traces.observed(looping, rules_of(192))
    assert alarms
    assert alarms[0].onset >= 30


def test_a_collapse_at_the_full_budget_is_found_after_the_stairs():
    run = stairs((32, 1.0, 0.0), (64, 0.9, 0.0), (192, 0.05, 0.0), (192, 0.9, 0.3))
    _, alarms = guard_traces.observed(run, rules_of(192))
    assert alarms
    assert alarms[0].onset > 90


# ---------------------------------------------------------------------------- runs


def config_with(folders, **changes):
    config = small(folders, "opd")
    config.eval.data = ""
    config.checkpoint.every = 1
    config.checkpoint.keep = 40
    config.rollout.update(changes)
    return config


def run(config, folder):
    return train.run(config, str(folder), command=[])


@pytest.mark.slow
def test_one_stair_is_the_fixed_budget_bit_for_bit(folders, tmp_path):
    plain = run(config_with(folders), tmp_path / "a")
    one = run(config_with(folders, horizon=(124,), horizon_steps=1), tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, one.state, plain.state)
    rows = [without_times(lines(tmp_path / name, "metrics.jsonl")) for name in "ab"]
    assert rows[0] == rows[1]
    assert not any("rollout/horizon" in row for row in rows[1])


@pytest.mark.slow
def test_a_stair_is_the_beginning_of_the_same_rollouts_and_a_resume_goes_on_with_it(
    folders, tmp_path, capsys
):  # fmt: skip
    run(config_with(folders), tmp_path / "plain")
    changes = {"horizon": (12, 40), "horizon_steps": 2}
    config = config_with(folders, **changes)
    config.steps = 6
    whole = run(config, tmp_path / "whole")
    out = capsys.readouterr().out
    assert "horizon: responses of at most 12, 40, then 124 tokens" in out
    assert "step 2: responses of at most 40 tokens from here on" in out
    rows = lines(tmp_path / "whole", "metrics.jsonl")[1:]
    assert [row["rollout/horizon"] for row in rows] == [12, 12, 40, 40, 124, 124]
    assert all(row["rollout/length_max"] <= row["rollout/horizon"] for row in rows)
    first = [lines(tmp_path / name, "rollouts.jsonl")[0] for name in ("plain", "whole")]
    assert first[1]["response_ids"] == first[0]["response_ids"][:12]
    for steps in (1, 4):  # ends within a stair, and at the end of one
        config.steps = steps
        run(config, tmp_path / "parts")
    config.steps = 6
    parts = run(config, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, parts.state, whole.state)
    assert without_times(lines(tmp_path / "parts", "metrics.jsonl")[1:]) == without_times(rows)


@pytest.mark.slow
def test_the_entropy_that_a_gate_has_seen_is_in_the_checkpoint(folders, tmp_path, monkeypatch):
    """The gate opens at the mean of steps 1 to 3, of which a resume measures only the last."""
    entropies = {1: 1.0, 2: 1.0, 3: 0.1, 4: 0.1, 5: 0.1}
    really = horizon.observe

    def observe(state, step, row, rules):
        return really(state, step, {"score/student_entropy": entropies[step]}, rules)

    monkeypatch.setattr(horizon, "observe", observe)
    config = config_with(folders, horizon=(12,), horizon_steps=3, horizon_entropy=0.5)
    config.steps = 2
    run(config, tmp_path / "run")
    config.steps = 4
    run(config, tmp_path / "run")
    rows = lines(tmp_path / "run", "metrics.jsonl")[1:]
    assert [row["rollout/horizon"] for row in rows] == [12, 12, 12, 124]


@pytest.mark.slow
def test_a_rollback_goes_back_to_the_horizon_of_its_step(folders, tmp_path, monkeypatch):
    left = [4]

    def observe(state, step, row, rules):
        if step in left:
            left.remove(step)
            return state, collapse_detector.Alarm(step, 3, "collapse", False)
        return state, None

    monkeypatch.setattr(collapse_detector, "observe", observe)
    config = config_with(folders, horizon=(12, 40), horizon_steps=2)
    config.guard.action = "rollback"
    config.steps = 5
    run(config, tmp_path / "run")
    rows = lines(tmp_path / "run", "metrics.jsonl")[1:]
    assert [(row["step"], row["rollout/horizon"]) for row in rows] == [
        (1, 12), (2, 12), (3, 40), (4, 40), (5, 124),
    ]  # fmt: skip
    assert lines(tmp_path / "run", "metrics.rolled_back.jsonl")[-1]["rollout/horizon"] == 40
    with checkpoint.Checkpoints(tmp_path / "run", keep=40) as saved:
        assert horizon.from_json(
            saved.extras(3)["horizon"], horizon.make_rules(config)
        ).length == 40  # fmt: skip
