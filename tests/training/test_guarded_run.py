"""Runs that the guard interferes with: an alarm at a step of the test's choice, and what the run does."""

import dataclasses
import json

import numpy as np
import pytest

from opd_jax import checkpoint, train
from opd_jax.evaluation import held_out
from opd_jax.training import collapse_detector, collapse_guard
from opd_jax.workdir import atomic
from tests.support.small_run import lines, small, without_times


def alarm_at(monkeypatch, *steps: int, onset: int, alarmed: bool = False) -> None:
    """An alarm at each of these steps, the first time it is reached; all other steps are healthy.

    `alarmed`: the state that goes on from there.
    """
    left = list(steps)

    def observe(state, step, row, rules):
        if step in left:
            left.remove(step)
            state = dataclasses.replace(state, alarmed=alarmed)
            return state, collapse_detector.Alarm(step, onset, f"step {step}: it collapses", False)
        return state, None

    monkeypatch.setattr(collapse_detector, "observe", observe)


def config_with(folders, action: str, method: str = "opd"):
    config = small(folders, method)
    config.guard.action = action
    config.checkpoint.every = 1
    config.checkpoint.keep = 40
    config.eval.data = ""
    return config


@pytest.mark.slow
def test_a_warning_is_said_and_logged(folders, tmp_path, monkeypatch, capsys):
    alarm_at(monkeypatch, 3, onset=2)
    config = config_with(folders, "warn")
    config.log.every = 4  # news is logged all the same
    train.run(config, str(tmp_path / "run"), command=[])
    assert "step 3: it collapses" in capsys.readouterr().out
    rows = lines(tmp_path / "run", "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 3, 4]
    assert rows[1]["guard/alarm"] == 1.0
    assert rows[1]["guard/onset"] == 2.0
    assert not any(key.startswith("guard/") for key in rows[2])


@pytest.mark.slow
def test_strengthened_terms_enter_the_loss_at_the_next_step(folders, tmp_path, monkeypatch):
    alarm_at(monkeypatch, 2, onset=1)
    config = config_with(folders, "strengthen")
    train.run(config, str(tmp_path / "run"), command=[])
    rows = {row["step"]: row for row in lines(tmp_path / "run", "metrics.jsonl")}
    assert "loss/sft" not in rows[2]  # its weight was 0
    for step in (3, 4):
        row = rows[step]
        total = row["loss/opd"] + 0.01 * row["loss/reference_kl"] + 0.1 * row["loss/sft"]
        np.testing.assert_allclose(row["loss/total"], total, rtol=1e-5)
        assert (row["guard/beta_kl"], row["guard/lambda_gold"]) == (0.01, 0.1)
    np.testing.assert_allclose(rows[2]["loss/total"], rows[2]["loss/opd"], rtol=1e-5)


@pytest.mark.slow
def test_stop_saves_and_ends_the_run(folders, tmp_path, monkeypatch, capsys):
    alarm_at(monkeypatch, 2, onset=1)
    config = config_with(folders, "stop")
    config.checkpoint.every = 0
    result = train.run(config, str(tmp_path / "run"), command=[])
    assert result.state.step == 2
    assert [row["step"] for row in lines(tmp_path / "run", "metrics.jsonl")] == [0, 1, 2]
    resumed = train.run(config, str(tmp_path / "run"), command=[])  # who insists goes on
    assert resumed.state.step == 4
    assert "resumed at step 2" in capsys.readouterr().out


@pytest.mark.slow
def test_rollback_goes_on_from_before_the_onset_strengthened(folders, tmp_path, monkeypatch):
    straight = train.run(config_with(folders, "warn"), str(tmp_path / "straight"), command=[])
    plain = lines(tmp_path / "straight", "metrics.jsonl")
    alarm_at(monkeypatch, 3, onset=2)
    result = train.run(config_with(folders, "rollback"), str(tmp_path / "run"), command=[])
    rows = lines(tmp_path / "run", "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    aside = lines(tmp_path / "run", "metrics.rolled_back.jsonl")
    assert [row["step"] for row in aside] == [2, 3]
    first = without_times(aside)[0]
    assert first.pop("loss/reference_kl") > 0  # measured from the start: it may be raised
    assert first == without_times(plain)[2]  # but nothing is done before the alarm
    assert rows[2]["guard/rolled_back_from"] == 3.0
    assert rows[2]["guard/rolled_back_to"] == 1.0
    # Step 2 again: the same weights, prompts and rollouts, another loss.
    assert rows[2]["score/reverse_kl"] == plain[2]["score/reverse_kl"]
    assert rows[2]["loss/total"] != plain[2]["loss/total"]
    assert rows[2]["loss/reference_kl"] > 0
    assert {row["step"] for row in lines(tmp_path / "run", "rollouts.jsonl")} == {1, 2, 3, 4}
    assert result.state.step == straight.state.step == 4


@pytest.mark.slow
def test_a_run_that_ends_after_its_last_rollback_says_so(folders, tmp_path, monkeypatch):
    """The line of the alarm's step is set aside; the reason is also where the run stands."""
    alarm_at(monkeypatch, 3, 4, onset=2)
    config = config_with(folders, "rollback")
    config.guard.max_rollbacks = 1
    result = train.run(config, str(tmp_path / "run"), command=[])
    assert result.state.step == 1
    rows = lines(tmp_path / "run", "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert "loss/opd" in rows[-1]
    assert (
        rows[-1].items() >= {"guard/stopped": 1.0, "guard/alarm": 1.0, "guard/onset": 2.0}.items()
    )
    assert lines(tmp_path / "run", "metrics.rolled_back.jsonl")[-1]["guard/stopped"] == 1.0


@pytest.mark.slow
def test_the_best_of_a_discarded_trajectory_is_discarded(folders, tmp_path, monkeypatch):
    """Step 2 is the best until the run goes back to step 1; then step 1 is, and stays so."""
    values = {0: [50.0], 1: [40.0], 2: [10.0, 60.0], 3: [70.0], 4: [80.0]}

    def evaluate(*_, out, protocol=None, **__):
        summary = {"truncation_rate": 0.0, "repetition_rate": 0.0}
        summary["length_mean"] = values[int(out.parent.name)].pop(0)
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(out.with_suffix(".json"), summary | {"protocol": protocol})
        return summary

    monkeypatch.setattr(held_out, "evaluate", evaluate)
    alarm_at(monkeypatch, 3, onset=2)
    config = config_with(folders, "rollback")
    config.eval.data, config.eval.every, config.eval.teacher = "tiny:test", 1, False
    config.eval.best = "length_mean"
    train.run(config, str(tmp_path / "run"), command=[])
    assert all(not left for left in values.values())
    record = json.loads((tmp_path / "run/best/best.json").read_text())
    assert record == {"step": 1, "metric": "length_mean", "value": 40.0}
    assert checkpoint.latest_step(tmp_path / "run" / "best") == 1
    aside = json.loads((tmp_path / "run/eval.rolled_back/2/tiny.json").read_text())
    assert aside["length_mean"] == 10.0
    assert json.loads((tmp_path / "run/eval/2/tiny.json").read_text())["length_mean"] == 60.0


@pytest.mark.slow
def test_a_rollback_that_was_cut_short_is_finished(folders, tmp_path, monkeypatch):
    """Killed while it was going back: the resumed run ends where the one that was not killed ends."""
    alarm_at(monkeypatch, 3, onset=2)
    atomic = train.run(config_with(folders, "rollback"), str(tmp_path / "whole"), command=[])

    class Killed(Exception):
        pass

    def killed(self, step):
        raise Killed

    alarm_at(monkeypatch, 3, onset=2)
    with monkeypatch.context() as patch:
        patch.setattr("opd_jax.checkpoint.Checkpoints.delete_after", killed)
        with pytest.raises(Killed):
            train.run(config_with(folders, "rollback"), str(tmp_path / "run"), command=[])
    resumed = train.run(config_with(folders, "rollback"), str(tmp_path / "run"), command=[])
    for a, b in zip(
        lines(tmp_path / "run", "metrics.jsonl")[2:],
        lines(tmp_path / "whole", "metrics.jsonl")[2:],
        strict=True,
    ):
        assert {k: v for k, v in a.items() if k.startswith(("loss/", "score/", "guard/"))} == {
            k: v for k, v in b.items() if k.startswith(("loss/", "score/", "guard/"))
        }
    assert resumed.state.step == atomic.state.step


@pytest.mark.slow
def test_after_the_last_rollback_the_run_ends_at_the_healthy_checkpoint(
    folders,
    tmp_path,
    monkeypatch,
    capsys,
):
    alarm_at(monkeypatch, 3, 3, 3, 3, onset=3)
    config = config_with(folders, "rollback")
    result = train.run(config, str(tmp_path / "run"), command=[])
    assert result.state.step == 2
    assert "3 times already; it stops at step 2" in capsys.readouterr().out
    assert [row["step"] for row in lines(tmp_path / "run", "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.slow
def test_masking_leaves_repetitive_tokens_out(folders, tmp_path, monkeypatch):
    """Random models repeat themselves: with every repetitive token left out the loss is another.

    The alarm at step 1 leaves tokens out from step 2 on, whose weights and rollouts are the same.
    """
    alarm_at(monkeypatch, 1, onset=1, alarmed=True)
    config = config_with(folders, "mask")
    config.metrics.repeated_tokens = "ngram"
    config.metrics.repeated_ngram = 2
    config.steps = 2
    train.run(config, str(tmp_path / "run"), command=[])
    config.guard.action = "off"
    train.run(config, str(tmp_path / "plain"), command=[])
    masked, plain = (lines(tmp_path / name, "metrics.jsonl")[2] for name in ("run", "plain"))
    assert plain["score/repeated_token_fraction"] > 0
    assert masked["score/advantage_mean"] == plain["score/advantage_mean"]  # measured all the same
    assert masked["loss/opd"] != plain["loss/opd"]
    config.steps = 1
    train.run(config, str(tmp_path / "asked"), command=[])
    config.steps, config.loss.repeated = 2, "mask"
    train.run(config, str(tmp_path / "asked"), command=[], accept_changes=True)
    assert lines(tmp_path / "asked", "metrics.jsonl")[2]["loss/opd"] == masked["loss/opd"]


@pytest.mark.slow
def test_the_guards_state_is_in_the_checkpoint(folders, tmp_path):
    """Four steps equal two, a resume and two, with a guard that watches."""
    straight = config_with(folders, "warn")
    train.run(straight, str(tmp_path / "straight"), command=[])
    config = config_with(folders, "warn")
    config.steps = 2
    train.run(config, str(tmp_path / "run"), command=[])
    config.steps = 4
    train.run(config, str(tmp_path / "run"), command=[])
    states = []
    for name in ("straight", "run"):
        with checkpoint.Checkpoints(tmp_path / name, keep=40) as saved:
            states.append(collapse_guard.from_json(saved.extras(4)["state"]))
    assert states[0] == states[1]
    assert states[0].steps["truncation"] == 4
