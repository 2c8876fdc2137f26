"""Several teachers in the plan: bytes by hand where they stay and where they wait, rows, and seconds."""

import pytest

from configs import opd
from opd_jax.hardware import DEVICES
from opd_jax.memory_plan import memory, step_time
from opd_jax.memory_plan.turns import Turns, make_turns
from opd_jax.memory_plan.workload import of_config
from tests.conftest import tiny_config
from tests.memory_plan.test_step_time import DEVICE, FOUR
from tests.support.plan_small import MODEL, workload

pytestmark = pytest.mark.short
P = 316  # parameters of MODEL
WIDE = tiny_config(
    vocab_size=10, hidden_size=8, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=2,
)  # fmt: skip


def held(name: str, given) -> dict[str, float]:
    return next(stage.held for stage in memory.stages(given) if stage.name == name)


def test_all_teachers_stay_on_the_device():
    three = Turns((MODEL, MODEL), (False, True))
    assert memory.always(workload(turns=three))["teacher"] == 2 * 2 * P  # the third shares weights
    assert "teachers" not in memory.host_bytes(workload(turns=three))
    assert held("checkpoint", workload(turns=three))["teacher"] == 2 * 2 * P


def test_teachers_that_wait_are_on_the_device_only_while_they_score():
    wait = workload(turns=Turns((MODEL, MODEL), (False, True), wait=True))
    assert "teacher" not in memory.always(wait)
    assert memory.host_bytes(wait)["teachers"] == 2 * 2 * P
    assert held("score", wait)["teacher"] == 2 * P
    for name in ("rollout", "update", "optimizer", "checkpoint"):
        assert "teacher" not in held(name, wait)


def test_the_stage_is_that_of_the_largest_teacher():
    one, other = workload(), workload(teacher=WIDE)
    both = held("score", workload(turns=Turns((WIDE,), (False,))))
    working = [sum(held("score", x).values()) - held("score", x)["teacher"] for x in (one, other)]
    assert sum(both.values()) - both["teacher"] == max(working) > min(working)
    assert both["teacher"] == held("score", one)["teacher"] + held("score", other)["teacher"]


def test_routed_rows_are_scored_in_even_shares():
    routed = Turns((MODEL,), (False,), routed=True)
    assert (routed.together(4), routed.together(5)) == (2, 3)
    assert Turns((MODEL,), (False,)).together(4) == 4
    many = {"microbatch_tokens": 10_000}
    assert workload(**many).score_rows == 4
    assert workload(**many, turns=routed).score_rows == 2
    assert workload(**many, turns=routed).rollout_rows == 4


def test_seconds_of_turns():
    """Of two equal teachers: routed as one teacher, a mixture as two of them with the student's pass."""
    one = step_time.score(workload(), DEVICE, FOUR)
    mixed, routed = (
        step_time.step_time(
            workload(turns=Turns((MODEL,), (False,), routed=routed)), DEVICE
        ).stages[1]
        for routed in (False, True)
    )
    assert mixed.name == "score"
    assert mixed.compute_s == pytest.approx(2 * one.compute_s)
    assert routed.compute_s == pytest.approx(one.compute_s)


def test_a_config_with_teachers():
    config = opd.get_config("qwen2.5-math-7b,teacher=openthinker3-7b")
    config.teachers.others = f"same={config.teacher.path},start=student"
    config.teachers.column, config.teachers.wait = "domain", "host"
    found = of_config(config, DEVICES["h200"], 1)
    assert found.turns.shared == (True, False)
    assert found.turns.routed
    assert memory.host_bytes(found)["teachers"] > 25e9  # two of 7B in 16 bits


def test_paths_that_are_equal_share_weights():
    section = opd.get_config("tiny").teachers
    found = make_turns(section, "a", [("b", MODEL), ("a", MODEL), ("b", MODEL)])
    assert found.shared == (False, True, True)
    assert found.held == (MODEL,)
    assert not make_turns(section, "a", []).wait
