"""The watchdog: when a phase is late, what the report says, and how it ends a process."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from opd_jax.errors import AGAIN
from opd_jax.metrics.tracing import current, stage
from opd_jax.workdir import watchdog
from tests.support.paths import ROOT

pytestmark = pytest.mark.short


def section(**changes):
    fields = {"action": "report", "factor": 10.0, "seconds": 60.0, "first_seconds": 3600.0}
    return SimpleNamespace(**(fields | changes))


@pytest.mark.parametrize(
    ("durations", "wanted", "why"),
    [
        ((), 3600.0, "first_seconds"),
        ((100.0,), 3600.0, "first_seconds"),  # the only one so far compiled
        ((100.0, 2.0), 60.0, "watchdog.seconds=60, the median is 2.0 s"),
        ((100.0, 2.0, 9.0, 7.0), 70.0, "10 x the median of 7.0 s"),
    ],
)
def test_the_limit_of_a_phase_by_hand(durations, wanted, why):
    got, reason = watchdog.limit(durations, factor=10.0, least_s=60.0, first_s=3600.0)
    assert got == wanted
    assert why in reason


def test_a_phase_is_reported_when_it_is_late_and_after_each_doubling(monkeypatch):
    now = 0.0
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now))
    said = []
    monkeypatch.setattr(watchdog, "_print", said.append)
    dog = watchdog.Watchdog(section())
    assert dog.late(1e9) is None  # nothing has begun
    for step, end in enumerate((100.0, 107.0, 114.0), start=1):
        dog.begin("step", step)
        now = end
    dog.begin("step", 4)  # at 114 s; its limit is 70 s
    assert dog.late(114 + 69) is None
    with stage("score"):
        report = dog.late(114 + 70)
    assert report is not None
    assert report.startswith(
        "late: step 4 has taken 70 s, 0 s of it in stage score; wanted less than "
    )
    assert "70 s (10 x the median of 7.0 s)" in report
    assert f"pid {os.getpid()}" in report
    assert "process" not in report  # it is alone
    assert dog.late(114 + 139) is None
    assert dog.late(114 + 140) is not None
    assert not said
    now = 300.0
    dog.begin("checkpoint", 4)
    assert said == ["no longer late: step 4 ended after 186 s"]
    assert dog.late(300 + 3599) is None  # the first of its kind
    assert dog.late(300 + 3600).startswith("late: checkpoint at step 4 has taken 3600 s; wanted ")


def test_a_report_names_what_each_other_process_does(monkeypatch):
    """Process 1 is stopped: its progress no longer changes."""
    monkeypatch.setattr(watchdog.multihost, "several", lambda: True)
    monkeypatch.setattr(watchdog.multihost, "index", lambda: 0)
    dog = watchdog.Watchdog(section(first_seconds=5.0))
    published = {0: {"where": "step 1", "count": 9, "ending": False},
                 1: {"where": "stage update of step 1", "count": 3, "ending": False}}  # fmt: skip
    dog.note(published, now=10.0)
    published[0]["count"] = 10
    dog.note(published, now=20.0)
    dog.begin("step", 1)
    report = dog.late(time.monotonic() + 6)
    assert report is not None
    assert "; process 0 on " in report
    seconds = time.monotonic() + 6 - 10
    assert f"process 1 was last heard from {seconds:.0f} s ago, in stage update of step 1" in report
    assert "process 0 was" not in report


def test_the_stage_is_the_innermost_one():
    assert current() is None
    with stage("update"), stage("checkpoint"):
        assert current()[0] == "checkpoint"
    with pytest.raises(ValueError, match="x"), stage("score"):
        raise ValueError("x")
    assert current() is None


RUN = """
import json, sys, threading, time
from types import SimpleNamespace
from opd_jax.metrics.tracing import stage
from opd_jax.workdir.watchdog import Watchdog

def never():
    with stage("update"):
        time.sleep(60)

with Watchdog(SimpleNamespace(**json.loads(sys.argv[1]))) as watchdog:
    for step in range(1, 4):
        watchdog.begin("step", step)
    watchdog.begin("step", 4)
    never()
"""


def stuck(tmp_path, **changes):
    """A process whose step 4 never ends."""
    given = vars(section(seconds=1.0, **changes))
    return subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(given)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
def test_a_stuck_process_ends_with_status_75_and_its_stacks(tmp_path):
    began = time.monotonic()
    process = stuck(tmp_path, action="end")
    _, said = process.communicate(timeout=30)
    assert process.returncode == AGAIN
    assert time.monotonic() - began < 20
    assert "late: step 4 has taken 1 s, 1 s of it in stage update; wanted less than 1 s" in said
    assert "in never" in said  # the stack of the main thread
    assert "watchdog.action=end asks; run the same command again" in said


@pytest.mark.slow
def test_a_report_alone_ends_nothing(tmp_path):
    process = stuck(tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=10)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert said.count("late: step 4 has taken") >= 2  # and after doublings
