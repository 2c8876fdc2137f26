"""Several real processes: the same run as one, killed and resumed; what is lost or differs is said."""

import inspect
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from opd_jax import checkpoint, models
from opd_jax import config as configuration
from opd_jax.errors import ConfigError, ProcessError
from opd_jax.models import decoder
from opd_jax.sharding import multihost
from opd_jax.workdir.stop import AGAIN
from tests.support.lanes import slow
from tests.support.paths import ROOT

SMALL = (
    "--config=configs/stable_opd.py:tiny", "--config.rollout.prompts_per_step=3",
    "--config.rollout.samples_per_prompt=3", "--config.rollout.max_response_tokens=48",
    "--config.data.size=64", "--config.data.bad_rows=skip", "--config.eval.problems=5",
    "--config.eval.teacher=False", "--config.eval.every=0", "--config.checkpoint.every=1",
    "--config.log.gradients=2", "--config.optim.microbatch_tokens=200", "--config.checkpoint.keep=10",
)  # fmt: skip


STARTED: list["Started"] = []


@pytest.fixture(autouse=True)
def _nothing_is_left_running():
    yield
    for one in STARTED:
        one.process.kill()
    STARTED.clear()


class Started:
    """A command in a process of its own; what it says goes to a file."""

    def __init__(self, out: pathlib.Path, *arguments: str, devices: int):
        flag = f"--xla_force_host_platform_device_count={devices}"
        # A coordinator of a test is not behind a proxy.
        env = {k: v for k, v in os.environ.items() if "_proxy" not in k.lower()}
        env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag, "PYTHONPATH": str(ROOT)}
        self.file = out
        STARTED.append(self)
        with out.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "launch/train.py", *arguments],
                cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def end(self, timeout: float = 600) -> int:
        """Its exit status."""
        return self.process.wait(timeout)

    @property
    def said(self) -> str:
        return self.file.read_text()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_two(folder: pathlib.Path, *arguments: str, own: tuple[tuple[str, ...], ...] = ((), ())):
    """Two processes of four devices each; `own`: arguments of each."""
    port = free_port()
    return [
        Started(
            folder / f"{time.monotonic_ns()}-{i}.log", *arguments, *own[i],
            f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}", devices=4,
        )
        for i in range(2)
    ]  # fmt: skip


def rows(workdir: pathlib.Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    drop = ("time/", "speed/", "memory/")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(drop)} for line in lines]


def assert_same_runs(got: pathlib.Path, want: pathlib.Path) -> None:
    mine, theirs = rows(got), rows(want)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert a[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (b["step"], name)
    texts = [(folder / "rollouts.jsonl").read_text().splitlines() for folder in (got, want)]
    for a, b in zip(*texts, strict=True):
        assert json.loads(a)["response_ids"] == json.loads(b)["response_ids"]
    student = models.load_config(str(ROOT / "opd_jax/tiny/student"))
    like = decoder.abstract_params(student)
    (_, a), (_, b) = (checkpoint.restore_params(folder, like) for folder in (got, want))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a, b)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    """Three steps of one process with one device."""
    folder = tmp_path_factory.mktemp("alone")
    run = Started(
        folder / "log", *SMALL, "--config.steps=3", f"--workdir={folder / 'run'}", devices=1
    )
    assert run.end() == 0, run.said
    return folder / "run"


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_killed_and_resumed_match_the_run_of_one(alone, tmp_path):
    workdir = tmp_path / "run"
    arguments = (*SMALL, "--config.steps=3", f"--workdir={workdir}")
    pair = start_two(tmp_path, *arguments)
    wait_for(pair, lambda: (workdir / "checkpoints" / "1").is_dir())
    for one in pair:
        one.process.kill()
        one.end()
    assert checkpoint.latest_step(workdir) in (1, 2)
    pair = start_two(tmp_path, *arguments)
    assert [one.end() for one in pair] == [0, 0], pair[0].said + pair[1].said
    assert "resumed at step" in pair[0].said
    assert "step" not in pair[1].said  # one of them speaks
    assert_same_runs(workdir, alone)
    again = Started(  # and one process goes on from what two have left
        tmp_path / "again.log", *SMALL, "--config.steps=4", f"--workdir={workdir}", devices=1
    )
    assert again.end() == 0, again.said


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_lost_ends_the_other(tmp_path, victim):
    workdir = tmp_path / "run"
    pair = start_two(
        tmp_path, *SMALL, "--config.steps=500", "--config.processes.heartbeat_seconds=20",
        f"--workdir={workdir}",
    )  # fmt: skip
    wait_for(pair, lambda: (workdir / "checkpoints" / "1").is_dir())
    pair[victim].process.kill()
    began = time.monotonic()
    assert pair[1 - victim].end(60) == 1
    assert time.monotonic() - began < 60
    assert f"error: {multihost.LOST}" in pair[1 - victim].said.splitlines()
    pair[victim].end()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("requested", [0, 1])
