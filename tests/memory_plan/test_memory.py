"""Bytes of each stage by hand, the largest sizes that fit, and what is offered where nothing does."""

import dataclasses

import pytest

from configs import grpo, opd, opsd, sft, stable_opd, topk_opd
from configs.recipes import RECIPES
from opd_jax.errors import PlanError
from opd_jax.hardware import DEVICES, GIB, Device
from opd_jax.memory_plan import footprint, memory, report, resident
from opd_jax.memory_plan.layout import Layout
from opd_jax.memory_plan.workload import of_config
from tests.support.plan_small import MODEL, workload

pytestmark = pytest.mark.short
DEVICE = Device("toy", 1.0, 1e9, 1e9, 1e9, 1e9, 8, 0.0, True, "by hand", {})
P = 316  # parameters; 40 of them the embedding


@pytest.fixture(autouse=True)
def no_margin(request, monkeypatch):
    """Bytes are compared to the last one, unless a test is about the margin."""
    if "with_margin" not in request.fixturenames:
        monkeypatch.setattr(memory, "MARGIN", 0.0)


@pytest.fixture
def with_margin():
    """The margin as it is."""


def held(name, given):
    return next(stage.held for stage in memory.stages(given) if stage.name == name)


def test_what_stays_on_one_device():
    # AdamW: a master and two moments, float32; the teacher in 16 bits.
    assert memory.always(workload()) == {"master": 4 * P, "optimizer": 8 * P, "teacher": 2 * P}
    followed = workload(teacher_follows="average")
    assert memory.always(followed) == {"master": 4 * P, "optimizer": 8 * P, "average": 4 * P}
    beside = workload(reference=MODEL, renumbered=True)
    assert memory.always(beside)["reference"] == 2 * P
    assert memory.always(beside)["teacher"] == 2 * P + 2 * 10 * 4  # a second output matrix
    scoring = workload(reference=MODEL, reference_scores=True, reference_in_update=False)
    assert memory.always(scoring)["reference"] == 2 * P
    shared = workload(reference=MODEL, same_reference=True)
    assert "reference" not in memory.always(shared)


def test_the_state_is_divided_and_compute_weights_are_not():
    four = workload(layout=Layout(data=4))
    # Biases of keys and values, 2 layers x 2 numbers each, do not divide among 4.
    state = (P - 8) + 4 * 8
    assert memory.always(four) == {"master": state, "optimizer": 2 * state, "teacher": 2 * P}
    assert resident.gradients(four) == 4 * P  # partial sums, whole on every device
    sharded = workload(layout=Layout(fsdp=4, student="sharded", teacher="sharded"))
    # fsdp divides the 280 numbers in matrices, and none of the 36 in norms and biases.
    assert resident.weight_bytes(sharded, "student") == 2 * (280 / 4 + 36)
    assert resident.gradients(sharded) == 4 * (280 / 4 + 36)
    assert memory.always(sharded)["teacher"] == 2 * (280 / 4 + 36)
    # tensor divides the layers' matrices and biases, 256 of the 316: no norms, no embedding.
    halves = workload(layout=Layout(data=2, tensor=2))
    assert resident.weight_bytes(halves, "student") == 2 * (60 + 128)
    assert resident.masters(halves) == 4 * (60 + 128) / 2


def test_rollout_holds_two_copies_of_the_weights_and_the_caches():
    found = held("rollout", workload())
    assert (found["student"], found["unstacked"]) == (2 * P, 2 * P)
    # 4 slots of 8 positions: 16 bytes of keys and values, an id and a log-prob.
    assert found["caches"] == 4 * 8 * (16 + 8)
    assert held("rollout", workload(slots=2))["caches"] == 2 * 8 * 24
    assert held("rollout", workload(layout=Layout(data=4)))["caches"] == 8 * 24
    # float32 on one device computes with the masters themselves.
    plain = held("rollout", workload(itemsize=4, own_copy=False, fused=False))
    assert "student" not in plain
    assert plain["unstacked"] == 4 * P


def test_an_evaluation_has_answers_slots_and_a_teacher_of_its_own():
    # 2 answers of 3 + 7 tokens: keys and values of 8 numbers a position, in 16 bits.
    asked = workload(evaluated=2, answer=7, asks_teacher=True)
    assert held("evaluate", asked)["caches"] == footprint.slots_bytes(workload(response=7), 2)
    teacher = held("evaluate teacher", asked)
    assert teacher["caches"] == footprint.slots_bytes(workload(response=7), 2)
    assert teacher["unstacked"] == held("evaluate", asked)["unstacked"]
    assert "student" not in teacher  # no compute weights of the student's beside it
    wide = held("evaluate teacher", dataclasses.replace(asked, teacher_width=3 + 4 + 5))
    assert wide["caches"] == footprint.slots_bytes(workload(prompt=7, response=7), 2)
    names = [stage.name for stage in memory.stages(workload(evaluated=2, answer=7))]
    assert "evaluate teacher" not in names


