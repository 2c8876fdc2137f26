"""Plans on eight devices, run in a process of their own (tests/memory_plan/test_mesh.py)."""

from typing import Any

import jax
import pytest

from configs import stable_opd
from opd_jax import hardware, train
from opd_jax.aot import Program
from opd_jax.memory_plan import collectives, report, resident, verify
from opd_jax.memory_plan import programs as real
from opd_jax.memory_plan.workload import of_config, of_setup
from opd_jax.sharding.mesh import ONE, make_mesh
from opd_jax.sharding.partition import ROLES
from opd_jax.training import precompile
from opd_jax.training.make_setup import make_setup
from tests.support.small_run import small

SHARDED = {role: "sharded" for role in ROLES}


class Stop(Exception):
    pass


def shapes(program: Program) -> Any:
    def one(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        return leaf.shape, str(leaf.dtype), str(getattr(leaf, "sharding", None))

    return jax.tree.map(one, (program.args, dict(program.kwargs)))


@pytest.mark.parametrize("roles", [{}, SHARDED], ids=["replicated", "sharded"])
def test_the_programs_are_those_that_training_compiles(folders, tmp_path, monkeypatch, roles):
    config = small(folders)
    config.eval.data, config.loss.divergence_weight = "", 1.0
    config.mesh.update({"fsdp": 2} | roles)
    theirs: list[Program] = []

    def compile_all(programs: list[Program]) -> None:
        theirs.extend(programs)
        raise Stop

    monkeypatch.setattr(precompile, "worthwhile", lambda: True)
    monkeypatch.setattr(precompile, "compile_all", compile_all)
    with pytest.raises(Stop):
        train.run(config, str(tmp_path / "run"), command=["test"])
    setup = make_setup(config)
    ours = real.programs(setup.config, of_setup(setup, hardware.find("cpu"), 8), setup.mesh)
    assert [program.name for program in ours] == [program.name for program in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert shapes(one) == shapes(other), one.name


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 2, "tensor": 2}, {"fsdp": 8} | SHARDED], ids=["tensor", "sharded"]
)
def test_planned_bytes_are_those_of_compiled_programs(mesh):
    config = stable_opd.get_config("tiny")
    config.mesh.update(mesh)
    given = of_config(config, hardware.find("cpu"), 8)
    planned = {kind: report.programs(given)[kind] for kind in ("score", "gradient on golden")}
    programs = real.programs(config, given, make_mesh(config.mesh))
    for kind, program in verify.widest(programs, planned).items():
        found = real.compile_for(program, None).memory_analysis()
        arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
        assert planned[kind].argument_bytes == pytest.approx(arguments, rel=0.01), kind
        assert planned[kind].temporary_bytes == pytest.approx(temporaries, rel=0.2), kind


@pytest.mark.parametrize("count", [2, 8])
def test_what_a_step_sends_is_a_reduction_of_gradients_and_new_weights(count):
    config = stable_opd.get_config("tiny")
    given = of_config(config, hardware.find("cpu"), count)
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    sent = {
        program.name: collectives.sent_bytes(real.compile_for(program, None).as_text(), count)
        for program in real.programs(config, given, mesh)
        if "64 x 100" in program.name or program.name.startswith(("sum of", "compute"))
    }
    whole = 4 * resident.parameters(given.student, ONE) * (count - 1) / count
    assert sent.pop("sum of gradients") == pytest.approx(whole, rel=0.01)
    assert sent.pop("compute weights") == pytest.approx(whole, rel=0.01)
    assert set(sent) == {"score 64 x 100", "gradient on rollouts 64 x 100"}
    assert not any(sent.values())
