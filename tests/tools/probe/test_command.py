"""What a probe starts from: a run's checkpoint, overrides, the command; and what it refuses."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import opd
from opd_jax import models
from opd_jax.config.validate import validate
from opd_jax.errors import ConfigError, DataError, OpdError, WorkdirError
from opd_jax.tools import probe
from opd_jax.tools.probe import workload
from tests.support.lanes import slow
from tests.support.paths import ROOT
from tests.tools.probe.conftest import questions


@pytest.mark.parametrize(("step", "taken"), [(None, 10), (2, 2)])
def test_the_student_of_a_run(run, step, taken):
    config = opd.get_config()
    config.student.path = "/nowhere"  # the run knows better
    config.scoring.overlap_top_k = 4
    made = workload.make_plan(config, folder=str(run), step=step)
    params, found = workload.load_student(made)
    _, before = models.load(made.config.student.path)
    assert found == taken
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + taken), params, before)


def test_the_config_of_a_run_lacks_what_is_new_and_takes_overrides(run, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    kept = json.loads((run / "config.json").read_text())
    del kept["rollout"]["slots"]
    kept["rollout"]["temperature"] = 0.5
    kept["scoring"]["mask_first"] = ["<", "think"]
    kept["loss"]["forgotten"] = 1
    kept["teacher"] |= {"path": "/models/student", "follow": "live"}
    (old / "config.json").write_text(json.dumps(kept))
    config = probe.config_of_run(str(old), {"probe.depths": (3, 4), "seed": 7})
    assert config.rollout.temperature == 0.5
    assert config.scoring.mask_first == ("<", "think")
    assert (config.probe.problems, config.probe.depths, config.seed) == (64, (3, 4), 7)
    assert config.teacher.path == "student"  # not the folder that it stood for
    assert "forgotten" not in config.loss
    validate(config)


@pytest.mark.parametrize(
    ("name", "fields", "arguments", "error", "says"),
    [
        ("standalone", {}, {}, ConfigError, "probe 'standalone' is not known"),
        ("continuation", {"probe.depths": (24,)}, {}, ConfigError, "probe.depths has 24"),
        ("pair", {"probe.depths": (0,)}, {}, ConfigError, "probe.depths=(0,)"),
        ("pair", {"probe.depths": (4, 4)}, {}, ConfigError, "probe.depths=(4, 4)"),
        ("pair", {"probe.depths": ("a",)}, {}, ConfigError, "probe.depths=('a',)"),
        ("pair", {"probe.problems": 0}, {}, ConfigError, "probe.problems=0"),
        ("pair", {"probe.batch": 0}, {}, ConfigError, "probe.batch=0"),
        ("pair", {"teacher.path": ""}, {}, ConfigError, "--config.teacher.path=DIR"),
        ("pair", {}, {"step": 3}, ConfigError, "--workdir=DIR"),
        ("pair", {}, {"folder": "/nowhere"}, WorkdirError, "'/nowhere' does not exist"),
        ("pair", {}, {"teachers": ["/nowhere"]}, OpdError, "'/nowhere' does not exist"),
        (
            "continuation",
            {},
            {"teachers": ["a", "b"]},
            ConfigError,
            "2 teachers, but continuation takes one",
        ),
        ("pair", {"rollout.max_response_tokens": 41}, {}, ConfigError, "80 positions"),
        ("pair", {"rollout.max_prompt_tokens": 3}, {}, DataError, "max_prompt_tokens="),
        ("pair", {}, {"out": "report.txt"}, ConfigError, "ends in .json"),
        ("pair", {}, {"out": "/dev/null/x.json"}, WorkdirError, "cannot be written"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(
    small, monkeypatch, name, fields, arguments, error, says
):
    module = sys.modules[probe.run.__module__]  # the package has a function of the module's name
    monkeypatch.setattr(module, "load_student", lambda plan: pytest.fail("weights were read"))
    for field, value in fields.items():
        section, key = field.split(".")
        with small.ignore_type():
            small[section][key] = value
    with pytest.raises(error) as raised:
        probe.run(name, small, command=[], **arguments)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_report_is_not_written_over(small, tmp_path):
    file = tmp_path / "report.json"
    file.write_text("thesis")
    with pytest.raises(WorkdirError, match="exists already"):
        probe.run("pair", small, out=str(file), command=[])
    assert file.read_text() == "thesis"


def test_a_problem_that_a_second_teacher_has_no_room_for_is_named(small, folders, tmp_path):
    """Its template is longer by two letters; its own setup leaves the problem out, the first's not."""
    small.data.train = questions(tmp_path / "mixed.jsonl")
    with (tmp_path / "mixed.jsonl").open("a") as file:
        file.write(json.dumps({"problem": "7" * 40, "answer": "7"}) + "\n")
    small.rollout.max_prompt_tokens, small.rollout.max_response_tokens = 42, 38
    small.data.bad_rows, small.probe.problems = "skip", 10
    both = [str(folders / "teacher"), str(folders / "other")]
    assert len(workload.make_plan(small, teachers=both[:1]).problems) == 10
    with pytest.raises(DataError, match=r"mixed-10: the teacher's prompt has 44 .*42 .*other\)"):
        workload.make_plan(small, teachers=both)


def test_a_moving_average_of_a_run_is_not_probed(run):
    config = opd.get_config()
    config.teacher.path, config.teacher.follow = "student", "average"
    with pytest.raises(ConfigError, match=r"teacher\.follow=average"):
        workload.make_plan(config, folder=str(run))


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "probe.py"), *arguments],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 2, "a name is missing, wanted pair or continuation"),
        *slow(
            (["pear"], 2, "did you mean 'pair'?"),
            (["pair", "more"], 2, "got 'more', wanted flags only"),
        ),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, status, says):
    done = command(*arguments)
    assert done.returncode == status
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


@pytest.mark.slow
def test_overrides_count_on_top_of_the_config_of_the_run(run):
    """The run has no teacher and 192 tokens; both are told, so its config was read."""
    done = command("continuation", f"--workdir={run}", "--config.probe.depths=5,192")
    assert (done.returncode, done.stderr[:7]) == (1, "error: ")
    assert "teacher.path=''" in done.stderr
    done = command(
        "continuation", f"--workdir={run}", "--config.probe.depths=5,192",
        "--config.teacher.path=student",
    )  # fmt: skip
    assert done.returncode == 1
    assert "probe.depths has 192, which leaves nothing to continue" in done.stderr
    assert "rollout.max_response_tokens=192" in done.stderr