def test_an_evaluation_that_does_not_fit_is_told_its_own_field():
    asked = workload(evaluated=400, answer=500)
    usable = (
        max(stage.total for stage in memory.stages(asked) if stage.name != "evaluate") + 300_000
    )
    made = memory.plan(asked, DEVICE, usable=usable)
    assert made.peak.name == "evaluate"
    most = memory.largest_answers(asked, usable)
    assert 0 < most < 400
    assert memory.remedy(made) == f"set --config.eval.slots={most}"
    fits = memory.plan(dataclasses.replace(asked, evaluated=most), DEVICE, usable=usable)
    assert fits.fits


def test_scoring_keeps_the_teachers_states_for_the_update():
    kept, alone = (held("score", workload(over_vocabulary=over)) for over in (True, False))
    assert kept["rows"] - alone["rows"] == 4 * 8 * 8  # 4 rows of 8 tokens, 4 numbers of 2 bytes
    live = held("update", workload(over_vocabulary=True, teacher_follows="live"))
    assert live["teacher"] == 40 * 2  # a copy of the output matrix; the weights are the state's


def test_golden_solutions_with_soft_labels_have_a_stage_of_their_own():
    soft = {"golden": 2, "golden_divergence": True, "golden_over_vocabulary": True}
    kept = held("score golden", workload(**soft))
    assert kept == held("score", workload(batch=2, over_vocabulary=True))
    alone = workload(**soft, rollouts=False, teacher_follows="live")
    assert next(stage.name for stage in memory.stages(alone)) == "score golden"
    assert held("update", alone)["teacher"] == 40 * 2  # a copy of the output matrix
    assert "score golden" not in [stage.name for stage in memory.stages(workload(golden=2))]


def test_gradients_of_each_term_lie_beside_one_another():
    three = workload(terms=("opd", "reference_kl", "sft"), term_gradients=True)
    assert held("term gradients", three)["gradients"] == 3 * 4 * P
    four = dataclasses.replace(three, layout=Layout(data=4))
    assert held("term gradients", four)["gradients"] == 4 * P + 2 * (
        P + 3 * 8
    )  # finished ones are divided
    assert "term gradients" not in [stage.name for stage in memory.stages(workload())]


def test_micro_batches_are_those_of_scoring_and_of_the_update():
    assert workload(batch=10, microbatch_tokens=39).rollout_rows == 4  # 10 rows as 4 + 4 + 2
    assert workload(batch=10, microbatch_tokens=40).rollout_rows == 5
    assert workload(batch=10, microbatch_tokens=1000).rollout_rows == 10
    wide = workload(batch=10, microbatch_tokens=40, teacher_width=13)
    assert (
        wide.score_rows == 3
    )  # 3 x 13 tokens of the teacher's rows, which the update does not read
    assert wide.rollout_rows == 5
    two = workload(batch=10, microbatch_tokens=1000, updates=2, layout=Layout(data=2))
    assert (two.score_rows, two.rollout_rows, two.device_batch) == (5, 3, 5)
    assert workload(golden=4, layout=Layout(data=8)).golden_rows == 1


def test_attention_keeps_the_stream_and_what_attention_returned():
    # 2 layers, 16 tokens of 2 rows: 4 numbers of 2 bytes; heads 4 x 2 bytes, 2 float32 statistics.
    assert footprint.kept(workload(remat="full"), 2) == 2 * 16 * 8
    assert footprint.kept(workload(remat="attention"), 2) == 2 * 16 * (8 + 8 + 8)


def test_the_largest_sizes_are_the_largest_that_fit():
    given = workload(batch=64, slots=64, microbatch_tokens=64)
    for usable in (30_000.0, 60_000.0, 1e9):
        tokens = memory.largest_microbatch(given, usable)
        slots = memory.largest_slots(given, usable)

        def most(changes, names, given=given):
            sized = dataclasses.replace(given, **changes)
            return max(s.total for s in memory.stages(sized) if s.name in names)

        learning = ("score", "update", "optimizer", "checkpoint")
        assert tokens % 8 == 0
        assert 0 < slots <= 64
        assert 0 < tokens <= 512
        assert most({"microbatch_tokens": tokens}, learning) <= usable
        assert most({"slots": slots}, ("rollout",)) <= usable
        if tokens < 512:  # one row more is a row too many
            assert most({"microbatch_tokens": tokens + 8}, learning) > usable
        if slots < 64:
            assert most({"slots": slots + 1}, ("rollout",)) > usable
    assert memory.largest_microbatch(given, 100.0) == 0


