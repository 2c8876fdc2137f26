"""Several processes as one run: started together, held to one config, one of them writing.

JAX's own runtime (`jax.distributed`) connects them. Each runs the same program on the same host data;
arrays on the devices are divided (mesh.py), and what may differ from process to process (grades, files
that are there, the time) the first decides and tells the others. One process alone hears nothing of this.
"""

import contextlib
import ctypes
import itertools
import json
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

GATHER_S = 45  # for all processes to come at the start
HEARTBEAT_S = 20  # without a sign of life a process counts as lost
LOST = (
    "another process of the run is lost, or did not come in time; see what it said last, then start all "
    "of them again: with the same --workdir the run goes on from its last checkpoint"
)
_TELL_S = 3600  # one may grade a benchmark, or read a model from the hub; a lost one shows by its heartbeat
_SUPERVISED = "OPD_JAX_SUPERVISED"
_TOLD = "opd_jax/heard"
# Of SLURM, Open MPI, MPICH or Intel MPI, MVAPICH: how many tasks there are. JAX connects the first two's.
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_turns = itertools.count()


def asked(coordinator: str | None, count: int | None, index: int | None) -> bool:
    """Whether this is one of several processes, by its flags or by what started it.

    Raises ConfigError: flags that are not all there or cannot be.
    """
    given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if _launched() > 1:
            return True
        name, tasks = _tasks()
        if tasks > 1:
            raise ConfigError(
                f"{name}={tasks}: the tasks of this launcher do not find each other; start them with srun "
                f"or Open MPI, or give each --coordinator=HOST:PORT --num_processes={tasks} --process_id=I"
            )
        return False
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} missing, wanted all of --coordinator=HOST:PORT "
            "--num_processes=N --process_id=I, or none where SLURM, MPI or Kubernetes starts the run"
        )
    assert coordinator is not None
    assert count is not None
    assert index is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"--coordinator={coordinator!r}, wanted HOST:PORT of process 0; set "
            "--coordinator=HOST:1234"
        )
    if not 0 <= index < count:
        raise ConfigError(
            f"--process_id={index} of --num_processes={count}, wanted 0 to {count - 1}; number the "
            "processes from 0"
        )
    return count > 1


def require_alone() -> None:
    """Refuse to run one command several times at once: for entry points that are one process.

    Raises ConfigError in every task of a launcher that has started more than one.
    """
    name, tasks = _tasks()
    if tasks > 1:
        raise ConfigError(
            f"{name}={tasks}: the launcher has started this command {tasks} times, and each would do all of "
            "the work; it is one process that takes all devices of its machine: start one task (srun "
            f"--ntasks=1, mpirun -n 1), or unset {name} where each task has a --workdir of its own"
        )


