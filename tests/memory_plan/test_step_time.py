"""Seconds of a step, by hand: a device of round numbers and a model of 316 parameters."""

import numpy as np
import pytest

from opd_jax.hardware import Device
from opd_jax.memory_plan import step_time
from opd_jax.memory_plan.layout import Layout
from tests.support.plan_small import workload

pytestmark = pytest.mark.short

# A second is 1000 operations, 100 bytes, 50 bytes to a neighbour in the node of 2.
DEVICE = Device("toy", 1.0, 100.0, 1000.0, 50.0, 5.0, 2, 0.0, True, "by hand", {})
FOUR = np.full(4, 5)


def test_rollout_reads_weights_once_a_token_and_positions_once():
    found = step_time.rollout(workload(), DEVICE, FOUR)
    # Step t reads 3 + t positions a row: 3 + 4 + 5 + 6 + 7 = 25, written 5; 16 bytes a position.
    # Weights, in 16 bits: 280 a step, 5 steps; the prefill reads 240 and writes 12 positions.
    moved = 2 * 280 * 5 + 16 * 4 * (25 + 5) + 2 * 240 + 16 * 12
    assert found.memory_s == pytest.approx(moved / 100)
    # 2 * 280 a token, 20 tokens; attention 32 a pair, 100 pairs; prompts: 12 tokens through 240,
    # 6 pairs each.
    flops = 2 * 280 * 20 + 32 * 100 + 2 * 240 * 12 + 32 * 24
    assert found.compute_s == pytest.approx(flops / 1000)
    assert found.bound == "memory"


def test_fewer_slots_take_more_steps():
    one, two = (step_time.rollout(workload(slots=n), DEVICE, FOUR) for n in (4, 2))
    assert two.memory_s - one.memory_s == pytest.approx(2 * 280 * 5 / 100)  # 10 steps, not 5
    uneven = np.array([5, 1, 1, 1])  # the long one alone is 5 steps, the others fit beside
    less = step_time.rollout(workload(slots=2), DEVICE, uneven)
    most = step_time.rollout(workload(slots=4), DEVICE, uneven)
    assert less.memory_s == most.memory_s


def test_score_is_a_pass_of_each_model_over_padded_rows():
    found = step_time.score(workload(), DEVICE, FOUR)
    # Rows of 8, all padded to 8: 32 tokens, 20 of them with logits, 36 pairs a row, twice.
    assert found.compute_s == pytest.approx(2 * (2 * (240 * 32 + 40 * 20) + 32 * 4 * 36) / 1000)
    # Micro-batches of 16 tokens: two, each reads all weights.
    assert found.memory_s == pytest.approx(2 * 2 * 280 * 2 / 100)
    # Rows of 3 + 1 are as wide as half of 8 (a small batch has two widths): 4 tokens each, 10 pairs.
    short = step_time.score(workload(), DEVICE, np.full(4, 1))
    assert short.compute_s == pytest.approx(2 * (2 * (240 * 16 + 40 * 4) + 32 * 4 * 10) / 1000)


@pytest.mark.parametrize(
    ("remat", "layers", "attention"),
    [("none", 3, 3.5), ("dots", 3, 3.5), ("attention", 4, 3.5), ("full", 4, 4.5)],
)
def test_update_counts_what_is_computed_again(remat, layers, attention):
    found = step_time.update(workload(remat=remat), DEVICE, FOUR)
    products = 2 * (32 * 240 * layers + 20 * 40 * 3)
    assert found.compute_s == pytest.approx((products + attention * 32 * 4 * 36) / 1000)
    adamw = 28 * 316
    assert found.memory_s == pytest.approx((2 * layers * 280 * 2 + adamw) / 100)


def test_a_reference_is_one_more_pass():
    alone, beside = workload(), workload(reference=workload().student)
    more = [step_time.update(one, DEVICE, FOUR).compute_s for one in (alone, beside)]
    assert more[1] - more[0] == pytest.approx((2 * (32 * 240 + 20 * 40) + 32 * 4 * 36) / 1000)


