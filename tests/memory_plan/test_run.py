"""The plan at the start of a run, the programs it speaks of, and the command line."""

import json
import pathlib

import jax
import pytest

from launch import plan as launch_plan  # noqa: F401  (that it imports)
from opd_jax import hardware, train
from opd_jax.errors import ModelError, PlanError
from opd_jax.memory_plan import memory, report
from opd_jax.memory_plan import programs as real
from opd_jax.memory_plan import run as planning
from opd_jax.memory_plan.workload import of_config, of_setup
from opd_jax.training import precompile
from opd_jax.training.make_setup import make_setup
from tests.support.small_run import small


class Stop(Exception):
    pass


def shapes(program):
    def one(leaf):
        return (leaf.shape, str(leaf.dtype)) if hasattr(leaf, "shape") else leaf

    return jax.tree.map(one, (program.args, dict(program.kwargs)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss.divergence_weight": 1.0, "rollout.slots": 3, "optim.updates_per_rollout": 2,
         "data.teacher_prompt_template": "{problem}?", "data.bad_rows": "skip"},
    ],
    ids=["stable_opd", "full, slots, two updates, other prompts"],
)  # fmt: skip
def test_the_programs_are_those_that_training_compiles(folders, tmp_path, monkeypatch, changes):
    config = small(folders)
    for field, value in changes.items():
        section, name = field.split(".")
        config[section][name] = value
    config.eval.data = ""
    theirs = []

    def compile_all(programs):
        theirs.extend(programs)
        raise Stop

    monkeypatch.setattr(precompile, "worthwhile", lambda: True)
    monkeypatch.setattr(precompile, "compile_all", compile_all)
    with pytest.raises(Stop):
        train.run(config, str(tmp_path / "run"), command=["test"])
    setup = make_setup(config)
    workload = of_setup(setup, hardware.find("cpu"), 1)
    ours = real.programs(setup.config, workload)
    assert [program.name for program in ours] == [program.name for program in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.function.__name__ == other.function.__name__
        assert shapes(one) == shapes(other)


@pytest.mark.slow
def test_a_run_writes_its_plan(folders, tmp_path, capsys):
    config = small(folders)
    config.steps, config.eval.data = 1, ""
    folder = tmp_path / "run"
    train.run(config, str(folder), command=["test"])
    said = capsys.readouterr().out
    assert "plan: " in said
    assert said.index("plan: ") < said.index("step ")
    written = json.loads((folder / "plan.json").read_text())
    assert written["fits"]
    assert written["device"]["kind"] == "cpu"
    assert set(written["stages"]) == {
        "rollout", "score", "update", "term gradients", "optimizer", "checkpoint"
    }  # fmt: skip
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert set(settings) == {"set", "recommended_but_not_set"}


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_anything_is_written(
    folders, tmp_path, monkeypatch
):  # fmt: skip
    config = small(folders)
    monkeypatch.setattr(hardware, "free_host_bytes", lambda: 2**20)
    monkeypatch.setattr(memory, "whole_host_bytes", lambda: 2**20)
    with pytest.raises(PlanError, match=r"needs .* wanted at most 0.0 .*; (set|take) "):
        train.run(config, str(tmp_path / "run"), command=["test"])
    assert not (tmp_path / "run").exists()


def test_a_cpu_with_little_free_memory_is_a_warning(folders, monkeypatch):
    setup = make_setup(small(folders))
    monkeypatch.setattr(hardware, "free_host_bytes", lambda: 2**20)
    plan = planning.of_run(setup)
    assert planning.say(plan)[0].startswith("warning: plan: ")
    planning.require_fit(plan)  # the machine has enough, others hold it now


def test_a_gpu_that_is_not_known_has_no_plan(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "of_jax", lambda *_: None)
    plan = planning.of_run(make_setup(small(folders)))
    assert plan is None
    planning.require_fit(plan)
    planning.write(plan, tmp_path)
    assert "plan: none, for the memory of 'cpu' is not known" in planning.say(plan)[0]
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_is_planned_as_published():
    from configs import stable_opd

    config = stable_opd.get_config("qwen2.5-math-7b,teacher=openthinker3-7b")
    device = hardware.find("h200")
    workload = of_config(config, device, 4)
    assert workload.student.num_layers == 28
    assert (workload.batch, workload.golden, workload.width, workload.device_slots) == (
        256,
        64,
        9216,
        64,
    )
    assert workload.vocabulary == 151_665
    plan = report.make(memory.plan(workload, device))
    assert json.loads(json.dumps(report.to_json(plan)))["layout"]["data"] == 4
    config.student.path = "Qwen/Qwen9"
    with pytest.raises(ModelError, match="architecture of 'Qwen/Qwen9' is not known here"):
        of_config(config, device, 4)


def test_no_weights_are_read_for_a_plan():
    source = (pathlib.Path(real.__file__).parent).glob("*.py")
    assert not any("load_weights" in file.read_text() or "models.load(" in file.read_text()
                   for file in source)  # fmt: skip
