"""Several processes as one run: how they start, agree on a config, and exchange host values.

JAX's own runtime (`jax.distributed`) connects them. Every process runs the same program on the same host
data, and the arrays on the devices are sharded (mesh.py). Process 0 decides whatever may differ between
processes (grades, which files exist, the time), broadcasts it, and alone writes files. A single process
skips all of this.
"""

import contextlib
import ctypes
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from opd_jax.errors import AGAIN, ConfigError, ProcessError

CONNECT_S = 300.0  # time limit for all processes to connect at the start
HEARTBEAT_S = 100  # a process without a heartbeat for this long counts as lost
LOST = (
    "another process of the run is lost, or did not connect in time; see its last output, then start all "
    "processes again: with the same --workdir the run continues from its last checkpoint"
)
# Process 0 may be grading a benchmark or downloading a model; the heartbeat detects a lost process.
_BROADCAST_S = 3600
_SUPERVISED = "OPD_JAX_SUPERVISED"
_STOP_KEY = "opd_jax/stop"
_PROGRESS = "opd_jax/progress/"
# Number of tasks, as SLURM, Open MPI, MPICH or Intel MPI, and MVAPICH set it. JAX connects only the tasks
# of the first two.
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_turns = itertools.count()


def requested(coordinator: str | None, count: int | None, index: int | None) -> bool:
    """Return whether this is one of several processes, by its flags or by its launcher.

    Raises ConfigError: some flags are missing, or their values are impossible.
    """
    flags = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        if _launched() > 1:
            return True
        name, tasks = _tasks()
        if tasks > 1:
            raise ConfigError(
                f"{name}={tasks}: JAX cannot connect the tasks of this launcher; start them with srun or "
                f"Open MPI, or pass --coordinator=HOST:PORT --num_processes={tasks} --process_id=I to each"
            )
        return False
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} missing; set all of --coordinator=HOST:PORT --num_processes=N "
            "--process_id=I, or none of them where SLURM, MPI or Kubernetes starts the run"
        )
    assert coordinator is not None
    assert count is not None
    assert index is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"--coordinator={coordinator!r} is not the HOST:PORT of process 0; set "
            "--coordinator=HOST:1234"
        )
    if not 0 <= index < count:
        raise ConfigError(
            f"--process_id={index} is out of range: with --num_processes={count} it must be 0 to "
            f"{count - 1}; number the processes from 0"
        )
    return count > 1


def require_alone() -> None:
    """Refuse to run a single-process command in several tasks at once.

    Raises ConfigError in every task of a launcher that has started more than one.
    """
    name, tasks = _tasks()
    if tasks > 1:
        raise ConfigError(
            f"{name}={tasks}: the launcher has started this command {tasks} times, and each task would do "
            "all of the work; the command is one process and uses all devices of its machine: start one "
            f"task (srun --ntasks=1, mpirun -n 1), or unset {name} where every task has its own --workdir"
        )


def start(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    *,
    connect_s: float = CONNECT_S,
    heartbeat_s: int = HEARTBEAT_S,
) -> None:
    """Connect to the other processes; call this before any other use of JAX.

    `connect_s`: time limit for all processes to connect. `heartbeat_s`: a process without a heartbeat for
    this long counts as lost. Raises ProcessError: the coordinator does not answer.
    """
    if coordinator and index:
        _await(coordinator, connect_s)
    # JAX's service would catch SIGTERM (but not SIGINT, nor a deadline); see `agree_on_stop`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator,
        count,
        index,
        local_device_ids=None if coordinator else _local_devices(),
        cluster_detection_method="deactivate" if coordinator else None,
        initialization_timeout=math.ceil(connect_s),
        heartbeat_timeout_seconds=heartbeat_s,
        shutdown_timeout_seconds=heartbeat_s,
    )


def supervise() -> int:
    """Run this command in a child process and print in one line how it failed; return the exit status.

    JAX ends a process that has lost another one by SIGABRT from C++, which no `except` can catch.
    """
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {_SUPERVISED: "1"},
        preexec_fn=_die_with_parent,
    )
    received = []
    # This process only forwards signals; the child handles them, with the run's own time limit.
    signal.set_wakeup_fd(-1)

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    status = child.wait()
    if -status in received:  # the child had not installed its handlers yet
        return AGAIN
    if status == -signal.SIGABRT:
        print(f"error: {LOST}", file=sys.stderr, flush=True)
        return 1
    return status if status >= 0 else 128 - status


def supervised() -> bool:
    """Return whether this process is the child of `supervise`."""
    return _SUPERVISED in os.environ


def leave(status: int) -> None:
    """End this process, once the other processes that fail in the same way have printed their error too."""
    # An exception here means: not connected, or the others do not fail and JAX notifies them.
    with contextlib.suppress(Exception):
        _client().wait_at_barrier("opd_jax/leave", 3000)
    sys.stdout.flush()
    os._exit(status)  # skips JAX's own shutdown, which waits for the others