def test_one_that_is_asked_to_end_ends_all_at_the_same_step(alone, tmp_path, requested):
    workdir = tmp_path / "run"
    arguments = (
        *SMALL,
        "--config.checkpoint.every=100",
        "--config.steps=3",
        f"--workdir={workdir}",
    )
    pair = start_two(tmp_path, *arguments)
    wait_for(pair, lambda: (workdir / "eval" / "0").is_dir())
    pair[requested].process.terminate()
    assert [one.end() for one in pair] == [AGAIN, AGAIN], pair[0].said + pair[1].said
    for one in pair:
        assert one.said.splitlines()[-1].startswith("SIGTERM: "), one.said
    pair = start_two(tmp_path, *arguments)
    assert [one.end() for one in pair] == [0, 0], pair[0].said + pair[1].said
    assert_same_runs(workdir, alone)


@pytest.mark.long
@pytest.mark.slow
def test_processes_with_other_configs_are_refused_by_all(tmp_path):
    began = time.monotonic()
    pair = start_two(
        tmp_path, *SMALL, f"--workdir={tmp_path / 'run'}",
        own=((), ("--config.optim.learning_rate=0.5",)),
    )  # fmt: skip
    assert [one.end(60) for one in pair] == [1, 1]
    assert time.monotonic() - began < 60
    for one in pair:
        (line,) = [line for line in one.said.splitlines() if line.startswith("error:")]
        assert (
            "process 1 differs from process 0 in: optim.learning_rate (0.0002 in process 0" in line
        )
    assert not (tmp_path / "run").exists()


def wait_for(pair: list[Started], ready, timeout: float = 500) -> None:
    end = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < end, "".join(one.said for one in pair)
        assert all(one.process.poll() is None for one in pair), "".join(one.said for one in pair)
        time.sleep(0.1)


@pytest.mark.short
def test_a_coordinator_that_does_not_answer_is_refused():
    port = free_port()
    with pytest.raises(
        ProcessError,
        match=rf"--coordinator=127.0.0.1:{port} does not answer within 0.5 s .*connect_seconds",
    ):
        multihost.start(f"127.0.0.1:{port}", 2, 1, connect_s=0.5)


@pytest.mark.short
def test_the_limits_are_those_of_jax(monkeypatch):
    """JAX's own defaults, which its function names; a cold start on a network disk takes minutes."""
    parameters = inspect.signature(jax.distributed.initialize).parameters
    assert parameters["initialization_timeout"].default <= multihost.CONNECT_S
    assert parameters["heartbeat_timeout_seconds"].default <= multihost.HEARTBEAT_S
    processes = configuration.default().processes
    assert processes.connect_seconds == multihost.CONNECT_S
    assert processes.heartbeat_seconds == multihost.HEARTBEAT_S
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **more: given.update(more))
    multihost.start("127.0.0.1:1", 2, 0, connect_s=1.5, heartbeat_s=7)
    assert given["initialization_timeout"] == 2
    assert given["heartbeat_timeout_seconds"] == given["shutdown_timeout_seconds"] == 7


@pytest.mark.short
def test_a_jax_without_the_key_value_store_is_refused(monkeypatch):
    monkeypatch.delattr("jax._src.distributed.global_state")
    with pytest.raises(ProcessError, match=r"has no key-value store .* or start one process"):
        multihost._client()


@pytest.mark.slow
def test_limits_that_cannot_be_are_refused_before_anything_connects(tmp_path):
    one = Started(
        tmp_path / "log", *SMALL, "--config.processes.heartbeat_seconds=0",
        "--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=1", devices=1,
    )  # fmt: skip
    assert one.end(60) == 1
    assert one.said.startswith(
        "error: processes.heartbeat_seconds=0, wanted a whole number, at least 1; set --config."
    )


