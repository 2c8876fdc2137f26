"""Reading traces: time of one's own, spans within steps, scopes; and runs that are traced."""

import json

import jax
import pytest

from opd_jax import train
from opd_jax.errors import WorkdirError
from opd_jax.metrics import tracing
from opd_jax.models.flops import Work
from opd_jax.tools.bench.ceilings import Ceilings
from opd_jax.tools.profile import trace
from opd_jax.tools.profile.run import lengths, scope_table, stage_table, works
from opd_jax.tools.profile.trace import Operation, Span, Trace
from tests.support.plan_small import workload
from tests.support.small_run import small

NS = 1e9


def test_a_loop_does_not_count_its_body():
    loop, body, other = ("jit_f", "while"), ("jit_f", "fusion"), ("jit_f", "dot")
    # The loop runs 0 to 10 s and calls the body 1-4 and 5-7; within the first a product, 2-3.
    ran = [(5, 7, body), (0, 10, loop), (1, 4, body), (2, 3, other), (11, 12, other)]
    found = trace.own_time([(a * NS, b * NS, key) for a, b, key in ran])
    assert found == [(loop, 5.0), (body, 2.0), (other, 1.0), (body, 2.0), (other, 1.0)]


def test_events_that_end_late_are_cut_where_their_parent_ends():
    found = trace.own_time([(0, 2 * NS, ("f", "a")), (1 * NS, 3 * NS, ("f", "b"))])
    assert found == [(("f", "a"), 1.0), (("f", "b"), 2.0)]


def test_stages_count_inside_steps_alone():
    steps = [Span("step", 0, 10 * NS), Span("step", 20 * NS, 30 * NS)]
    spans = [
        *steps, Span("rollout", 0, 4 * NS), Span("rollout", 21 * NS, 23 * NS),
        Span("update", 5 * NS, 9 * NS), Span("score", 12 * NS, 13 * NS),  # between two steps
    ]  # fmt: skip
    assert trace.within(steps, spans) == {"rollout": 6.0, "update": 4.0}


OPERATIONS = [
    Operation("jit_decode_chunk", "dot.1", 8, 3.0),
    Operation("jit_add_gradient", "fusion", 2, 2.0),
    Operation("jit_add_gradient", "copy", 2, 1.0),
    Operation("jit_random_bits", "rng", 2, 0.5),
]


def test_programs_belong_to_stages():
    assert trace.by_stage(OPERATIONS) == {"rollout": 3.0, "update": 3.0, "other": 0.5}
    scopes = {"jit_add_gradient": {"fusion": "mlp"}}
    assert trace.by_scope(OPERATIONS, scopes) == {
        ("rollout", "-"): 3.0, ("update", "mlp"): 2.0, ("update", "-"): 1.0, ("other", "-"): 0.5,
    }  # fmt: skip


def test_communication_is_a_scope_of_its_own_wherever_it_happens():
    names = ["all-gather.13", "reduce_scatter.109", "all-reduce-start", "collective-permute.2"]
    moved = [Operation("jit_add_gradient", name, 1, 1.0) for name in names]
    moved += [
        Operation("jit__summed", "reduce_scatter.1", 1, 1.0),
        Operation("jit__compute", "all_gather", 1, 1.0),
    ]
    scopes = {"jit_add_gradient": {"all-gather.13": "mlp"}}
    assert trace.by_scope(moved, scopes) == {("update", "communication"): 6.0}
    assert trace.by_stage(moved) == {"update": 6.0}
    assert trace.scope_of(Operation("jit_f", "reduce.1", 1, 1.0), {}) == "-"


def test_scopes_come_from_the_compiled_text():
    hlo = (
        'ROOT %dot.3 = f32[2]{0} dot(%a, %b), metadata={op_name="jit(f)/while/body/Layer/mlp/up/dot"}\n'
        '  %exp = f32[2]{0} exp(%c), metadata={op_name="jit(f)/Layer/attention/attend/exp"}\n'
        '  q.1 = f32[2]{0} add(%c), metadata={op_name="jit(f)/Layer/attention/query/add"}\n'
        '  %iota = s32[2]{0} iota(), metadata={op_name="jit(f)/iota"}\n  %bare = f32[] add(%c)\n'
    )
    assert trace.scopes_of(hlo) == {
        "dot.3": "mlp", "exp": "attend", "q.1": "attention", "iota": "-",
    }  # fmt: skip


