"""Runs that are killed or asked to end go on as if nothing had happened; the long lanes are in faults.py."""

import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from opd_jax import train, workdir
from opd_jax.errors import Interrupted, PlanError, WorkdirError
from opd_jax.training.step import Step
from opd_jax.workdir.stop import AGAIN, Stop
from tests.support import faulty
from tests.support.lanes import slow


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> dict[str, object]:
    """What a run that nothing happens to ends with."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train.run(faulty.config(), str(folder), command=[])
    return faulty.state_of(folder)


def go_on(folder: pathlib.Path) -> None:
    train.run(faulty.config(), str(folder), command=[])


@pytest.mark.slow
def test_a_process_killed_in_the_midst_of_a_save_loses_nothing(wanted, tmp_path):
    status, said = faulty.finish(tmp_path / "run", fault="kill:seal:4", base=faulty.QUICK)
    assert status == -signal.SIGKILL, said
    left = [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()]
    assert any("orbax-checkpoint-tmp" in name for name in left)
    go_on(tmp_path / "run")
    faulty.assert_same(tmp_path / "run", wanted)
    left = {f.name for f in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"6", "8"}  # checkpoint.keep=2, and nothing of what was begun


@pytest.mark.slow
def test_a_process_killed_where_its_schedules_change_loses_nothing(tmp_path):
    """At the rise of the horizon, with a candidate of a jump in place, and while the student plans."""
    base = faulty.CHANGING
    status, said = faulty.finish(tmp_path / "plain", base=base)
    assert status == 0, said
    wanted = faulty.state_of(tmp_path / "plain")
    budgets = [row["rollout/horizon"] for row in wanted["metrics"][1:]]  # type: ignore[index]
    assert budgets == [20, 20, 40, 40, 80, 80, 80, 80]
    # Steps 4, 4 (the sixth answer after two to each of the jumps before) and 5.
    for point, count in (("horizon", 4), ("jump", 6), ("harness", 5)):
        folder = tmp_path / point
        status, said = faulty.finish(folder, fault=f"kill:{point}:{count}", base=base)
        assert status == -signal.SIGKILL, said
        status, said = faulty.finish(folder, base=base)
        assert status == 0, said
        faulty.assert_same(folder, wanted)


@pytest.mark.slow
def test_a_process_asked_to_end_saves_its_step_and_says_so(wanted, tmp_path):
    status, said = faulty.finish(tmp_path / "run", fault="term:update:3", base=faulty.QUICK)
    assert status == AGAIN, said
    assert said.splitlines()[-1] == (
        f"SIGTERM: step 3 is saved in {tmp_path / 'run'}; run the same command again to go on"
    )
    assert not (tmp_path / "run" / "eval" / "3").exists()  # it is due, and left to the resumed run
    go_on(tmp_path / "run")
    faulty.assert_same(tmp_path / "run", wanted)


@pytest.mark.slow
@pytest.mark.parametrize("when", [0, 4])
def test_a_wish_between_or_before_the_steps(wanted, tmp_path, monkeypatch, when):
    stop = Stop(reason=None if when else "SIGINT")
    original = Step.__call__

    def step(self, number, *args, **kwargs):
        if number == when:
            stop.reason = "SIGINT"
        return original(self, number, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", step)
        says = "SIGINT: step 4 is saved" if when else "SIGINT: ended before anything was loaded"
        with pytest.raises(Interrupted, match=says):
            train.run(faulty.config(), str(tmp_path / "run"), command=[], stop=stop)
    if when:
        go_on(tmp_path / "run")
        faulty.assert_same(tmp_path / "run", wanted)
    else:
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_deadline_ends_the_run_before_it(tmp_path):
    config = faulty.config(steps=100)
    config.checkpoint.deadline_minutes = 1e-6
    with pytest.raises(Interrupted, match=r"deadline in 0 s: step 1 is saved"):
        train.run(config, str(tmp_path / "run"), command=[])
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 1]


LISTENER = """
import sys, time
from opd_jax.workdir.stop import listen
stop = listen()
stop.grace_s = float(sys.argv[1])
print("ready", flush=True)
end = time.monotonic() + 20
while stop.reason is None and time.monotonic() < end:
    time.sleep(0.01)
