"""Reading workdirs: what is torn, strange or missing becomes a sentence, never a traceback."""

import json
import math

import numpy as np
import pytest

from opd_jax.errors import WorkdirError
from opd_jax.report.read import names, read, read_all
from tests.support.workdirs import collapsing, healthy, make, write

pytestmark = pytest.mark.short


def test_a_torn_last_line_is_left_out(tmp_path):
    folder = make(tmp_path / "run", healthy(10))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "rollout/trunc')
    run = read(folder)
    assert (run.lines, run.last) == (10, 10)
    assert any("last line is not whole" in note for note in run.notes)


@pytest.mark.parametrize(
    "line", [b"nonsense", b"[1, 2]", b'{"loss/total": 1}', b'{"step": "2"}', b'{"step": true}',
             b"\xff\xfe\x00", b"[" * 100_000, b'{"step": -1}'],
)  # fmt: skip
def test_a_broken_line_is_counted(tmp_path, line):
    folder = make(tmp_path / "run", [])
    good = [json.dumps({"step": i, "loss/total": float(i)}).encode() for i in (1, 2)]
    (folder / "metrics.jsonl").write_bytes(b"\n".join([good[0], line, good[1], b""]))
    run = read(folder)
    assert run.lines == 2
    assert run.curves["loss/total"].value_N.tolist() == [1.0, 2.0]
    assert any("1 lines cannot be read" in note for note in run.notes)


def test_what_is_no_finite_number(tmp_path):
    rows = [{"step": 1, "a/b": math.nan, "a/c": "x"}, {"step": 2, "a/b": math.inf, "a/c": 1},
            {"step": 3, "a/b": 10**400, "a/c": None}, {"step": 4, "a/b": 2.0, "a/c": True}]  # fmt: skip
    run = read(make(tmp_path / "run", rows))
    np.testing.assert_array_equal(run.curves["a/b"].value_N, [np.nan, np.nan, np.nan, 2.0])
    assert run.curves["a/c"].step_N.tolist() == [2]
    assert any("a/b" in note and "gaps" in note for note in run.notes)
    assert any("a/c is no number on 3 lines" in note for note in run.notes)


def test_steps_are_sorted_and_the_later_line_counts(tmp_path):
    rows = [{"step": s, "a/b": v} for s, v in ((2, 2.0), (1, 1.0), (2, 20.0))]
    found = read(make(tmp_path / "run", rows)).curves["a/b"]
    assert found.step_N.tolist() == [1, 2]
    assert found.value_N.tolist() == [1.0, 20.0]


def test_an_empty_run(tmp_path):
    folder = make(tmp_path / "run", [])
    assert "metrics.jsonl is empty: there are no curves" in read(folder).notes
    (folder / "metrics.jsonl").unlink()
    run = read(folder)
    assert "no metrics.jsonl: there are no curves" in run.notes
    assert "nothing to judge" in run.verdict.text
    assert (run.lines, run.curves, run.answers) == (0, {}, {})


def test_a_folder_that_is_no_run(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(WorkdirError, match=r"give the folder that train\.py printed first"):
            read_all([str(folder)])
    (tmp_path / "config.json").write_text('{"student"')
    with pytest.raises(WorkdirError, match="cannot be read"):
        read_all([str(tmp_path)])


def test_broken_files_beside_the_log(tmp_path):
    folder = make(
        tmp_path / "run", healthy(3), answers={"3/tiny": {"accuracy": 0.5, "x": math.nan}}
    )
    (folder / "run.json").write_text("{")
    (folder / "plan.json").write_text("[]")
    (folder / "eval" / "3" / "bad.json").write_bytes(b"\xff")
    run = read(folder)
    assert (run.info, run.plan) == ({}, {})
    assert run.answers == {"3": {"tiny": {"accuracy": 0.5}}}
    for name in ("run.json", "plan.json", "bad.json"):
        assert f"{name} cannot be read and is left out" in run.notes


def test_an_abrupt_transition_is_found_where_it_is(tmp_path):
    verdict = read(make(tmp_path / "run", collapsing(begin=20))).verdict
    assert verdict.onset is not None
    assert verdict.alarm is not None
    assert 20 <= verdict.onset <= verdict.alarm < 40
    assert verdict.text.startswith(f"Abrupt transition: since about step {verdict.onset}")
    # 0.02 + 0.96 x 19/20 = 0.93 at step 39 is the first above 0.9; 0.884 at step 38.
    assert "first above 90% at step 39" in verdict.text


def test_health_is_no_transition_and_few_steps_are_no_verdict(tmp_path):
    assert read(make(tmp_path / "a", healthy(60))).verdict.text == (
        "No abrupt transition in 60 steps with rollouts."
    )
    assert "Too short" in read(make(tmp_path / "b", healthy(4))).verdict.text


def test_what_the_guard_did(tmp_path):
    rows = healthy(9)
    rows[2] |= {"guard/rolled_back_from": 7.0, "guard/rolled_back_to": 2.0, "guard/rollbacks": 1.0,
                "guard/alarm": 1.0, "guard/onset": 4.0}  # fmt: skip
    for row in rows[3:6]:
        row |= {"guard/beta_kl": 0.5, "guard/lambda_gold": 1.0}
    rows[7] |= {"guard/recovered": 1.0, "guard/masking": 0.0}
    rows[8] |= {"guard/stopped": 1.0}
    run = read(make(tmp_path / "run", rows))
    assert [(event.step, event.kind) for event in run.events] == [
        (3, "rollback"), (3, "alarm"), (4, "terms"), (8, "masking"), (8, "recovered"), (9, "stop"),
    ]  # fmt: skip
    assert run.events[0].text == "went back from step 7 to step 2, rollback 1"
    assert run.events[1].text == "alarm: collapse since about step 4"
    assert run.events[2].text == "beta_kl=0.5, lambda_gold=1 from the next step"


def test_a_workdir_of_an_evaluation(tmp_path):
    folder = make(tmp_path / "run", [])
    (folder / "metrics.jsonl").unlink()
    found = {"math500": {"accuracy": 0.5, "stderr": 0.1, "metric": "pass@1"}}
    (folder / "results.json").write_text(json.dumps({"results": found}))
    run = read(folder)
    assert run.verdict.text == "An evaluation, without a log of training."
    assert run.answers == {"this evaluation": {"math500": {"accuracy": 0.5, "stderr": 0.1}}}


def test_names_tell_runs_apart(tmp_path):
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    assert names(paths) == ["x/run", "y/run"]
    assert names(paths[:1]) == ["run"]
    for path in paths:
        make(path, healthy(2))
    twice = [str(path) for path in (*paths, paths[0])]
    assert [run.name for run in read_all(twice)] == ["x/run", "y/run"]


def test_a_config_of_another_time(tmp_path):
    folder = make(tmp_path / "run", collapsing())
    write(
        folder / "config.json", [{"student": {"path": "x"}, "rollout": {"samples_per_prompt": 4}}]
    )
    assert read(folder).verdict.onset is not None


@pytest.mark.parametrize(
    "changes", [{"rollout": {"samples_per_prompt": -1}}, {"guard": {"false_alarm_every": 1}},
                {"guard": {"false_alarm_every": 0}}, {"rollout": 7}, {"guard": {"memory": "x"}}],
)  # fmt: skip
def test_a_config_that_makes_no_sense(tmp_path, changes):
    folder = make(tmp_path / "run", collapsing())
    write(folder / "config.json", [{"student": {"path": "x"}} | changes])
    assert read(folder).verdict.onset is not None