def test_the_table_of_stages():
    found = Trace(2, 10.0, {"rollout": 6.0, "update": 3.0}, OPERATIONS)
    limits = Ceilings(bytes_per_s=10e9, flops_per_s=100e9)
    text = stage_table(found, {"rollout": Work(60e9, 30e9)}, limits)
    rows = [line.split() for line in text.splitlines()]
    # A step: 3 s; 30 G of operations at 100 G/s and 15 GB at 10 GB/s would take 0.3 and 1.5 s.
    assert rows[2] == ["rollout", "3.000", "60.0%", "1.500", "30.0", "10.0%", "15.0", "50.0%"]
    assert rows[3] == ["update", "1.500", "30.0%", "1.500", "-", "-", "-", "-"]
    assert rows[4][:3] == ["rest", "0.500", "10.0%"]
    assert "jit" not in scope_table(found, {})


def test_work_is_counted_from_what_was_really_generated(tmp_path):
    rows = [
        {"step": 1, "prompt_ids": [1], "response_ids": [1]},
        {"step": 2, "prompt_ids": [1, 2, 3], "response_ids": [1, 2]},
        {"step": 2, "prompt_ids": [1, 2], "response_ids": [1]},
    ]
    file = tmp_path / "rollouts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = lengths(file, 2)
    assert found == {2: [(3, 2), (2, 1)]}
    counted = works(workload(), found)
    # Score: rows of 5 and 3 through two models of 280 weights; pairs 15 + 6, 32 operations each.
    assert counted["score"].flops == 2 * (2 * 280 * 8 + 32 * 21)
    assert counted["update"].flops == 3 * (2 * 280 * 8 + 32 * 21)
    # Rollout: prefill of 3 and 2 (pairs 6 + 3), then 2 + 1 tokens that see 3, 4 and 2 positions.
    assert counted["rollout"].flops == 2 * 240 * 5 + 32 * 9 + 2 * 280 * 3 + 32 * 9


def test_no_trace_is_an_error_of_one_line(tmp_path):
    with pytest.raises(WorkdirError, match="has no trace; run with"):
        trace.newest(tmp_path)


def test_the_tracer_stops_where_a_step_fails(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *a, **k: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))

    class Section:
        start_step, steps = 2, 2

    def tracer():
        return tracing.Tracer(tmp_path, Section, memory=lambda: 0.0)

    ours = tracer()
    for number in (1, 2, 3, 4):
        with ours.step(number):
            calls.append(number)
    assert calls == [1, "start", 2, 3, "stop", 4]
    calls.clear()
    with pytest.raises(ValueError, match="boom"), tracer().step(2):
        raise ValueError("boom")
    assert calls == ["start", "stop"]


def test_the_tracer_goes_over_its_steps_again(tmp_path, monkeypatch):
    """A rollback of the guard may lead back before them."""
    begun = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: begun.append(1))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    section = type("Section", (), {"start_step": 2, "steps": 1})
    tracer = tracing.Tracer(tmp_path, section, memory=lambda: 0.0)
    for number in (1, 2, 3, 1, 2, 3):
        with tracer.step(number):
            pass
    assert len(begun) == 2


@pytest.mark.slow
def test_stages_of_a_traced_run_add_up_to_its_steps(folders, tmp_path):
    config = small(folders)
    config.steps, config.eval.data = 4, ""
    config.profile.start_step, config.profile.steps = 3, 2
    train.run(config, str(tmp_path / "run"), command=["test"])
    folder = tmp_path / "run" / "profile"
    found = trace.read(trace.newest(folder))
    assert found.count == 2
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    told = sum(row["time/step_s"] for row in rows if row["step"] in (3, 4))
    assert told <= found.steps * 1.001  # the run's clock is read within the span of a step
    assert found.steps < 3 * told
    assert set(found.stages) == {"rollout", "score", "read", "rows", "update"}
    assert found.rest >= 0  # stages lie within steps and do not overlap
    busy = trace.by_stage(found.operations)
    assert min(busy["rollout"], busy["score"], busy["update"]) > 0
    samples = [json.loads(line) for line in (folder / "memory.jsonl").read_text().splitlines()]
    assert samples
    assert all(row["bytes"] > 2**20 for row in samples)
