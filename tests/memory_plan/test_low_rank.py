"""The plan of a run of adapters: by hand, and against programs that are compiled for this machine."""

import pytest

from configs import opsd, stable_opd
from opd_jax import hardware
from opd_jax.memory_plan import footprint, memory, programs, report, resident, step_time, verify
from opd_jax.memory_plan.workload import of_config
from opd_jax.models.low_rank import TARGETS, LowRank
from tests.memory_plan.test_footprint import assert_close
from tests.support.lanes import slow
from tests.support.plan_small import MODEL, workload

P = 316
# Rank 1 beside matrices of 4 x 4, 4 x 2, 4 x 2, 4 x 4, 4 x 6, 4 x 6, 6 x 4, in 2 layers.
N = 2 * (8 + 6 + 6 + 8 + 10 + 10 + 10)
SPEC = LowRank(1, 1.0, 1.0, tuple(TARGETS))


@pytest.mark.short
def test_what_stays_by_hand():
    """Weights in 16 bits, once; float32 masters and moments of the adapters; a teacher that is the base."""
    alone = workload(low_rank=SPEC)
    assert memory.always(alone) == {
        "base": 2 * P, "master": 4 * N, "optimizer": 8 * N, "teacher": 2 * P,
    }  # fmt: skip
    shared = workload(low_rank=SPEC, reference=MODEL, base_roles=("teacher", "reference"))
    held = {"base": 2 * P, "master": 4 * N, "optimizer": 8 * N}
    assert memory.always(shared) == held
    found = {stage.name: stage.held for stage in memory.stages(shared)}
    assert found["rollout"]["student"] == 2 * N  # adapters in 16 bits; the base is counted already
    assert found["rollout"]["unstacked"] == 2 * P  # merged
    assert found["update"]["gradients"] == 4 * N
    assert memory.host_bytes(shared) == {"checkpoint": 3 * 4 * N, "export": 4 * P}


@pytest.mark.short
def test_arguments_of_the_programs_by_hand():
    given = workload(low_rank=SPEC)
    assert footprint.optimizer(given).arguments == {
        "master": 4 * N, "optimizer": 8 * N, "gradients": 4 * N,
    }  # fmt: skip
    arguments = footprint.gradient(given).arguments
    assert (arguments["master"], arguments["gradients"]) == (4 * N, 4 * N)
    assert arguments["base"] == 2 * P
    assert footprint.score(given).arguments["student"] == 2 * (P + N)
    assert resident.adapter_bytes(given) == 2 * N


@pytest.mark.short
@pytest.mark.parametrize(
    ("remat", "more"), [("full", 0), ("attention", 0), ("none", 7), ("dots", 7 + 28)]
)
def test_what_layers_keep_of_adapters(remat, more):
    """Of each token x A, 7 of 1 number; with dots also (x A) B: 4 + 2 + 2 + 4 + 6 + 6 + 4."""
    kept = [footprint.kept(workload(remat=remat, low_rank=one), 2) for one in (None, SPEC)]
    assert kept[1] - kept[0] == 2 * 16 * 2 * more


@pytest.mark.short
@pytest.mark.parametrize(
    ("fields", "roles"),
    [
        ({}, ("teacher", "reference")),
        ({"reference.dtype": "float32"}, ("teacher",)),
        ({"teacher.follow": "live"}, ("reference",)),
        ({"mesh.teacher": "sharded"}, ("reference",)),
    ],
)
def test_roles_that_share_the_base(fields, roles):
    config = opsd.get_config("qwen2.5-math-7b")
    config.lora.rank, config.loss.beta_kl = 64, 0.01
    config.update_from_flattened_dict(fields)
    assert of_config(config, hardware.find("h200"), 1).base_roles == roles


@pytest.mark.short
def test_a_7b_student_and_a_7b_teacher_on_one_gpu():
    """Without adapters the state alone is more than an H200 has; with them an 80 GB GPU is enough."""
    fits = {}
    for rank, slots in ((0, 32), (64, 32)):
        config = stable_opd.get_config("qwen2.5-math-7b")
        config.lora.rank, config.rollout.slots, config.eval.slots = rank, slots, slots
        for kind in ("h200", "h100"):
            device = hardware.find(kind)
            fits[rank, kind] = memory.plan(of_config(config, device, 1), device).keeps_margin
    assert fits == {(0, "h200"): False, (0, "h100"): False, (64, "h200"): True, (64, "h100"): True}


@pytest.mark.short
def test_frozen_matrices_take_no_product_backward():
    config = stable_opd.get_config("qwen2.5-math-7b")
    device, seconds = hardware.find("h200"), []
    for rank in (0, 64):
        config.lora.rank = rank
        plan = step_time.step_time(of_config(config, device, 1), device)
        (found,) = [stage for stage in plan.stages if stage.name == "update"]
        seconds.append(found.expected_s)
    assert 0.7 < seconds[1] / seconds[0] < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", *slow("attention", "dots", "full")])
def test_planned_bytes_are_those_of_compiled_programs(remat):
    config = stable_opd.get_config("tiny")
    config.lora.rank, config.optim.remat = 16, remat
    given = of_config(config, hardware.find("cpu"), 1)
    kinds = ("score", "gradient on rollouts", "gradient on golden", "optimizer")
    planned = {kind: report.programs(given)[kind] for kind in kinds}
    rows = []
    for kind, program in verify.widest(programs.programs(config, given), planned).items():
        found = programs.compile_for(program, None).memory_analysis()
        rows.append((
            kind, planned[kind].argument_bytes / found.argument_size_in_bytes,
            planned[kind].temporary_bytes / found.temp_size_in_bytes,
        ))  # fmt: skip
    assert_close(rows)