def first() -> bool:
    """Return whether this is process 0, which alone writes files and prints."""
    return not several() or jax.process_index() == 0


def index() -> int:
    """Return the index of this process, 0 where it is alone."""
    return jax.process_index() if several() else 0


def several() -> bool:
    """Return whether the run has more than one process."""
    return jax.distributed.is_initialized()


def from_first(make: Callable[[], Any]) -> Any:
    """Broadcast what `make` returns in process 0 to all processes; any value that JSON can hold."""
    if not several():
        return make()
    key = f"opd_jax/broadcast/{next(_turns)}"
    if not first():
        return json.loads(_client().blocking_key_value_get(key, _BROADCAST_S * 1000))
    value = make()
    _client().key_value_set(key, json.dumps(value))
    return value


def agree_on_stop(reason: str | None) -> str | None:
    """Agree on a stop request: the first reason any process received, identical everywhere, or None.

    `reason` is this process's own. A request that arrives after process 0 polled is seen at the next call.
    """
    if not several():
        return reason
    client = _client()
    if reason is not None and not first():
        client.key_value_set(_STOP_KEY, reason, allow_overwrite=True)

    def any_reason() -> str | None:
        if reason is not None:
            return reason
        try:
            return client.key_value_try_get(_STOP_KEY)
        except jax.errors.JaxRuntimeError:  # no process has set the key
            return None

    return from_first(any_reason)


def exchange_progress(progress: Mapping[str, Any]) -> dict[int, Any]:
    """Publish the progress of this process, and return what each process published last, by its index.

    Not a barrier: a process that has published nothing is left out. `progress` is any value that JSON can
    hold. Call this in one thread only.
    """
    client = _client()
    client.key_value_set(f"{_PROGRESS}{index()}", json.dumps(progress), allow_overwrite=True)
    published = client.key_value_dir_get(_PROGRESS)
    return {int(key.removeprefix(_PROGRESS)): json.loads(text) for key, text in published}


def all_gather(value: Mapping[str, Any]) -> list[Any]:
    """Return the values of all processes, in order of process; any values that JSON can hold."""
    text = json.dumps(value, default=str)
    if not several():
        return [json.loads(text)]
    client, turn = _client(), next(_turns)
    client.key_value_set(f"opd_jax/facts/{turn}/{jax.process_index()}", text)
    return [
        json.loads(client.blocking_key_value_get(f"opd_jax/facts/{turn}/{i}", _BROADCAST_S * 1000))
        for i in range(jax.process_count())
    ]


def agree(facts: Mapping[str, Any]) -> None:
    """Check that all processes have the same facts; this is also a barrier.

    Raises ProcessError in every process: the first process that differs from process 0, and in which facts.
    """
    if not several():
        return
    by_process = all_gather(facts)
    for i, other in enumerate(by_process):
        differing = [
            f"{name} ({by_process[0].get(name)!r} in process 0, {other.get(name)!r} in process {i})"
            for name in sorted(by_process[0] | other)
            if by_process[0].get(name) != other.get(name)
        ]
        if differing:
            raise ProcessError(
                f"process {i} differs from process 0 in: {', '.join(differing[:5])}; start all processes "
                "with the same command, code and packages"
            )


def _client() -> Any:
    """Return JAX's key-value store, for which it has no public name.

    Raises ProcessError where this version of JAX has it in another place.
    """
    try:
        from jax._src import distributed

        return distributed.global_state.client
    except (ImportError, AttributeError) as error:
        raise ProcessError(
            f"jax {jax.__version__} has no key-value store where opd_jax looks for it ({error}); a run of "
            "several processes needs it: install another version of jax (tests/constraints.txt), or start "
            "one process"
        ) from None


def _await(coordinator: str, limit_s: float) -> None:
    """Wait until the coordinator accepts connections.

    Without this JAX would end the process with no message of ours.
    """
    host, _, port = coordinator.rpartition(":")
    end, reason = time.monotonic() + limit_s, ""
    while time.monotonic() < end:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
    raise ProcessError(
        f"--coordinator={coordinator} does not answer within {limit_s:g} s ({reason}); start process 0 "
        "there, set --coordinator to its address, or raise --config.processes.connect_seconds"
    )


def _launched() -> int:
    """Return how many processes SLURM, MPI or Kubernetes started; 1 where none did."""
    for name in _LAUNCHERS[:2]:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    # An indexed job of Kubernetes: JAX queries the cluster for the number, so any number above 1 will do.
    return 2 if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys() else 1


def _tasks() -> tuple[str, int]:
    """Return the launcher's variable that counts several tasks, and the count; ("", 1) otherwise."""
    for name in _LAUNCHERS:
        if os.environ.get(name, "").isdigit() and int(os.environ[name]) > 1:
            return name, int(os.environ[name])
    return "", 1


def _local_devices() -> list[int] | None:
    """Return all GPUs of a node for its only task; None leaves it to JAX, one GPU per task of a node."""
    alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
    count = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(count))) if alone and count.isdigit() else None


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