def start(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Connect with the other processes, before anything else is asked of JAX.

    Raises ProcessError: the coordinator does not answer.
    """
    if coordinator and index:
        _await(coordinator)
    # It would take SIGTERM for itself (and not SIGINT, or a deadline); see `heard`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator,
        count,
        index,
        local_device_ids=None if coordinator else _local_devices(),
        cluster_detection_method="deactivate" if coordinator else None,
        initialization_timeout=GATHER_S,
        heartbeat_timeout_seconds=HEARTBEAT_S,
        shutdown_timeout_seconds=HEARTBEAT_S,
    )


def supervise() -> int:
    """Run this command in a child, and say in one line what became of it; returns the exit status.

    JAX ends a process that has lost another from within C++, by SIGABRT: no exception can be caught.
    """
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {_SUPERVISED: "1"},
        preexec_fn=_die_with_parent,
    )
    asked = []
    signal.set_wakeup_fd(
        -1
    )  # the child hears, with the run's own limit of time; this one passes on

    def pass_on(number: int, _: Any) -> None:
        asked.append(number)
        child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    status = child.wait()
    if -status in asked:  # it had not begun to listen
        return AGAIN
    if status == -signal.SIGABRT:
        print(f"error: {LOST}", file=sys.stderr, flush=True)
        return 1
    return status if status >= 0 else 128 - status


def supervised() -> bool:
    """Whether this is the child of `supervise`."""
    return _SUPERVISED in os.environ


def leave(status: int) -> None:
    """End this process of several at once, when those that fail alike have said so too."""
    with contextlib.suppress(
        Exception
    ):  # not connected; or the others do not fail, and JAX tells them
        _client().wait_at_barrier("opd_jax/leave", 3000)
    sys.stdout.flush()
    os._exit(status)  # without JAX's own end, which waits for the others


def first() -> bool:
    """Whether this process writes the files and speaks."""
    return not several() or jax.process_index() == 0


def several() -> bool:
    """Whether the run is more than this process."""
    return jax.distributed.is_initialized()


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns in the first process, in all of them; anything that JSON holds."""
    if not several():
        return make()
    key = f"opd_jax/told/{next(_turns)}"
    if not first():
        return json.loads(_client().blocking_key_value_get(key, _TELL_S * 1000))
    value = make()
    _client().key_value_set(key, json.dumps(value))
    return value


def heard(mine: str | None) -> str | None:
    """What any process was told from outside (`mine`: this one), the same in all of them; or None.

    What another one says just after the first has asked is heard the next time.
    """
    if not several():
        return mine
    client = _client()
    if mine is not None and not first():
        client.key_value_set(_TOLD, mine, allow_overwrite=True)

    def any_of_them() -> str | None:
        if mine is not None:
            return mine
        try:
            return client.key_value_try_get(_TOLD)
        except jax.errors.JaxRuntimeError:  # nobody said anything
            return None

    return from_first(any_of_them)


def gathered(mine: Mapping[str, Any]) -> list[Any]:
    """What every process says, in their order; anything that JSON holds."""
    said = json.dumps(mine, default=str)
    if not several():
        return [json.loads(said)]
    client, turn = _client(), next(_turns)
    client.key_value_set(f"opd_jax/facts/{turn}/{jax.process_index()}", said)
    return [
        json.loads(client.blocking_key_value_get(f"opd_jax/facts/{turn}/{i}", _TELL_S * 1000))
        for i in range(jax.process_count())
    ]


def agree(facts: Mapping[str, Any]) -> None:
    """Go on only where all processes say the same of every fact.

    Raises ProcessError in every process: the first two that differ, and in what.
    """
    if not several():
        return
    said = gathered(facts)
    for i, theirs in enumerate(said):
        differing = [
            f"{name}: {said[0].get(name)!r} there, {theirs.get(name)!r} here"
            for name in sorted(said[0] | theirs)
            if said[0].get(name) != theirs.get(name)
        ]
        if differing:
            raise ProcessError(
                f"process {i} is not like process 0 ({'; '.join(differing[:5])}); start all with the "
                "same command, code and packages"
            )


def _client() -> Any:
    """JAX's key-value store, which it has no public name for."""
    from jax._src import distributed

    return distributed.global_state.client


def _await(coordinator: str) -> None:
    """Until the coordinator takes connections. JAX would end this process without a word of ours."""
    host, _, port = coordinator.rpartition(":")
    end, reason = time.monotonic() + GATHER_S, ""
    while time.monotonic() < end:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
    raise ProcessError(
        f"--coordinator={coordinator} does not answer for {GATHER_S} s ({reason}); start process 0 "
        "there, or give its address"
    )


def _launched() -> int:
    """How many processes SLURM, MPI or Kubernetes started; 1 where none did."""
    for name in _LAUNCHERS[:2]:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    # An indexed job of Kubernetes; how many there are JAX asks of the cluster.
    return 2 if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys() else 1


def _tasks() -> tuple[str, int]:
    """The variable in which a launcher says that it started several tasks, and how many; else ("", 1)."""
    for name in _LAUNCHERS:
        if os.environ.get(name, "").isdigit() and int(os.environ[name]) > 1:
            return name, int(os.environ[name])
    return "", 1


def _local_devices() -> list[int] | None:
    """All GPUs of a node for its only task; None: as JAX does it, one to each of a node's tasks."""
    alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
    count = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(count))) if alone and count.isdigit() else None


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
