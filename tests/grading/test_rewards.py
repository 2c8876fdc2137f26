"""Rewards from a user's function: what it may return, and how each fault costs one line and nothing else."""

import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from opd_jax.config.fields import default
from opd_jax.errors import RewardError
from opd_jax.grading.reward_worker import RewardFault, rewards
from opd_jax.grading.rewards import Call, RewardPool, fault_of
from tests.support.paths import ROOT

FUNCTIONS = "tests.support.reward_functions"


def call(problem: str, texts=("a", "bcd"), **row) -> Call:
    return Call(problem, texts, {"id": problem, "problem": problem} | row)


def alive(words: str) -> bool:
    """Whether any process of this session's functions runs this command."""
    found = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True)
    return any(words in line for line in found.stdout.splitlines())


@pytest.mark.parametrize(
    ("result", "want"),
    [
        ([0, 1], [0.0, 1.0]),
        ((0.25, True), [0.25, 1.0]),
        (np.array([0.5, 0.75], np.float32), [0.5, 0.75]),
        (np.array([True, False]), [1.0, 0.0]),
        (iter([0.5, 0.5]), [0.5, 0.5]),
    ],
)
def test_what_a_function_may_return(result, want):
    assert rewards(result, 2) == want


@pytest.mark.parametrize(
    ("result", "says", "sample"),
    [
        ([0.5, float("nan")], "returned nan, wanted a number from 0 to 1", 1),
        ([float("inf"), 0.5], "returned inf, wanted", 0),
        ([0.5, 1.0001], "returned 1.0001, wanted", 1),
        ([-0.1, 0.5], "returned -0.1, wanted", 0),
        (["0.5", 1], "returned '0.5', wanted a number", 0),
        ([None, 1], "returned None, wanted a number", 0),
        ([[0.5], 1], r"returned [0.5], wanted a number", 0),
        ([1j, 1], "returned 1j, wanted a number", 0),
        ("10", "returned '10', wanted a list of 2 numbers", None),
        ({0: 1, 1: 1}, "returned {0: 1, 1: 1}, wanted a list of 2 numbers", None),
        (0.5, "returned 0.5, wanted a list of 2 numbers", None),
        (np.float32(0.5), "0.5), wanted a list of 2 numbers", None),
        (None, "returned None, wanted a list of 2 numbers", None),
        ([1], "returned 1 rewards for 2 rollouts", None),
        (iter(int, 1), "returned more than 2 rewards for 2 rollouts", None),
    ],
)
def test_what_is_no_reward(result, says, sample):
    with pytest.raises(RewardFault) as fault:
        rewards(result, 2)
    assert says in str(fault.value)
    assert fault.value.sample == sample


def test_every_fault_is_one_line_that_names_its_problem_and_costs_no_other_reward(tmp_path):
    names = ["fine", "raise", "exit", "crash", "nan", "text", "few", "many", "high", "none", "hang",
             "hang_with_program", "fine"]  # fmt: skip
    said = {
        "raise": r"raised ZeroDivisionError: division by zero \(.*reward_functions.py, line \d+\)$",
        "exit": "raised SystemExit", "crash": "its process ended before it answered$",
        "nan": "nan, rollout 2 of 2: returned nan, wanted a number from 0 to 1$",
        "text": "text, rollout 1 of 2: returned '0.5'", "few": "returned 1 rewards for 2 rollouts",
        "many": "returned more than 2 rewards", "high": "high, rollout 2 of 2: returned 1.5",
        "none": "returned None", "hang": r"hang: no answer after reward.seconds=0.4$",
        "hang_with_program": "no answer after",
    }  # fmt: skip
    log = tmp_path / "reward.log"
    with RewardPool(f"{FUNCTIONS}:faulty", seconds=0.4, processes=2, log=log) as pool:
        assert pool.start() == ""
        results = pool.rewards([call(name) for name in names])
    for name, result in zip(names, results, strict=True):
        if name == "fine":
            assert result.rewards == [0.25, 1.0]
            assert not result.fault
            continue
        assert result.rewards == [None, None]
        assert re.search(said[name], result.fault), result.fault
        assert f"reward.function={FUNCTIONS}:faulty, problem {name}" in result.fault
        assert "\n" not in result.fault
        assert result.timed_out == name.startswith("hang")
    assert not alive("sleep 600")  # the program of a function that hung has ended with it
    printed = log.read_text()
    assert "ZeroDivisionError" in printed
    assert "Timeout" in printed  # and the line at which the function hung
    assert "time.sleep(600)" in printed or "reward_functions.py" in printed


def test_rewards_do_not_depend_on_the_processes_and_prints_do_not_disturb_them(tmp_path):
    calls = [call(f"p{i}", texts=["x" * i, "y"]) for i in range(5)]
    found = []
    for processes in (1, 3):
        with RewardPool(f"{FUNCTIONS}:short", seconds=20, processes=processes) as pool:
            found.append(pool.rewards(calls))
    assert found[0] == found[1]
    assert found[0][3].rewards == [float(np.float32(0.25)), 0.5]
    log = tmp_path / "reward.log"
    with RewardPool(f"{FUNCTIONS}:talks", seconds=20, log=log) as pool:
        assert pool.rewards([call("p")])[0].rewards == [1.0, 1.0]
    assert "a reward is being worked out" in log.read_text()
    assert "from a program" in log.read_text()


def test_a_row_arrives_as_the_file_has_it():
    rows = {"good": 0.5, "rubric": [{"weight": 3}], "none": None}
    with RewardPool(f"{FUNCTIONS}:by_column", seconds=20) as pool:
        assert pool.rewards([call("p", **rows)])[0].rewards == [0.5, 0.25]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError"),
        (f"{FUNCTIONS}:no_function", "cannot be imported: AttributeError"),
        (f"{FUNCTIONS}:NOT_A_FUNCTION", "is int, not a function"),
    ],
)
def test_a_function_that_is_not_there_is_refused_in_one_line(name, says):
    section = default().reward
    section.function = name
    fault = fault_of(section)
    assert fault.startswith(f"reward.function={name}: {says}")
    assert "wanted module:function" in fault
    assert "\n" not in fault


def test_without_a_function_nothing_is_started():
    assert fault_of(default().reward) == ""


def test_a_closed_pool_ends_a_waiting_call():
    pool = RewardPool(f"{FUNCTIONS}:faulty", seconds=60)
    pool.start()
    pool.close()
    with pytest.raises((RewardError, RuntimeError)):
        pool.rewards([call("fine")])


def test_a_killed_run_leaves_no_process(tmp_path):
    """SIGKILL of the parent: the end of the pipe ends the worker, and the program that it runs."""
    mark = f"sleep 6{os.getpid()}"
    code = f"""
import os, sys, threading
from opd_jax.grading.rewards import Call, RewardPool
pool = RewardPool("{FUNCTIONS}:{{}}".format("sleeps"), seconds=600)
assert pool.start() == ""
print("started", flush=True)
pool.rewards([Call("p", ["a"], {{"id": "p", "command": "{mark}"}})])
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    wait_until(lambda: alive(mark), 20)
    parent.kill()
    parent.wait()
    wait_until(lambda: not alive(mark), 10)


def wait_until(true, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_rubrics_of_the_docs():
    """CITING 4: weights (3, 1) and verdicts (1, 0) make a reward of 0.75."""
    page = pathlib.Path(ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    names: dict = {}
    exec(code[1], names)
    row = {"rubrics": [{"weight": 3, "pattern": "x = 2"}, {"weight": 1, "pattern": "therefore"}]}
    assert names["rubrics"](["so x = 2.", "no"], [row, row]) == [0.75, 0.0]