print(stop.reason, flush=True)
time.sleep(float(sys.argv[2]))  # the step in hand
"""


def listener(grace: float, busy: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER, str(grace), str(busy)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=faulty.ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.short
@pytest.mark.parametrize("number", [signal.SIGTERM, *slow(signal.SIGINT)])
def test_the_first_signal_is_a_wish(number):
    process = listener(20, 0)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert number.name in said.splitlines()


@pytest.mark.slow
@pytest.mark.short
def test_the_second_signal_ends_the_process_and_its_echo_does_not():
    process = listener(20, 20)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # the same Ctrl-C, passed on
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == AGAIN
    assert "SIGTERM again: ended at once; run the same command again" in said


@pytest.mark.slow
@pytest.mark.short
def test_what_takes_longer_than_the_grace_is_left():
    process = listener(0.2, 20)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == AGAIN
    assert "took more than 0.2 s" in said


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(tmp_path, wanted, capsys):
    folder = tmp_path / "run"
    go_on(folder)
    (file,) = [f for f in (folder / "checkpoints" / "8" / "data").glob("*.json")]
    file.write_text(file.read_text() + " ")
    go_on(folder)
    said = capsys.readouterr().out
    assert (
        "warning: checkpoint 8 is damaged (data/process_0-of-1.json has changed since it was written"
        in said
    )
    assert "resumed at step 6" in said
    assert (folder / "set_aside" / "checkpoint-8-1" / "manifest.json").is_file()
    faulty.assert_same(folder, wanted)


def test_lines_are_cut_in_place_however_they_are_torn(tmp_path):
    file = tmp_path / "lines.jsonl"
    whole = b'{"step": 1, "x": "\xe2\x80\xa8"}\n{"step": 2}\n'
    for torn in (b'{"step": 3}\n', b'{"step": 2', b"\0\0\0\n", b"[2]\n", b'{"x": 1}\n', b"\xff\n"):
        file.write_bytes(whole + torn + b'{"step": 1}\n')
        workdir.Lines(file, resume_step=2).close()
        assert file.read_bytes() == whole


@pytest.mark.slow
def test_a_disk_without_room_is_refused_before_the_run_and_before_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr("opd_jax.checkpoint.manifest.free_bytes", lambda path: 2**20)
    with pytest.raises(
        WorkdirError, match=r"a run with checkpoint.keep=2 needs .* 0\.00 free; make room"
    ):
        go_on(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    rooms = iter([2**40] * 3 + [0] * 100)
    monkeypatch.setattr("opd_jax.checkpoint.manifest.free_bytes", lambda path: next(rooms))
    with pytest.raises(WorkdirError, match=r"checkpoint \d needs"):
        go_on(tmp_path / "run")
    monkeypatch.undo()
    left = sorted(int(f.name) for f in (tmp_path / "run" / "checkpoints").iterdir())
    assert left[0] == 2
    assert os.path.exists(tmp_path / "run" / "metrics.jsonl")


@pytest.mark.slow
def test_a_workdir_that_turns_read_only_ends_the_run_in_one_line(tmp_path, wanted, monkeypatch):
    original, calls = workdir.Lines.write, []

    def write(self, row):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        original(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(workdir.Lines, "write", write)
        says = (
            r"cannot be written any more \(Read-only file system; .* free\); checkpoint 2 is whole"
        )
        with pytest.raises(WorkdirError, match=says):
            go_on(tmp_path / "run")
    go_on(tmp_path / "run")
    faulty.assert_same(tmp_path / "run", wanted)


@pytest.mark.slow
def test_a_device_out_of_memory_is_answered_with_the_plan_and_the_fields(tmp_path, monkeypatch):
    def update(*_, **__):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456789 bytes."
        )

    monkeypatch.setattr(Step, "_start_updates", update)
    with pytest.raises(PlanError) as raised:
        go_on(tmp_path / "run")
    text = str(raised.value)
    assert text.startswith("out of device memory in update (RESOURCE_EXHAUSTED: Out of memory")
    assert "planned were" in text
    assert re.search(r"\): set --config\.[\w.]+=\w+", text), text
    assert "\n" not in text


@pytest.mark.slow
def test_a_config_that_differs_is_refused_shown_and_taken_when_told(tmp_path):
    go_on(tmp_path / "run")
    config = faulty.config(steps=9)
    config.optim.learning_rate *= 2
    with pytest.raises(
        WorkdirError, match=r"optim.learning_rate: .* there, .* now.*--accept_changes"
    ):
        train.run(config, str(tmp_path / "run"), command=[])
    train.run(config, str(tmp_path / "run"), command=[], accept_changes=True)
    train.run(config, str(tmp_path / "run"), command=[])  # is now the run's own
    (change,) = json.loads((tmp_path / "run" / "run.json").read_text())["changes"]
    assert change["fields"][0].startswith("optim.learning_rate: ")