def test_a_reference_that_scores_is_one_more_pass_there():
    beside = workload(
        reference=workload().student, reference_scores=True, reference_in_update=False
    )
    score = [step_time.score(one, DEVICE, FOUR).compute_s for one in (workload(), beside)]
    assert score[1] == pytest.approx(1.5 * score[0])  # three equal models instead of two
    assert step_time.update(beside, DEVICE, FOUR) == step_time.update(workload(), DEVICE, FOUR)


def test_a_loss_over_the_vocabulary_is_the_teachers_logits_again():
    alone, beside = workload(), workload(over_vocabulary=True)
    more = [step_time.update(one, DEVICE, FOUR).compute_s for one in (alone, beside)]
    assert more[1] - more[0] == pytest.approx(2 * 20 * 40 / 1000)


def test_golden_solutions_with_soft_labels_are_scored_as_rollouts_are():
    plain = workload(golden=4)
    soft = workload(golden=4, golden_divergence=True, golden_over_vocabulary=True)
    before, after = (
        {stage.name: stage for stage in step_time.step_time(one, DEVICE).stages}
        for one in (plain, soft)
    )
    assert after.keys() - before.keys() == {"score golden"}
    assert after["score golden"].compute_s == before["score"].compute_s  # as many, as long
    assert after["score golden"].expected_s == before["score"].expected_s
    more = after["update"].compute_s - before["update"].compute_s
    assert more == pytest.approx(2 * 20 * 40 / 1000)  # the teacher's logits again


def test_gradients_are_reduced_and_weights_gathered_once_a_step():
    two = step_time.update(workload(layout=Layout(data=2)), DEVICE, FOUR[:2])
    # Of 316 float32 gradients and 316 weights of 2 bytes, half goes over the link.
    assert two.communication_s == pytest.approx(316 * 6 / 2 / 50, abs=1e-4)
    assert step_time.update(workload(), DEVICE, FOUR).communication_s == 0


def test_sharded_weights_are_gathered_every_micro_batch():
    layout = Layout(fsdp=2, student="sharded")
    found = step_time.update(workload(layout=layout), DEVICE, FOUR[:2])
    # One micro-batch of 2 rows: weights gathered forward and backward, gradients scattered.
    assert found.communication_s == pytest.approx((2 * 2 + 4) * 316 / 2 / 50, abs=1e-3)


def test_beyond_a_node_its_ports_are_the_limit():
    assert step_time.rate(2, DEVICE) == 50
    assert step_time.rate(4, DEVICE) == 10  # two ports of 5


def test_a_step_adds_up():
    step = step_time.step_time(workload(), DEVICE)
    assert [stage.name for stage in step.stages] == ["rollout", "score", "update"]
    assert step.tokens == 20
    assert step.lower_bound_s == pytest.approx(sum(stage.lower_bound_s for stage in step.stages))
    assert step.expected_s > step.lower_bound_s
    assert step.days == pytest.approx(10 * step.expected_s / 86400)
    spread = step_time.step_time(
        workload(), DEVICE, mean_response=3
    )  # 1.25, 2.5, 3.75, 5 rounded up
    assert spread.tokens == 2 + 3 + 4 + 5


def test_the_papers_small_student_on_four_h200():
    """The floors of generation that were worked out for 4 x 64 rows of 200 + 7168 tokens: 5.1 + 11.6 s."""
    from opd_jax import hardware
    from opd_jax.models import catalog

    small = catalog.find("Qwen/Qwen2.5-Math-1.5B")
    paper = workload(
        student=small.model, batch=256, slots=256, prompt=200, response=7168, layout=Layout(data=4)
    )
    found = step_time.rollout(paper, hardware.find("h200"), np.full(64, 7168))
    assert found.memory_s == pytest.approx(5.1 + 11.6, abs=0.1)
    assert found.latency_s == pytest.approx(5.6, abs=0.1)  # 392 kernels of 2 us a token