def test_too_little_memory_is_refused_with_what_to_set():
    given = workload(batch=64, slots=64, microbatch_tokens=512)
    planned = memory.plan(given, DEVICE, usable=30_000.0)
    assert not planned.fits
    with pytest.raises(
        PlanError, match=r"needs .* GiB of a device, most of it .*; set --config\."
    ) as error:
        memory.require_fit(planned)
    assert "\n" not in str(error.value)
    flags = dict(
        flag.removeprefix("--config.").split("=") for flag in memory.remedy(planned).split()[1:]
    )
    changed = dataclasses.replace(
        given,
        microbatch_tokens=int(flags.get("optim.microbatch_tokens", 512)),
        slots=int(flags.get("rollout.slots", 64)),
        remat=flags.get("optim.remat", given.remat),
    )
    memory.require_fit(memory.plan(changed, DEVICE, usable=30_000.0))


def test_a_model_that_is_too_large_wants_more_devices():
    planned = memory.plan(workload(), DEVICE, usable=1000.0)
    assert (
        memory.remedy(planned) == "take more devices, devices with more memory, or smaller models"
    )


def test_a_mesh_that_divides_weights_is_offered_where_there_is_one():
    heads = dataclasses.replace(MODEL, num_kv_heads=2)
    four = workload(layout=Layout(data=4), student=heads, teacher=heads, reference=heads)
    little = max(s.total for s in memory.stages(dataclasses.replace(four, slots=4))) - 600
    flags = memory.remedy(memory.plan(four, DEVICE, usable=little))
    assert "--config.mesh.fsdp=4" in flags
    assert "--config.mesh.teacher=sharded" in flags
    # Rollouts take the student whole all the same, unless `tensor` divides it.
    student = dataclasses.replace(
        MODEL, num_heads=4, num_kv_heads=4, hidden_size=64, intermediate_size=96
    )
    large = dataclasses.replace(four, student=student, teacher=student, reference=student)
    flags = memory.remedy(memory.plan(large, DEVICE, usable=300_000))
    assert "--config.mesh.tensor=4" in flags
    assert "--config.mesh.student=replicated" in flags


def test_a_run_without_a_teacher_has_a_plan():
    alone = workload(teacher=None)
    names = [stage.name for stage in memory.stages(alone)]
    assert names == ["rollout", "score", "update", "optimizer", "checkpoint"]
    assert all("teacher" not in stage.held for stage in memory.stages(alone))
    learning = workload(teacher=None, rollouts=False, golden=4)
    assert [stage.name for stage in memory.stages(learning)] == [
        "update",
        "optimizer",
        "checkpoint",
    ]


def test_every_recipe_of_every_method_has_a_plan():
    for method in (grpo, opd, opsd, sft, stable_opd, topk_opd):
        for recipe in RECIPES:
            device = DEVICES["h200"]
            given = of_config(method.get_config(recipe), device, 4)
            assert report.lines(report.make(memory.plan(given, device)))


def test_a_gpu_has_its_share_for_arrays(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert memory.usable_bytes(DEVICE, Layout()) == 0.92 * GIB
    cpu = dataclasses.replace(DEVICE, gpu=False)
    assert memory.usable_bytes(cpu, Layout(data=2)) == GIB / 2


@pytest.mark.usefixtures("with_margin")
def test_a_plan_for_a_gpu_keeps_a_twentieth_free():
    """100 bytes are asked for: with 105 of them 5.25 are the margin, and 5 are to spare."""
    given = workload()
    most = max(stage.total for stage in memory.stages(given))
    tight, roomy = (memory.plan(given, DEVICE, usable=share * most) for share in (1.05, 1.06))
    assert tight.margin == 0.05 * 1.05 * most
    assert tight.fits
    assert not tight.keeps_margin
    memory.require_fit(tight)  # it is told, not refused
    assert roomy.keeps_margin
    cpu = dataclasses.replace(DEVICE, gpu=False)
    assert memory.plan(given, cpu, usable=most).margin == 0.0  # the system moves pages

    def line(plan):
        return next(x for x in report.lines(report.make(plan)) if x.startswith("  fits"))

    assert ", more than the margin of " in line(roomy)
    assert "(5%) for holes in the pool" in line(roomy)
    assert ", less than the margin of " in line(tight)
    assert "set --config.mesh.allocator=vmm, which has none, or set --config." in line(tight)
    assert report.to_json(report.make(tight))["margin_bytes"] == tight.margin


@pytest.mark.usefixtures("with_margin")
def test_the_largest_sizes_leave_the_margin_free():
    given = workload(batch=64, slots=64, microbatch_tokens=512)
    planned = memory.plan(given, DEVICE, usable=60_000.0)
    assert planned.largest["rollout.slots"] == memory.largest_slots(given, 57_000.0)
    assert planned.largest["optim.microbatch_tokens"] == memory.largest_microbatch(given, 57_000.0)
