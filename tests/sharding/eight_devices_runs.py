"""Whole runs on a mesh are those of one device. Needs eight devices: test_mesh.py starts it so."""

import pathlib

import pytest

import configs.evaluate
import opd_jax
from opd_jax import train
from opd_jax.evaluation import run as runner
from opd_jax.evaluation import subject as subjects
from opd_jax.sharding import mesh
from opd_jax.sharding.mesh import ONE
from opd_jax.tools.profile import trace
from tests.support.experts import make_expert, of_teachers
from tests.support.small_run import lines, small, without_times


@pytest.mark.slow
def test_a_trace_of_several_devices_has_no_other_stage(folders, tmp_path):
    """The sums over replicas and the gathering of weights belong to the update."""
    config = small(folders)
    config.steps, config.eval.data, config.checkpoint.every = 2, "", 0
    config.mesh.update({"data": 2, "fsdp": 4, "student": "sharded"})
    config.profile.start_step, config.profile.steps, config.log.gradients = 2, 1, 2
    train.run(config, str(tmp_path / "run"), command=[])
    found = trace.read(trace.newest(tmp_path / "run" / "profile")).operations
    assert {"jit__summed", "jit__compute", "jit__total"} <= {one.program for one in found}
    stages = trace.by_stage(found)
    assert stages["other"] < 0.01 * sum(stages.values())
    assert trace.by_scope(found, {})["update", trace.COMMUNICATION] > 0


@pytest.mark.slow
def test_whole_runs_match_and_go_on_from_each_other(folders, tmp_path, monkeypatch):
    """Rollouts, scores, evaluation, update and resume of a run on one device and of one on eight."""
    config = small(folders)
    config.optim.learning_rate, config.log.gradients, config.guard.copies = 1e-3, 1, 1
    make_really = mesh.make_mesh
    for steps in (2, 3):  # the third step by the other one
        config.steps = steps
        for name in ("one", "eight"):
            alone = (name == "one") == (steps == 2)
            config.mesh.fsdp = 1 if alone else 4
            for role in mesh.ROLES:
                config.mesh[role] = "replicated" if alone else "sharded"
            made = (lambda _: ONE) if alone else make_really
            monkeypatch.setattr("opd_jax.training.make_setup.make_mesh", made)
            train.run(config, str(tmp_path / name), command=[])
    rows = [without_times(lines(tmp_path / name, "metrics.jsonl")) for name in ("one", "eight")]
    assert [row["step"] for row in rows[0]] == [0, 1, 2, 3]
    for one, eight in zip(*rows, strict=True):
        assert one.keys() == eight.keys()
        for key, value in one.items():
            if one["step"] == 1 and "cosine" in key and "reference_kl" in key:
                continue  # at the reference that gradient is rounding alone
            assert eight[key] == pytest.approx(value, rel=1e-3, abs=1e-4), (one["step"], key)
    texts = [lines(tmp_path / name, "rollouts.jsonl") for name in ("one", "eight")]
    for one, eight in zip(*texts, strict=True):
        assert one["response_ids"] == eight["response_ids"]


def test_an_evaluation_gives_the_answers_of_one_device(tmp_path, monkeypatch):
    config = configs.evaluate.get_config()
    config.eval.update({"problems": 7, "samples": 1, "max_response_tokens": 40})
    model = str(pathlib.Path(opd_jax.__file__).parent / "tiny" / "student")
    runner.run(config, model, str(tmp_path / "eight"), command=["test"])
    monkeypatch.setattr(subjects, "make_mesh", lambda section: ONE)
    runner.run(config, model, str(tmp_path / "one"), command=["test"])
    eight, one = (
        (tmp_path / name / "eval" / "tiny.jsonl").read_text() for name in ("eight", "one")
    )
    assert eight == one


@pytest.mark.slow
def test_teachers_that_are_divided_and_wait_are_those_of_one_device(folders, tmp_path, monkeypatch):
    expert = make_expert(folders, tmp_path / "expert")
    config = of_teachers(
        folders, tmp_path, f"code={expert}", teachers__column="domain", teachers__first="math",
        teachers__wait="host", optim__learning_rate=1e-3,
    )  # fmt: skip
    config.steps, config.checkpoint.every = 2, 0
    monkeypatch.setattr("opd_jax.training.make_setup.make_mesh", lambda _: ONE)
    train.run(config, str(tmp_path / "one"), command=[])
    monkeypatch.undo()
    config.mesh.fsdp, config.mesh.teacher = 4, "sharded"
    train.run(config, str(tmp_path / "eight"), command=[])
    rows = [without_times(lines(tmp_path / name, "metrics.jsonl")) for name in ("one", "eight")]
    assert rows[0][1]["teacher/code/rollouts"] == 4
    for one, eight in zip(*rows, strict=True):
        assert one.keys() == eight.keys()
        for key, value in one.items():
            assert eight[key] == pytest.approx(value, rel=1e-3, abs=1e-4), (one["step"], key)
