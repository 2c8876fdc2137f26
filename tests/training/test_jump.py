"""Jumps: candidates and search by hand, and runs that jump, resume, are killed and go back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import opd
from opd_jax import checkpoint, train
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError
from opd_jax.memory_plan import memory
from opd_jax.sharding.mesh import ONE
from opd_jax.training import collapse_detector, jump
from opd_jax.training.make_setup import make_setup
from tests.support.plan_small import workload
from tests.support.small_run import lines, small, without_times


def test_candidates_by_hand():
    previous, params = {"a": np.zeros(2, np.float32)}, {"a": np.ones(2, np.float32)}
    found = [jump.extrapolate(params, previous, k)["a"] for k in range(1, 6)]
    assert [x.tolist() for x in found] == [[w, w] for w in (3, 5, 7, 9, 11)]
    assert {x.dtype for x in found} == {np.dtype(np.float32)}
    assert jump.extrapolate(params, previous, 0) is params  # to the bit, also of -0.0


def test_jumps_are_at_the_powers_of_two():
    assert [step for step in range(40) if jump.is_jump(step)] == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("scores", "accepted", "tried"),
    [
        ([0.5, 0.6, 0.7, 0.7, 0.8, 0.8], 5, 5),  # as good is good enough
        ([0.5, 0.4, 0.9, 0.9, 0.9, 0.9], 0, 1),  # the first is worse: no jump
        ([0.5, 0.6, 0.8, 0.7, 0.9, 0.9], 2, 3),  # better than no jump, worse than the one before
    ],
)
def test_search_by_hand(scores, accepted, tried):
    asked = []

    def score(k: int) -> float:
        asked.append(k)
        return scores[k]

    assert jump.search(score, 5) == (accepted, scores[: tried + 1])
    assert asked == list(range(tried + 1))


def test_overwriting_deletes_the_old_and_shares_nothing_with_the_new():
    tree = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
    old = jax.tree.leaves(tree)
    host = [np.arange(3, dtype=np.float32), np.ones(2, np.float32)]
    new = jump.overwrite(tree, iter(host), ONE)
    assert all(leaf.is_deleted() for leaf in old)
    copy = jump.to_host(new)
    host[0][:] = 9
    np.testing.assert_array_equal(new["a"], [0, 1, 2])
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(new)
    np.testing.assert_array_equal(copy["a"], [0, 1, 2])


def test_the_plan_counts_two_copies_in_host_memory():
    assert "jump" not in memory.host_bytes(workload())
    assert memory.host_bytes(workload(jumps=True))["jump"] == 2 * 4 * 316
    stages = [memory.stages(workload(jumps=value)) for value in (False, True)]
    assert stages[0] == stages[1]  # on the device a candidate takes the place of the weights


def test_a_line_says_what_a_jump_did():
    found = {"jump/accepted": 3.0, "jump/tried": 4.0, "jump/score_before": 0.4, "jump/score": 0.52}
    assert jump.describe(found, 8) == (
        "step 8: jump by 6 times the way since the last one (4 tried): 40.0% -> 52.0% of the problems "
        "held for it"
    )
    none = found | {"jump/accepted": 0.0, "jump/score": 0.4}
    assert jump.describe(none, 8).startswith("step 8: no jump: 40.0%")


def test_candidates_without_problems_are_refused():
    config = opd.get_config()
    config.jump.candidates = 3
    with pytest.raises(ConfigError, match=r"jump.candidates=3 has no effect: jump.problems=0"):
        validate(config)
    config.jump.problems = 10
    validate(config)
    config.loss.pg_weight, config.loss.lambda_gold = 0.0, 1.0
    with pytest.raises(ConfigError, match=r"jump.problems=10 with a loss that makes no rollouts"):
        validate(config)


# ---------------------------------------------------------------------------- runs


def config_with(folders, **changes):
    config = small(folders, "opd")
    config.eval.data = ""
    config.checkpoint.every = 1
    config.checkpoint.keep = 40
    config.jump.problems = 11  # two batches of 8 answers, the second one padded
    config.jump.candidates = 2
    config.jump.update(changes)
    return config


def run(config, folder):
    return train.run(config, str(folder), command=[])


def assert_same(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.state, other.state)


def test_problems_for_jumps_are_drawn_from_the_seed_and_not_trained_on(folders):
    config = config_with(folders)
    setup = make_setup(config)
    held = {problem.id for problem in setup.jump_problems}
    assert len(held) == len(setup.jump_prompts) == 11
    assert len(setup.train) == 256 - 11
    assert not held & {problem.id for problem in setup.train}
    assert any("left out: held for jumps 11" in note for note in setup.notes)
    assert held == {problem.id for problem in make_setup(config).jump_problems}
    config.seed = 1
    assert held != {problem.id for problem in make_setup(config).jump_problems}
    config.jump.problems = 256
    with pytest.raises(ConfigError, match="leaves none of the 256 problems"):
        make_setup(config)


@pytest.mark.slow
def test_a_jump_goes_on_in_the_direction_and_nothing_else_changes(folders, tmp_path, monkeypatch):
    """Random models answer nothing, so that every candidate is as good and the last one is accepted."""
    config = config_with(folders)
    config.steps = 1
    jumped = run(config, tmp_path / "jumped")
    row = lines(tmp_path / "jumped", "metrics.jsonl")[-1]
    assert (row["jump/accepted"], row["jump/tried"], row["jump/score"]) == (2, 2, 0)
    start = run_without(config, tmp_path / "start", monkeypatch, steps=0)
    plain = run_without(config, tmp_path / "plain", monkeypatch, steps=1)
    want = jax.tree.map(
        lambda w, w0: np.asarray(w) + np.float32(4) * (np.asarray(w) - np.asarray(w0)),
        plain.state.params, start,
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, jumped.state.params, want)
    jax.tree.map(np.testing.assert_array_equal, jumped.state.opt_state, plain.state.opt_state)
    assert jumped.state.step == plain.state.step == 1


def run_without(config, folder, monkeypatch, *, steps: int):
    """A run on the same problems that never jumps; with 0 steps the weights that it starts from."""
    if steps == 0:
        found = []
        monkeypatch.setattr(
            jump.Jumps, "start", lambda self, params: found.append(jump.to_host(params))
        )
        monkeypatch.setattr(jump, "is_jump", lambda step: False)
        run(config, folder)
        monkeypatch.undo()
        return found[0]
    monkeypatch.setattr(jump, "is_jump", lambda step: False)
    result = run(config, folder)
    monkeypatch.undo()
    return result


@pytest.mark.slow
def test_a_candidate_that_is_not_accepted_leaves_no_trace(folders, tmp_path, monkeypatch):
    config = config_with(folders)
    config.steps = 3
    plain = run_without(config, tmp_path / "plain", monkeypatch, steps=3)
    scores = iter([0.5, 0.4] * 2)  # steps 1 and 2
    monkeypatch.setattr(jump.Jumps, "_accuracy", lambda self, step, params: next(scores))
    tried = run(config, tmp_path / "tried")
    assert_same(tried, plain)
    rows = [without_times(lines(tmp_path / name, "metrics.jsonl")) for name in ("tried", "plain")]
    assert [row.get("jump/accepted") for row in rows[0]] == [None, 0, 0, None]
    for row in rows[0]:
        for key in [key for key in row if key.startswith("jump/")]:
            del row[key]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_runs_that_end_between_and_within_jumps_are_resumed_to_the_same_bits(
    folders, tmp_path, monkeypatch
):  # fmt: skip
    config = config_with(folders)
    config.steps = 5
    whole = run(config, tmp_path / "whole")
    config.steps = 3  # the snapshot of step 2 is needed at step 4
    run(config, tmp_path / "parts")
    config.steps = 5
    really = jump.Jumps._accuracy
    asked = []

    def killed(self, step, params):
        asked.append(step)
        if len(asked) == 2:  # the first candidate is in the place of the weights
            raise RuntimeError("killed")
        return really(self, step, params)

    monkeypatch.setattr(jump.Jumps, "_accuracy", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(config, tmp_path / "parts")
    assert asked == [4, 4]
    monkeypatch.undo()
    assert_same(run(config, tmp_path / "parts"), whole)
    rows = [without_times(lines(tmp_path / name, "metrics.jsonl")) for name in ("parts", "whole")]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[1] if "jump/accepted" in row] == [1, 2, 4]


@pytest.mark.slow
def test_a_rollback_restores_the_snapshot_and_an_alarm_stops_jumps(folders, tmp_path, monkeypatch):
    left = [3]

    def observe(state, step, row, rules):
        if step in left:
            left.remove(step)
            state = dataclasses.replace(state, alarmed=True)
            return state, collapse_detector.Alarm(step, 2, "collapse", False)
        return state, None

    monkeypatch.setattr(collapse_detector, "observe", observe)
    config = config_with(folders)
    config.guard.action = "rollback"
    config.steps = 4
    starts = []
    really = jump.Jumps.start

    def start(self, params):
        starts.append(jump.to_host(params))
        really(self, params)

    monkeypatch.setattr(jump.Jumps, "start", start)
    run(config, tmp_path / "run")
    rows = {row["step"]: row for row in lines(tmp_path / "run", "metrics.jsonl")}
    assert [step for step, row in rows.items() if "jump/accepted" in row] == [1]
    with checkpoint.Checkpoints(tmp_path / "run", keep=40) as saved:
        assert saved.steps == [1, 2, 3, 4]
        first, last = (saved.snapshot(step, starts[0]) for step in (1, 4))
    jax.tree.map(np.testing.assert_array_equal, starts[1], first)  # of the rollback to step 1
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (first, last)), strict=True))