@pytest.mark.slow
def test_a_coordinator_that_accepts_and_says_nothing_ends_the_process(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        one = Started(
            tmp_path / "log", *SMALL, f"--workdir={tmp_path / 'run'}",
            "--config.processes.connect_seconds=5", "--num_processes=2", "--process_id=1",
            f"--coordinator=127.0.0.1:{silent.getsockname()[1]}", devices=1,
        )  # fmt: skip
        began = time.monotonic()
        assert one.end(60) == 1
    print(f"silent coordinator: ended after {time.monotonic() - began:.1f} s", one.said[-500:])
    assert f"error: {multihost.LOST}" in one.said.splitlines()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_never_comes_ends_process_0(tmp_path):
    one = Started(
        tmp_path / "log", *SMALL, f"--workdir={tmp_path / 'run'}",
        "--config.processes.connect_seconds=5", "--num_processes=2", "--process_id=0",
        f"--coordinator=127.0.0.1:{free_port()}", devices=1,
    )  # fmt: skip
    assert one.end(60) == 1
    assert f"error: {multihost.LOST}" in one.said.splitlines()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_reported_and_the_run_resumes(tmp_path, victim):
    """SIGSTOP: no error, no end of a connection, and with JAX's limits 100 s until anything happens."""
    workdir = tmp_path / "run"
    arguments = (*SMALL, f"--workdir={workdir}")
    pair = start_two(
        tmp_path, *arguments, "--config.steps=500", "--config.watchdog.action=end",
        "--config.watchdog.factor=2", "--config.watchdog.seconds=5",
    )  # fmt: skip
    wait_for(pair, lambda: (workdir / "checkpoints" / "4").is_dir())
    worker, other = child_of(pair[victim].process.pid), pair[1 - victim]
    os.kill(worker, signal.SIGSTOP)
    began = time.monotonic()
    while "late: step" not in other.said:
        assert time.monotonic() < began + 60, other.said
        time.sleep(0.1)
    seconds = time.monotonic() - began
    assert other.end(60) == AGAIN
    print(f"late after {seconds:.1f} s, ended after {time.monotonic() - began:.1f} s\n{other.said}")
    line = next(line for line in other.said.splitlines() if line.startswith("late: step"))
    assert "s of it in stage " in line
    assert f"; process {1 - victim} on " in line
    assert re.search(rf"late: process {victim} was last heard from \d+ s ago, in ", other.said)
    assert "Thread 0x" in other.said  # the stacks of all threads
    assert "in __call__" in other.said
    os.kill(worker, signal.SIGKILL)
    pair[victim].end()
    last = checkpoint.latest_step(workdir)
    assert last >= 4
    pair = start_two(tmp_path, *arguments, f"--config.steps={last + 1}")
    assert [one.end() for one in pair] == [0, 0], pair[0].said + pair[1].said
    assert f"resumed at step {last}" in pair[0].said


def child_of(pid: int) -> int:
    """The process that does the work: the other one only waits for it."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])


@pytest.mark.short
@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("host:1", 2, None), "--process_id missing"),
        ((None, 2, None), "--coordinator and --process_id missing"),
        (("host", 2, 0), "--coordinator='host' is not the HOST:PORT"),
        (
            ("host:1", 2, 2),
            "--process_id=2 is out of range: with --num_processes=2 it must be 0 to 1",
        ),
    ],
)
def test_flags_that_cannot_be_are_refused(given, says):
    with pytest.raises(ConfigError, match=says):
        multihost.requested(*given)


@pytest.mark.short
@pytest.mark.parametrize(
    ("env", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, False),  # sbatch's own shell
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_launchers_are_found(monkeypatch, env, several):
    for name in (*multihost._LAUNCHERS, "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert multihost.requested(None, None, None) is several
    assert multihost.requested("host:1", 1, 0) is False


@pytest.mark.short
def test_tasks_that_do_not_find_each_other_are_refused(monkeypatch):
    """Else each would be a whole run in one workdir."""
    for name in multihost._LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(ConfigError, match=r"PMI_SIZE=4: .*--num_processes=4"):
        multihost.requested(None, None, None)
    assert multihost.requested("host:1", 4, 0)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")  # srun --mpi=pmi2
    assert multihost.requested(None, None, None)


@pytest.mark.short
@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("evaluate", multihost._LAUNCHERS[0]),
        *slow(*(("evaluate", name) for name in multihost._LAUNCHERS[1:])),
        *slow(("plan", "SLURM_STEP_NUM_TASKS")),
    ],
)
def test_entry_points_of_one_process_refuse_several_tasks(monkeypatch, entry, name, tmp_path):
    for other in multihost._LAUNCHERS:
        monkeypatch.delenv(other, raising=False)
    evaluation = ["--model=opd_jax/tiny/student", f"--workdir={tmp_path / 'evaluation'}"]
    given = evaluation if entry == "evaluate" else []
    done = subprocess.run(
        [sys.executable, f"launch/{entry}.py", *given],
        cwd=ROOT, env=os.environ | {name: "2"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"error: {name}=2: the launcher has started this command 2 times" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.short
def test_one_process_is_told_by_itself():
    assert multihost.from_first(lambda: {"a": 1}) == {"a": 1}
    assert multihost.first()
    assert not multihost.several()
    multihost.agree({"a": 1})


@pytest.mark.short
def test_gpus_of_a_node_go_to_its_only_task(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x2)")
    assert multihost._local_devices() == [0, 1, 2, 3]
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    assert multihost._local_devices() is None
